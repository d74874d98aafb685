"""A pass over traces that ends after the last probed layer, on a packed row or on padded rows.

Shape suffixes: B rows, T tokens of a row, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clifflab.models.forward import position_ids
from clifflab.models.loading import LoadedModel
from clifflab.scoring.measures import Ints, ranges
from clifflab.scoring.packed import PackedAttention
from clifflab.scoring.trim import Trim

Read = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class Batch:
    """Traces of one pass.

    Attributes:
        inputs: What the model is called with.
        lengths: Tokens of each trace.
        starts: Where each begins when all rows are laid side by side.
        padding: Tokens of padding.
        packed: Whether all are in one row.
    """

    inputs: dict[str, torch.Tensor]
    lengths: Ints
    starts: Ints
    padding: int
    packed: bool


def pack(rows: Sequence[npt.NDArray[np.int64]]) -> Batch:
    """Traces side by side in one row."""
    lengths = np.array([len(row) for row in rows])
    tokens = torch.from_numpy(np.concatenate(rows))[None]
    places = torch.from_numpy(ranges(np.zeros_like(lengths), lengths))[None]
    # A mask of ones: without it the library would look for packed rows itself, and make one large mask of them.
    inputs = {"input_ids": tokens, "position_ids": places, "attention_mask": torch.ones_like(tokens)}
    return Batch(inputs, lengths, np.cumsum(lengths) - lengths, 0, packed=True)


def pad(rows: Sequence[npt.NDArray[np.int64]], pad_id: int) -> Batch:
    """A row for each trace, padded at its end."""
    lengths = np.array([len(row) for row in rows])
    width = int(lengths.max())
    tokens = np.full((len(rows), width), pad_id, dtype=np.int64)
    for row, own in zip(tokens, rows, strict=True):
        row[: len(own)] = own
    mask = torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64))
    inputs = {"input_ids": torch.from_numpy(tokens), "position_ids": position_ids(mask), "attention_mask": mask}
    return Batch(inputs, lengths, np.arange(len(rows)) * width, tokens.size - int(lengths.sum()), packed=False)


@dataclass(frozen=True)
class Ways:
    """What a trial has shown that a model allows.

    Attributes:
        packing: Its attention for packed rows; ``None`` where batches are padded.
        trim: Its last probed block at just the read tokens; ``None`` where it runs at all of them.
        tried: Tokens up to which a packed row was tried.
        borders: Lengths that no pass may have traces on both sides of: one up to it and one beyond it.
        unpacked: Why it is not packed.
        untrimmed: Why it is not trimmed.
    """

    packing: PackedAttention | None = None
    trim: Trim | None = None
    tried: int = 0
    borders: tuple[int, ...] = ()
    unpacked: str = ""
    untrimmed: str = ""


@torch.inference_mode()
def run_to(
    loaded: LoadedModel,
    layers: Sequence[int],
    read: Read,
    batch: Batch,
    ways: Ways = Ways(),
    kept: torch.Tensor | None = None,
) -> None:
    """Run a batch up to the last of some layers.

    Args:
        loaded: The model; it is left as it was.
        layers: Ascending.
        read: Called as ``read(layer, hidden_BTD)`` with the residual stream after each.
        batch: The traces.
        ways: What the model allows.
        kept: Places of the tokens that are read, among those of all rows; the state of others after the last layer may
            be anything. ``None`` is all.
    """

    def fire(layer: int, hidden: torch.Tensor) -> None:
        read(layer, hidden)
        if layer == layers[-1]:
            raise _LastLayer

    inputs = {name: part.to(loaded.device) for name, part in batch.inputs.items()}
    apart = ways.packing.apart(batch.lengths.tolist()) if ways.packing and batch.packed else nullcontext()
    trimmed = nullcontext() if ways.trim is None or kept is None else ways.trim.to(kept, inputs["input_ids"].numel())
    with apart, trimmed, _hooks(loaded, layers, fire):
        try:
            loaded.body(**inputs, use_cache=False)
        except _LastLayer:
            return
    raise AssertionError("the last probed layer never ran")


class _LastLayer(Exception):  # noqa: N818 - no error: it ends a pass whose work is done
    """The last probed layer was read."""


@contextmanager
def _hooks(loaded: LoadedModel, layers: Sequence[int], fire: Read) -> Iterator[None]:
    def hook(layer: int) -> Callable[[Any, Any, Any], None]:
        def after(_module: Any, _inputs: Any, output: Any) -> None:
            fire(layer, output[0] if isinstance(output, tuple) else output)

        return after

    handles = [loaded.blocks[layer].register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
