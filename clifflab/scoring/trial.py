"""What a model allows, found by trying it: packed rows, and a last probed block at just the read tokens.

The trial's row is as long as real ones will be, and its shortest traces stand behind all others: attention that goes by
a token's place in the row shows there. Its longest trace is longer than every attention window that fits into the row.
A trace that fills a row by itself is never packed, so longer windows cannot matter.

Shape suffixes: D width of the residual stream, K compared tokens of all traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clifflab.errors import InputError
from clifflab.models.forward import no_memory
from clifflab.models.loading import LoadedModel
from clifflab.scoring.forward import Batch, Ways, pack, pad, run_to
from clifflab.scoring.measures import Ints
from clifflab.scoring.packed import PackedAttention, configs_of
from clifflab.scoring.trim import Trim

# Largest difference of a state from the same state alone, beside its length, that rounding explains.
TOLERANCE = {torch.bfloat16: 6e-2, torch.float16: 1e-2}
_SHORT = (13, 5, 5, 3, 1)  # tokens of the shortest traces
_LEAST, _MOST_CPU, _MOST_GPU = 64, 4096, 16384  # tokens of the row in front of them
_FIRST = 0.6  # of these the longest trace
_PAST = 9  # tokens that it goes beyond a window
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")

_Row = npt.NDArray[np.int64]


def find_ways(loaded: LoadedModel, layers: Sequence[int], mode: str, budget: int) -> Ways:
    """What the model allows, by a trial.

    It runs about 1.6 times the budget in tokens, where that is at most 4,096 on a CPU and 16,384 on a GPU.

    Args:
        loaded: The model.
        layers: Probed layers, ascending.
        mode: ``packed``, ``padded``, or ``auto``: packed where a trial gives every trace the states that it has alone.
        budget: Tokens that a pass is meant to have.

    Raises:
        InputError: ``packed``, and the trial fails.
    """
    borders = length_borders(loaded)
    trial = _Trial(loaded, layers, min([loaded.context, *borders]))
    short = trial.rows(_SHORT)
    trim: Trim | None = Trim(loaded, layers[-1])
    untrimmed = trial.failure(short, lambda: Ways(trim=trim))
    trim = None if untrimmed else trim
    if mode == "padded":
        return Ways(trim=trim, borders=borders, unpacked="padding was asked for", untrimmed=untrimmed)
    most = _MOST_GPU if loaded.device.type == "cuda" else _MOST_CPU
    tried = min(max(budget, _LEAST), most)
    # The few short ones first: what no model of a kind can do costs little to find out.
    unpacked = trial.failure(short, lambda: Ways(PackedAttention(loaded)))
    if not unpacked:
        first, *others = trial.rows(trial.sizes(tried))
        whole = [first, *others, *short]
        unseen = range(1, 1 + len(others))  # they fill the row: to run each alone as well would cost time
        unpacked = trial.failure(whole, lambda: Ways(PackedAttention(loaded), trim), unseen)
        if unpacked and trim and not trial.failure(whole, lambda: Ways(PackedAttention(loaded)), unseen):
            trim, untrimmed, unpacked = None, unpacked, ""
    if not unpacked:
        return Ways(PackedAttention(loaded), trim, tried, borders, untrimmed=untrimmed)
    if mode == "packed":
        raise InputError("models.path", loaded.spec.path, f"cannot be packed ({unpacked})", "score it padded")
    return Ways(trim=trim, borders=borders, unpacked=unpacked, untrimmed=untrimmed)


def length_borders(loaded: LoadedModel) -> tuple[int, ...]:
    """Lengths up to which, and beyond which, the model treats every token of a batch differently, ascending.

    With ``longrope`` the longest position of a batch chooses between two sets of rotary frequencies for all of it.
    """
    found = set()
    for config in configs_of(loaded):
        for name in ("rope_parameters", "rope_scaling"):
            for rope in _dicts(getattr(config, name, None)):
                if "longrope" in (rope.get("rope_type"), rope.get("type")):
                    own = rope.get("original_max_position_embeddings")
                    own = own or getattr(config, "original_max_position_embeddings", None)
                    found.add(int(own or config.max_position_embeddings))
    return tuple(sorted(found))


class _Trial:
    """Random traces and the states that each has alone."""

    def __init__(self, loaded: LoadedModel, layers: Sequence[int], longest: int) -> None:
        self._loaded, self._layers, self._longest = loaded, layers, longest
        self._rng = np.random.default_rng(0)
        self._wanted: dict[int, dict[int, torch.Tensor]] = {}

    def sizes(self, tokens: int) -> list[int]:
        """Tokens of each of the traces that fill a row of so many: the longest first."""
        windows = [
            _PAST + int(getattr(config, name, 0) or 0) for config in configs_of(self._loaded) for name in _WINDOWS
        ]
        first = max(int(_FIRST * tokens), *(window for window in windows if window <= tokens), _PAST)
        first = min(first, self._longest)
        return [min(first, tokens - start) for start in range(0, tokens, first)]

    def rows(self, sizes: Sequence[int]) -> list[_Row]:
        """Traces of these lengths, or of the longest that the model can take."""
        vocabulary = self._loaded.model.config.get_text_config().vocab_size
        return [self._rng.integers(0, vocabulary, min(size, self._longest)) for size in sizes]

    def failure(self, rows: Sequence[_Row], make: Callable[[], Ways], unseen: Sequence[int] = ()) -> str:
        """What is wrong with the states of traces in one batch; empty where they are those of each alone.

        Args:
            rows: The traces.
            make: What is tried.
            unseen: Which of the traces are not compared.

        Raises:
            Exception: A trace alone cannot be run, or memory ran out.
        """
        wanted = [{} if place in unseen else self._alone(row) for place, row in enumerate(rows)]
        try:
            return self._problem(rows, wanted, make())
        except Exception as error:  # whatever an architecture does with a packed row: it cannot be packed
            if no_memory(error):
                raise
            return f"{type(error).__name__}: {error}".split("\n")[0][:200]

    def _problem(self, rows: Sequence[_Row], wanted: Sequence[dict[int, torch.Tensor]], ways: Ways) -> str:
        batch = pack(rows) if ways.packing else pad(rows, self._loaded.pad_id)
        places_K = np.concatenate(
            [start + _compared(len(row)) for start, row, own in zip(batch.starts, rows, wanted, strict=True) if own]
        )
        off: dict[int, float] = {}

        def compare(layer: int, found_KD: torch.Tensor) -> None:
            wanted_KD = torch.cat([states[layer] for states in wanted if states]).to(found_KD.device)
            length_K = wanted_KD.norm(dim=-1).clamp_min(1e-6)
            # Where a trace alone is not finite (a damaged embedding), nothing can be compared.
            fine_K = wanted_KD.isfinite().all(-1)
            off_K = (found_KD - wanted_KD).norm(dim=-1) / length_K
            off[layer] = float(off_K[fine_K].max()) if fine_K.any() else float("nan")

        self._run(batch, ways, places_K, compare)
        most = TOLERANCE.get(self._loaded.model.dtype, 1e-3)
        wrong = [layer for layer in self._layers if not off[layer] <= most]
        return f"states after block {wrong[0]} differ by {off[wrong[0]]:.2g} of their length" if wrong else ""

    def _alone(self, row: _Row) -> dict[int, torch.Tensor]:
        """Compared states of one trace after each layer, on the CPU."""
        if id(row) not in self._wanted:
            states = self._wanted[id(row)] = {}

            def keep(layer: int, found_KD: torch.Tensor) -> None:
                states[layer] = found_KD.cpu()

            self._run(pad([row], self._loaded.pad_id), Ways(), _compared(len(row)), keep)
        return self._wanted[id(row)]

    def _run(self, batch: Batch, ways: Ways, places_K: Ints, see: Callable[[int, torch.Tensor], None]) -> None:
        kept_K = torch.from_numpy(places_K).to(self._loaded.device)

        def read(layer: int, hidden_BTD: torch.Tensor) -> None:
            see(layer, hidden_BTD.flatten(0, 1).index_select(0, kept_K.to(hidden_BTD.device)).float())

        run_to(self._loaded, self._layers, read, batch, ways, kept_K if ways.trim else None)


def _compared(length: int) -> Ints:
    """Places of a trace that are compared: the last one, a third of those near it, and some of the others."""
    back = np.arange(length)
    near = (back % 3 == 0) & (back < 96)
    return length - 1 - np.flatnonzero(near | (back % 16 == 0))[::-1]


def _dicts(found: Any) -> Iterator[dict[str, Any]]:
    """A dictionary and those within it (settings by the kind of layer)."""
    if isinstance(found, dict):
        yield found
        for part in found.values():
            yield from _dicts(part)
