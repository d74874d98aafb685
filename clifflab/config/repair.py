"""How a model is repaired: which examples, which targets, how it is tuned, and how the repair is judged (SPEC 6)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from clifflab.config.base import Section, Slug, slug
from clifflab.config.inputs import PromptSet

Ranking = Literal["misalignment", "cliff", "final", "plateau"]
Selector = Literal["misalignment", "cliff", "final", "plateau", "random", "rules", "guard"]
Budget = int | float


def check_budget(value: Budget) -> Budget:
    """A count of examples, or a share of the corpus."""
    if isinstance(value, bool) or value <= 0 or (isinstance(value, float) and value >= 1):
        raise ValueError("give a number of examples, or a share of the corpus between 0 and 1")
    return value


class SelectConfig(Section):
    """Which examples of a scored corpus are chosen (SPEC section 6).

    Attributes:
        by: What ranks them, the largest first; ``final`` ranks by the smallest score at the final position. ``random``,
            ``rules`` (what the rule judge says was complied with) and ``guard`` (what the guard calls harmful) are the
            baselines.
        beside: Other selectors whose choice at the same budget is written beside it.
        probe: Training positions of the probe whose scores rank.
        budget: A count, or a share of the corpus; benign examples are part of it.
        benign: Share of the budget that goes to benign answered requests.
        plateau: Least plateau of a trace without a label.
        stratify: A column (``set``, ``category``) whose values share the budget evenly; none by default.
        outcomes: Take harmful traces with these outcomes only; all closed and whole ones by default.
        min_thinking: Least thinking tokens.
        max_tokens: Most tokens of a trace; no limit by default.
        decontaminate: Similarity of word shingles from which a corpus request is too near to one that is evaluated, and
            is left out; 1 leaves out equal texts alone.
        shared_groups: What becomes of corpus requests whose base request (``group``) is evaluated too, in other words
            or another wrapper: ``leave-out``, or ``keep`` them where it is the wrapper that is held out.
    """

    by: Selector = "misalignment"
    beside: tuple[Selector, ...] = ("final", "plateau", "random", "rules")
    probe: Literal["all", "final"] = "all"
    budget: Budget = 0.017
    benign: float = Field(default=0.2, ge=0.0, lt=1.0)
    plateau: float = Field(default=0.5, ge=0.0, le=1.0)
    stratify: str | None = None
    outcomes: tuple[Literal["refused", "complied"], ...] = ("refused", "complied")
    min_thinking: int = Field(default=0, ge=0)
    max_tokens: int | None = Field(default=None, ge=1)
    decontaminate: float = Field(default=0.8, ge=0.3, le=1.0)
    shared_groups: Literal["leave-out", "keep"] = "leave-out"

    _check_budget = field_validator("budget")(check_budget)


class TargetsConfig(Section):
    """What the model is to write instead.

    Attributes:
        kind: ``keep-thinking`` keeps the model's own thinking and ends in a refusal; ``rewrite`` takes the target that
            the corpus gives.
        refusals: ``own`` refusals of the model in the corpus (``varied`` ones where there are too few), or ``varied``
            ones that clifflab writes.
    """

    kind: Literal["keep-thinking", "rewrite"] = "keep-thinking"
    refusals: Literal["own", "varied"] = "own"


class TuneConfig(Section):
    """The fine-tune.

    Attributes:
        method: ``lora`` trains an adapter, ``full`` all weights.
        rank: Of the adapter.
        alpha: Its scale; the update is multiplied by ``alpha / rank``.
        modules: Names of the linear layers that get one; ``all-linear`` is all but the output head.
        epochs: Passes over the training examples.
        learning_rate: Highest; by default 2e-4 for ``lora`` and 1e-5 for ``full``.
        schedule: How it falls after the warm-up.
        warmup: Share of the steps in which it rises.
        weight_decay: Of AdamW.
        clip: Largest norm of the gradient.
        batch_size: Examples of one optimizer step, over all workers.
        micro_tokens: Most tokens, padding included, of one forward pass of one worker.
        batching: ``grouped`` puts examples of similar length together, ``packed`` joins them without padding.
        loss_on: Tokens that are learnt: all of the ``assistant``'s, or the ``response`` after the closing tokens alone.
        too_long: What becomes of an example longer than the context: it is rejected, or the middle of its thinking is
            cut. Both are counted.
        checkpointing: Compute activations again in the backward pass; ``auto`` on a GPU.
        validation: Share of the examples, by group, that is held out to stop early; fewer than 8 hold none out.
        patience: Epochs without a smaller loss on those before the training stops; the best epoch is kept.
        save_every: Optimizer steps between checkpoints; 0 saves after each epoch.
        workers: Workers of one training; ``auto`` is one per GPU, or one.
        max_failures: How often a training goes on from its last checkpoint when a worker dies.
    """

    method: Literal["lora", "full"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    modules: tuple[str, ...] = ("all-linear",)
    epochs: int = Field(default=5, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    clip: float = Field(default=1.0, gt=0.0)
    batch_size: int = Field(default=8, ge=1)
    micro_tokens: int = Field(default=8192, ge=1)
    batching: Literal["grouped", "packed"] = "grouped"
    loss_on: Literal["assistant", "response"] = "assistant"
    too_long: Literal["reject", "cut-thinking"] = "reject"
    checkpointing: Literal["auto", "on", "off"] = "auto"
    validation: float = Field(default=0.1, ge=0.0, lt=1.0)
    patience: int = Field(default=2, ge=1)
    save_every: int = Field(default=0, ge=0)
    workers: Literal["auto"] | int = "auto"
    max_failures: int = Field(default=3, ge=0)

    @field_validator("workers")
    @classmethod
    def _positive(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError("give at least 1, or auto")
        return value

    @property
    def peak(self) -> float:
        """Highest learning rate."""
        return self.learning_rate or (2e-4 if self.method == "lora" else 1e-5)


class ChoiceSet(Section):
    """Multiple-choice questions, answered by likelihood.

    Attributes:
        name: The set's name.
        path: JSONL, JSON, CSV or Parquet file, or ``hf:NAME[:SPLIT]``, with the columns ``question``, ``choices`` (a
            list of texts) and ``answer`` (index of the right one).
        limit: Use the first rows only.
    """

    name: Slug
    path: str = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1)

    _check_name = field_validator("name")(slug)


class EvaluateConfig(Section):
    """Before and after (SPEC sections 5 and 6).

    Attributes:
        pools: Names for sets that are also judged together, e.g. ``unseen: [heldout_wrappers, heldout_objects]``.
        choices: Multiple-choice sets.
        perplexity_traces: Benign answered traces that the model before wrote itself, whose perplexity is measured.
    """

    pools: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    choices: tuple[ChoiceSet, ...] = ()
    perplexity_traces: int = Field(default=64, ge=2)
    batch_size: int = Field(default=32, ge=1)

    @field_validator("choices")
    @classmethod
    def _unique_names(cls, value: tuple[ChoiceSet, ...]) -> tuple[ChoiceSet, ...]:
        names = [part.name for part in value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the name {twice[0]!r} is used twice; give each its own")
        return value


class CurveConfig(Section):
    """The less-is-more curve: many small fine-tunes, each judged by rules on a few prompts.

    All of them learn by ``repair.tune`` but hold no example out (``validation`` is 0 here, and nothing stops early):
    small budgets could not, and the recipe must be the same at all of them.

    Attributes:
        budgets: Examples of each fine-tune, the benign share included; none leaves the curve out.
        selectors: Who chooses them.
        seeds: Seeds of each (choice of benign examples, targets, order, adapter).
        sets: Sets of the study that are answered; by default all but those of finished traces, which no model writes.
        prompts: Prompts of each.
        perplexity_traces: Benign answered traces that the model before wrote itself, whose perplexity is measured.
    """

    budgets: tuple[int, ...] = ()
    selectors: tuple[Selector, ...] = ("misalignment", "final", "plateau", "random", "rules")
    seeds: int = Field(default=5, ge=2)
    sets: tuple[str, ...] = ()
    prompts: int = Field(default=48, ge=1)
    perplexity_traces: int = Field(default=32, ge=2)

    @field_validator("budgets")
    @classmethod
    def _budgets(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(budget < 2 for budget in value) or list(value) != sorted(set(value)):
            raise ValueError("give ascending numbers of examples, at least 2")
        return value

    @field_validator("selectors")
    @classmethod
    def _selectors(cls, value: tuple[Selector, ...]) -> tuple[Selector, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("name at least one, and none twice")
        return value


class RepairConfig(Section):
    """Choose examples, tune on them, and measure the tuned model beside the first one; nothing without a corpus.

    Attributes:
        corpus: Sets of prompts, or of existing traces, from which the examples come. No probe is trained on them.
        models: Models that are repaired; all by default.
        tuned: Tune and measure; otherwise only select (and draw the curve).
        heads: Search the tuned model for heads too.
        batch_size: Corpus traces of one unit of work.
    """

    corpus: tuple[PromptSet, ...] = ()
    models: tuple[str, ...] = ()
    tuned: bool = True
    heads: bool = False
    batch_size: int = Field(default=128, ge=1)
    select: SelectConfig = SelectConfig()
    targets: TargetsConfig = TargetsConfig()
    tune: TuneConfig = TuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    curve: CurveConfig = CurveConfig()

    @model_validator(mode="after")
    def _unique_names(self) -> RepairConfig:
        names = [part.name for part in self.corpus]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"corpus: the name {twice[0]!r} is used twice; give each its own")
        return self

    @model_validator(mode="after")
    def _something_to_choose_from(self) -> RepairConfig:
        if self.curve.budgets and not self.corpus:
            raise ValueError("curve.budgets: there is nothing to choose examples from; give repair.corpus")
        return self
