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

from clifflab.errors import InputError
from clifflab.models.forward import position_ids
from clifflab.models.loading import LoadedModel
from clifflab.scoring.measures import Ints, ranges
from clifflab.scoring.packed import PackedAttention
from clifflab.scoring.trim import Trim

Read = Callable[[int, torch.Tensor], None]
# Largest difference of a packed state from the same state alone, beside its length, that rounding explains.
_TOLERANCE = {torch.bfloat16: 6e-2, torch.float16: 1e-2}
_TRIAL = (13, 5, 5, 3, 1)  # tokens of the trial's traces
_LONGEST_TRIAL = 300


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
    """

    packing: PackedAttention | None = None
    trim: Trim | None = None


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


def find_ways(loaded: LoadedModel, layers: Sequence[int], mode: str) -> Ways:
    """What the model allows, by a trial on a few short traces.

    Args:
        loaded: The model.
        layers: Probed layers.
        mode: ``packed``, ``padded``, or ``auto``: packed where a trial gives every trace the states that it has alone.

    Raises:
        InputError: ``packed``, and the trial fails.
    """
    trial, packing = _Trial(loaded, layers), None
    if mode != "padded":
        try:
            packing = PackedAttention(loaded)
            problem = trial.problem(Ways(packing))
        except Exception as error:  # noqa: BLE001 - whatever an architecture does with a packed row: it cannot be packed
            problem = f"{type(error).__name__}: {error}"
        if problem and mode == "packed":
            raise InputError("models.path", loaded.spec.path, f"cannot be packed ({problem})", "score it padded")
        packing = None if problem else packing
    trimmed = Ways(packing, Trim(loaded, layers[-1]))
    try:
        problem = trial.problem(trimmed)
    except Exception as error:  # noqa: BLE001 - as above
        problem = str(error) or repr(error)
    return Ways(packing) if problem else trimmed


class _Trial:
    """A few short traces and the states that each has alone."""

    def __init__(self, loaded: LoadedModel, layers: Sequence[int]) -> None:
        self._loaded, self._layers = loaded, layers
        config = loaded.model.config.get_text_config()
        window = getattr(config, "sliding_window", None) or 0
        longest = max(min(window + 9, _LONGEST_TRIAL, loaded.context) if window else 0, _TRIAL[0])
        rng = np.random.default_rng(0)
        self._rows = [rng.integers(0, config.vocab_size, size) for size in (longest, *_TRIAL[1:])]
        alone = [self._states(pad([row], loaded.pad_id), Ways()) for row in self._rows]
        self._wanted = {layer: torch.cat([states[layer] for states in alone]) for layer in layers}

    def problem(self, ways: Ways) -> str:
        """What is wrong with the states of all traces in one batch; empty where they are those of each alone."""
        batch = pack(self._rows) if ways.packing else pad(self._rows, self._loaded.pad_id)
        own = np.arange(int(batch.lengths.sum()))[:: 3 if ways.trim else 1]  # a third of the tokens is read
        kept = torch.from_numpy(ranges(batch.starts, batch.lengths)[own]).to(self._loaded.device)
        found = self._states(batch, ways, kept if ways.trim else None)
        for layer in self._layers:
            wanted = self._wanted[layer][own]
            length = wanted.norm(dim=-1).clamp_min(1e-6)
            off = float(((found[layer][kept] - wanted).norm(dim=-1) / length).max())
            if not off <= _TOLERANCE.get(self._loaded.model.dtype, 1e-3):
                return f"states after block {layer} differ by {off:.2g} of their length"
        return ""

    def _states(self, batch: Batch, ways: Ways, kept: torch.Tensor | None = None) -> dict[int, torch.Tensor]:
        """States of all tokens after each layer, ``[B x T, D]``, float32."""
        found: dict[int, torch.Tensor] = {}

        def read(layer: int, hidden_BTD: torch.Tensor) -> None:
            found[layer] = hidden_BTD.flatten(0, 1).float()

        run_to(self._loaded, self._layers, read, batch, ways, kept)
        return found


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
