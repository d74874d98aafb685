"""How a corpus is scored (``clifflab score``)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from clifflab.config.base import Section

ESTIMATORS = ("logistic", "difference")
KINDS = ("all", "final")


class ScoreConfig(Section):
    """Scoring a corpus.

    Attributes:
        probes: Which probes are read, each ``POSITIONS[:ESTIMATOR[:LAYER]]``: positions ``all`` or ``final``, estimator
            ``logistic`` or ``difference``, layer a number, ``every``, or nothing for the reported one. A row a trace
            comes out for each; ``all`` is the logistic probe trained at all positions, at its reported layer.
        too_long: What becomes of a trace beyond ``max_tokens``: ``reject`` it, or ``cut`` the middle of its thinking.
        max_tokens: Longest trace, response left out; the model's context by default.
        block_rows: Rows of a block, the unit that is read, scored and written; smaller where rows are long.
        token_budget: Tokens of one forward pass; by default chosen for the device and halved where memory runs out.
            Never part of a result's identity.
        keep_traces: Write the traces too, as ``clifflab select`` needs them.
    """

    probes: tuple[str, ...] = ("all",)
    too_long: Literal["reject", "cut"] = "reject"
    max_tokens: int | None = Field(default=None, ge=16)
    block_rows: int = Field(default=1000, ge=1)
    token_budget: int | None = Field(default=None, ge=1)
    keep_traces: bool = False

    @field_validator("probes")
    @classmethod
    def _readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("give each probe once, and at least one")
        for spec in value:
            positions, _, rest = spec.partition(":")
            estimator, _, layer = rest.partition(":")
            known = positions in KINDS and (not rest or estimator in ESTIMATORS)
            if not known or not (layer == "" or layer == "every" or layer.isdecimal()):
                raise ValueError(
                    f"{spec!r} is no probe; write POSITIONS[:ESTIMATOR[:LAYER]], such as all or final:logistic:7"
                )
        return value
