"""Forward passes over batches of whole traces, reading hidden states at just the positions asked for.

Shape suffixes: B traces, T tokens, N positions of one trace, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch

from clifflab.errors import InputError
from clifflab.models.hooks import capture
from clifflab.models.loading import LoadedModel
from clifflab.pulse import beat

T = TypeVar("T")
R = TypeVar("R")
Padding = Literal["left", "right"]
OnStates = Callable[[int, int, torch.Tensor], None]
_NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "not enough memory")


@torch.inference_mode()
def states_at(
    loaded: LoadedModel,
    ids: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    layers: Sequence[int],
    on_states: OnStates,
    padding: Padding = "right",
) -> None:
    """One forward pass without the output head; hands out residual states layer by layer.

    Args:
        loaded: The model.
        ids: Token ids of the batch, one row a trace.
        positions: Token positions wanted of each row, counted from the row's first token.
        layers: Blocks after which to read.
        on_states: Called as ``on_states(row, layer, states_ND)`` with float32 states on the model's device.
        padding: Side of the padding; results agree to float tolerance.
    """
    width = max(len(row) for row in ids)
    tokens_BT = torch.full((len(ids), width), loaded.pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(ids), width), dtype=torch.long)
    starts = [width - len(row) if padding == "left" else 0 for row in ids]
    for b, (row, start) in enumerate(zip(ids, starts, strict=True)):
        tokens_BT[b, start : start + len(row)] = torch.tensor(row)
        mask_BT[b, start : start + len(row)] = 1
    where = [torch.tensor(list(p), device=loaded.device) + s for p, s in zip(positions, starts, strict=True)]

    def on_block(layer: int, hidden_BTD: torch.Tensor) -> None:
        for b, index_N in enumerate(where):
            # A model over several GPUs has its blocks on all of them.
            states_ND = hidden_BTD[b, index_N.to(hidden_BTD.device)].float().to(loaded.device)
            if not torch.isfinite(states_ND).all():
                raise not_finite(loaded, f"residual states after block {layer}")
            on_states(b, layer, states_ND)

    beat()
    with capture(loaded.blocks, layers, on_block):
        loaded.body(
            input_ids=tokens_BT.to(loaded.device),
            attention_mask=mask_BT.to(loaded.device),
            position_ids=position_ids(mask_BT).to(loaded.device),
            use_cache=False,
        )


class NotFiniteError(InputError):
    """A model yields NaN or infinity: nothing computed from it would mean anything."""


def not_finite(loaded: LoadedModel, what: str) -> NotFiniteError:
    """The error of a model that yields NaN or infinity."""
    remedy = "use dtype bfloat16 or float32, or check the checkpoint"
    return NotFiniteError("models", loaded.spec.name, f"yields numbers that are not finite ({what})", remedy)


def position_ids(mask_BT: torch.Tensor) -> torch.Tensor:
    """Positions counted from each row's first real token, ``[B, T]``; padding sits at position 0."""
    return (mask_BT.cumsum(-1) - 1).clamp_min(0)


def no_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def split_on_oom(run: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> list[R]:
    """Run a batch; when the GPU's memory is too small for it, run its halves.

    Raises:
        torch.OutOfMemoryError: A single item does not fit.
    """
    try:
        return run(items)
    except torch.OutOfMemoryError:
        if len(items) <= 1:
            raise
    # Outside the handler: the traceback no longer holds the failed pass's tensors.
    torch.cuda.empty_cache()
    half = len(items) // 2
    return split_on_oom(run, items[:half]) + split_on_oom(run, items[half:])
