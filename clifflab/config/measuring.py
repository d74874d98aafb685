"""How the cliff is measured: near-duplicates, traces, judges, probes, truncation, plateau and cliff."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from clifflab.config.base import Section, possible_path


class DuplicatesConfig(Section):
    """Near-duplicate requests, which splits and intervals keep together.

    Attributes:
        enabled: Look for them; otherwise only equal groups stay together.
        threshold: Similarity of word shingles, 0 to 1, from which two requests are near-duplicates.
        ngram: Words of a shingle.
        permutations: MinHash permutations; more of them miss fewer pairs.
    """

    enabled: bool = True
    threshold: float = Field(default=0.5, ge=0.3, le=1.0)
    ngram: int = Field(default=3, ge=1, le=10)
    permutations: int = Field(default=128, ge=16, le=1024)


class TracesConfig(Section):
    """Generation: sampling, lengths and the batch, which is the unit of work."""

    samples: int = Field(default=1, ge=1)
    max_new_tokens: int = Field(default=1024, ge=1)
    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    batch_size: int = Field(default=32, ge=1)


class GuardConfig(Section):
    """A guard checkpoint that judges harm.

    Attributes:
        path: A checkpoint folder or a model id of the Hugging Face hub.
        revision: Hub revision (commit, tag or branch).
        dtype: ``auto`` is bfloat16 on a GPU and float32 on a CPU.
        kind: How it answers: ``llama-guard`` (safe, or unsafe and codes), ``wildguard`` (lines such as
            ``Harmful response: yes``), ``auto`` reads both.
        template: Jinja file with ``{{ prompt }}``, ``{{ response }}`` and ``{{ thinking }}`` for a guard whose
            tokenizer has no chat template, or where another one is wanted.
        thinking: Show it the thinking too.
        max_tokens: Longest text that it reads, its answer included; its whole context by default.
        batch_size: Exchanges a batch, which is the unit of work.
        trust_remote_code: Run code that comes with the checkpoint.
    """

    path: str = Field(min_length=1)
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kind: Literal["auto", "llama-guard", "wildguard"] = "auto"
    template: str | None = None
    thinking: bool = False
    max_tokens: int | None = Field(default=None, ge=64)
    batch_size: int = Field(default=16, ge=1)
    trust_remote_code: bool = False

    @field_validator("path", "template")
    @classmethod
    def _possible(cls, value: str | None) -> str | None:
        return value if value is None else possible_path(value)


class JudgeConfig(Section):
    """How outcomes are decided, and against which labels the judges are measured (SPEC section 5).

    Attributes:
        kind: Judge of refusal.
        guard: Judge of harm, beside it.
        labels: File of labelled responses, or ``organism:responses`` for those of the planted language.
    """

    kind: Literal["rules"] = "rules"
    guard: GuardConfig | None = None
    labels: str | None = None

    @field_validator("labels")
    @classmethod
    def _known_labels(cls, value: str | None) -> str | None:
        if value is not None and value.startswith("organism:") and value != "organism:responses":
            raise ValueError("the planted language has organism:responses alone")
        return value if value is None else possible_path(value)


class ProbeConfig(Section):
    """Linear probes (SPEC section 2).

    Attributes:
        c: Inverse strength of the L2 penalty of the logistic regression, on standardised features, for training
            traces of a total weight of 1,000, however many there are.
        max_positions: Evenly spaced positions per trace for the all-position probe.
        train_share: Share of groups for training; the rest is split evenly into validation and test.
        min_examples: Positives (and negatives) needed in each split taken together to train a probe.
        max_traces: Cap on traces per class; a seeded choice of traces above it.
        refits: Probes refitted to resampled training groups: how far a figure moves with them widens its interval.
        folds: Folds of the cross-fitted probes, by group.
        shuffles: Probes fitted to labels shuffled over groups, for selectivity.
    """

    c: float = Field(default=0.1, gt=0)
    max_positions: int = Field(default=32, ge=2)
    train_share: float = Field(default=0.5, gt=0, lt=1)
    min_examples: int = Field(default=20, ge=4)
    max_traces: int = Field(default=1000, ge=20)
    refits: int = Field(default=20, ge=2)
    folds: int = Field(default=5, ge=2)
    shuffles: int = Field(default=10, ge=2)
    batch_size: int = Field(default=32, ge=1)


class TruncationConfig(Section):
    """The truncation experiment: how much of the thinking does the decision need?

    Attributes:
        kept: Shares of the thinking that are kept, from its start, before it is closed and the model answers.
        traces: Traces of each set and model; 0 leaves the experiment out.
        max_new_tokens: Longest response.
    """

    kept: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    traces: int = Field(default=32, ge=0)
    max_new_tokens: int = Field(default=64, ge=1)
    batch_size: int = Field(default=32, ge=1)

    @field_validator("kept")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or any(not 0.0 <= share <= 1.0 for share in value) or list(value) != sorted(set(value)):
            raise ValueError("give ascending shares of the thinking from 0 to 1")
        return value


class CliffConfig(Section):
    """Plateau, cliff and curves (SPEC section 3).

    Attributes:
        window: The plateau's part of the thinking, as fractions of its length.
        bins: Bins of the relative axis of the curves.
        length_strata: Strata of thinking length within which the excess cliff is compared.
        bootstrap: Resamples of groups for 95% intervals.
    """

    window: tuple[float, float] = (0.5, 0.9)
    bins: int = Field(default=20, ge=2, le=100)
    length_strata: int = Field(default=10, ge=1)
    bootstrap: int = Field(default=2000, ge=100)
    batch_size: int = Field(default=32, ge=1)

    @field_validator("window")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 <= value[0] < value[1] <= 1.0:
            raise ValueError("give two fractions of the thinking, 0 <= start < end <= 1")
        return value
