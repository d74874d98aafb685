"""What every engine promises."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from clifflab.config import TracesConfig


@dataclass(frozen=True)
class Request:
    """One completion to write.

    Attributes:
        prompt_ids: The chat prefix.
        seed: Seed of this row's own random numbers.
        limit: Most tokens to write.
        drawn: Random numbers of the row's stream that were used before. A trace that is continued after its first
            ``drawn`` tokens meets the numbers that it would have met there.
        heads: Heads that are changed while it is written, as ``(layer, head)``.
    """

    prompt_ids: tuple[int, ...]
    seed: int
    limit: int
    drawn: int = 0
    heads: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Completion:
    """What was written, without the end-of-turn token.

    Attributes:
        ids: Token ids.
        finish_reason: ``stop``: the model ended its turn; ``length``: it ran into the limit.
    """

    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """Writes completions in the order of the requests.

    A completion depends on its own request and the sampling settings alone: not on its batch mates, their order or
    the number of workers.
    """

    def generate(self, requests: Sequence[Request], sampling: TracesConfig) -> list[Completion]:
        """Complete every request."""
        ...


def row_seed(study_seed: int, trace_id: str) -> int:
    """A 64-bit seed of one trace, from the study's seed and the trace's id alone."""
    return int.from_bytes(hashlib.sha256(f"{study_seed}:{trace_id}".encode()).digest()[:8], "big")
