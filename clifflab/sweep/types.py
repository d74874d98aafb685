"""What every sweep takes and returns.

Shape suffixes: N traces, M meters (probe logits, then the refusal log-odds), S sets of heads, D width, K directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from clifflab.errors import InputError, TraceError
from clifflab.models.lens import Lens
from clifflab.models.loading import LoadedModel
from clifflab.text.spans import Spans

Positions = Literal["closing", "all"]


@dataclass(frozen=True)
class SweepTrace:
    """The part of a trace that a sweep runs over: everything up to and including its final position.

    Attributes:
        ids: Token ids; the last one stands at the final position.
        closing_start: Index of the first closing token.
    """

    ids: tuple[int, ...]
    closing_start: int

    def __post_init__(self) -> None:
        if not 0 <= self.closing_start < len(self.ids):
            raise TraceError("closing_missing", "the trace has no closing tokens to change a head at")

    @classmethod
    def of(cls, ids: Sequence[int], spans: Spans) -> SweepTrace:
        """From a whole trace.

        Raises:
            TraceError: The trace has no closing tokens.
        """
        if not spans.closed or spans.closing_start >= spans.response_start:
            raise TraceError("closing_missing", "the trace has no closing tokens to change a head at")
        return cls(tuple(ids[: spans.response_start]), spans.closing_start)


@dataclass
class Meter:
    """What is read at the final position: logits of directions at their layers, and the refusal log-odds.

    Attributes:
        layers: Layer after whose block each direction reads, ``[K]``.
        weights: Directions, ``[K, D]`` float32; the first is the probe, others may be controls.
        biases: ``[K]``.
        lens: The model's refusal log-odds.
    """

    layers: tuple[int, ...]
    weights: torch.Tensor
    biases: torch.Tensor
    lens: Lens

    def __post_init__(self) -> None:
        if not len(self.layers) == len(self.weights) == len(self.biases):
            sizes = f"{len(self.layers)}, {len(self.weights)} and {len(self.biases)}"
            raise ValueError(f"layers, weights and biases must be as many, not {sizes}")

    @property
    def width(self) -> int:
        """Number of readings, M = K + 1: the directions in order, then the refusal log-odds."""
        return len(self.layers) + 1

    def check(self, loaded: LoadedModel) -> None:
        """Refuse a probe that was trained on another model or layer size.

        Raises:
            InputError: Its width or layer is not the model's.
        """
        if self.weights.shape[-1] != loaded.d_model:
            problem = f"reads {self.weights.shape[-1]} numbers where the model has {loaded.d_model}"
            raise InputError("probe", loaded.spec.name, problem, "give the probe that was trained on this model")
        beyond = [layer for layer in self.layers if not 0 <= layer < len(loaded.blocks)]
        if beyond:
            problem = f"reads layer {beyond[0]} where the model has {len(loaded.blocks)}"
            raise InputError("probe", loaded.spec.name, problem, "give the probe that was trained on this model")

    def read(self, layer: int, last: bool, states_SD: torch.Tensor, into_SM: torch.Tensor) -> None:
        """Write the readings that states after one block allow into ``[S, M]``.

        Args:
            layer: The block.
            last: Whether it is the last one, so that the log-odds can be read.
            states_SD: Residual states at the final position.
            into_SM: Where to write.
        """
        mine = [k for k, at in enumerate(self.layers) if at == layer]
        if mine:
            weights, biases = self.weights[mine].to(states_SD.device), self.biases[mine].to(states_SD.device)
            into_SM[:, mine] = (states_SD.float() @ weights.T + biases).to(into_SM)
        if last:
            into_SM[:, -1] = self.lens.log_odds(states_SD.to(self.lens.refusal.device)).to(into_SM)


@dataclass
class Swept:
    """Readings of one trace.

    Attributes:
        clean: Of the unchanged model, ``[M]``.
        changed: With each set of heads changed, ``[S, M]``.
    """

    clean: Any
    changed: Any

    @property
    def effects(self) -> Any:
        """Change of each reading by each set, ``[S, M]``."""
        return self.changed - self.clean
