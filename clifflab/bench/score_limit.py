"""What the hardware gives: a bare forward pass to one layer in its best batch shape, and the speed of a matrix product.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clifflab.models.loading import LoadedModel
from clifflab.scoring.forward import Batch, run_to

_LEAST_TOKENS, _MOST_TOKENS = 512, 8192  # of a pass
_TRIED = 4096  # tokens on which a shape is tried, at least one pass


@dataclass(frozen=True)
class Limit:
    """The bare pass over rows of one length, as much work as the traces are.

    Attributes:
        run: Does it.
        lengths: Tokens of each row.
        rows: Rows of a pass.
    """

    run: Callable[[], None]
    lengths: npt.NDArray[np.int64]
    rows: int

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.lengths.sum())


def best_limit(
    loaded: LoadedModel, layer: int, lengths: npt.NDArray[np.int64], seed: int, note: Callable[[str], None]
) -> Limit:
    """The fastest bare pass over as many tokens as the traces have, without padding, probe or measures.

    All rows are of one length, so that they can be batched without padding: that at which they cost as much attention
    as the traces do, the mean length of a token's trace.

    Args:
        loaded: The model.
        layer: Where the pass ends.
        lengths: Tokens of each trace.
        seed: Of the tokens.
        note: Told of every shape that was tried.
    """
    total = int(lengths.sum())
    count = max(1, round(total / float((lengths**2).sum() / total)))
    length = round(total / count)
    size = int(loaded.model.config.get_text_config().vocab_size)
    tokens_BT = torch.from_numpy(np.random.default_rng(seed).integers(1, size, (count, length))).to(loaded.device)
    shapes = sorted({min(count, max(1, budget // length)) for budget in _budgets()})
    speeds: dict[int, float] = {}
    for rows in shapes:
        some_BT = tokens_BT[: max(rows, _TRIED // length // rows * rows)]
        passes = _passes(loaded, layer, some_BT, rows)
        if not speeds:
            passes()
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            passes()
            seconds.append(time.perf_counter() - start)
        speeds[rows] = some_BT.numel() / min(seconds)
    best = max(speeds, key=lambda rows: speeds[rows])
    note("limit: " + ", ".join(f"{rows} x {length}: {speed:,.0f} tokens/s" for rows, speed in speeds.items()))
    return Limit(_passes(loaded, layer, tokens_BT, best), np.full(count, length), best)


def pass_flops(loaded: LoadedModel, layer: int, lengths: npt.NDArray[np.int64]) -> float:
    """Floating-point operations of a pass to a layer: two for each weight and token, and causal attention.

    Counted are weights that every token meets: for a mixture of experts too much, which no geometry here is.
    """
    weights = sum(p.numel() for block in loaded.blocks[: layer + 1] for p in block.parameters() if p.ndim == 2)
    config = loaded.model.config.get_text_config()
    heads = int(config.num_attention_heads)
    width = heads * int(getattr(config, "head_dim", None) or loaded.d_model // heads)
    # Scores and mixed values, two operations each, over half of the pairs.
    attention = 2 * width * float((lengths.astype(np.float64) ** 2).sum()) * (layer + 1)
    return 2.0 * weights * int(lengths.sum()) + attention


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Floating-point operations per second of a large matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    took = []
    for _ in range(10):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        took.append(time.perf_counter() - start)
    return float(2 * size**3 / min(took))


def _budgets() -> list[int]:
    budgets, budget = [], _LEAST_TOKENS
    while budget <= _MOST_TOKENS:
        budgets.append(budget)
        budget *= 2
    return budgets


def _passes(loaded: LoadedModel, layer: int, tokens_BT: torch.Tensor, rows: int) -> Callable[[], None]:
    def run() -> None:
        for start in range(0, len(tokens_BT), rows):
            inputs = {"input_ids": tokens_BT[start : start + rows]}
            run_to(loaded, [layer], _nothing, Batch(inputs, np.zeros(0, np.int64), np.zeros(0, np.int64), 0, False))
        _wait(loaded.device)

    return run


def _nothing(_layer: int, _hidden: Any) -> None:
    pass


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
