"""The scoring kernel: one pass over each batch up to the last probed layer, probes applied at just the needed tokens.

No logits and no stored states. Traces are sorted by length and run in batches under a budget of tokens: packed into one
row without any padding where the model allows it (see :mod:`clifflab.scoring.packed`), else padded by less than 5%.

Shape suffixes: N traces, R read positions, Q probes, D width of the residual stream.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from clifflab.models.forward import no_memory
from clifflab.models.loading import LoadedModel
from clifflab.scoring.forward import Batch, Ways, pack, pad, run_to
from clifflab.scoring.measures import Found, Ints, Reads, Tokens
from clifflab.scoring.probes import ProbeSet
from clifflab.scoring.trial import find_ways
from clifflab.scoring.types import TOO_LONG
from clifflab.text.spans import Spans

Mode = Literal["auto", "packed", "padded"]
MOST_PADDING = 0.05
# Tokens of a pass. A CPU is fastest while a batch's activations stay in its cache; a GPU wants to be filled.
CPU_BUDGET, GPU_BUDGET = 1024, 8192
_LEAST_BUDGET = 64  # where memory does not suffice for a trial of so few tokens, the model cannot be run


class Kernel:
    """Scores batches of traces; holds the probes on the model's device.

    Args:
        loaded: The model. It is left as it was.
        probes: The probes, Q of them.
        window: The plateau's part of the thinking.
        token_budget: Tokens of one pass; a longer trace runs alone.
        mode: ``packed`` (no padding), ``padded``, or ``auto``: packed where a trial gives the states of the plain way.

    Attributes:
        mode: ``packed`` or ``padded``.
        reason: Why it is padded; empty where it is packed.
        trimmed: Whether the last probed block runs at just the tokens that it must.
        trim_reason: Why it runs at all of them; empty where it is trimmed.
        budget: Tokens of one pass; halved, for good, whenever memory runs out. Packed, at most what the trial had.

    Raises:
        InputError: ``packed`` was asked for, and the model does not allow it.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        probes: ProbeSet,
        window: tuple[float, float],
        token_budget: int | None = None,
        mode: Mode = "auto",
    ) -> None:
        self._loaded, self._probes, self._window = loaded, probes, window
        self.budget = token_budget or (GPU_BUDGET if loaded.device.type == "cuda" else CPU_BUDGET)
        self._ways = self._find_ways(mode)
        self.mode: Literal["packed", "padded"] = "packed" if self._ways.packing else "padded"
        self.reason, self.trimmed, self.trim_reason = self._ways.unpacked, bool(self._ways.trim), self._ways.untrimmed
        if self._ways.packing:
            self.budget = min(self.budget, self._ways.tried)
        self._readers: dict[int, tuple[list[int], torch.Tensor, torch.Tensor]] = {}
        for layer in probes.layers:
            places = probes.on(layer)
            weights_QD = torch.from_numpy(np.stack([probes.probes[q].weight for q in places]))
            biases_Q = torch.tensor([probes.probes[q].bias for q in places])
            self._readers[layer] = places, weights_QD.to(loaded.device), biases_Q.to(loaded.device)

    def score(self, ids: Sequence[Tokens], spans: Sequence[Spans]) -> Found:
        """Score traces; the results are in their order and depend on the batches by rounding alone.

        Args:
            ids: Token ids of each trace; the response, where there is one, is not run.
            spans: Their borders.
        """
        reads = Reads.of(spans, self._window)
        found = Found.empty(reads, len(self._probes))
        lengths = np.fromiter((span.response_start for span in spans), dtype=np.int64, count=len(spans))
        order = np.argsort(-lengths, kind="stable")  # the longest first: what memory it takes is known early
        done, again = 0, False
        while done < len(order):
            chosen = order[done : done + self._fitting(lengths[order[done:]])]
            batch = self._batch([np.asarray(ids[n][: lengths[n]], dtype=np.int64) for n in chosen])
            own = reads.take(chosen)
            logits_RQ = self._attempt(batch, own)
            if logits_RQ is not None:
                found.put(chosen, own, logits_RQ)
                found.tokens += int(batch.lengths.sum())
                found.padding += batch.padding
                done, again = done + len(chosen), False
            elif len(chosen) > 1:
                self.budget = max(1, min(self.budget, int(batch.lengths.sum())) // 2)
            elif not again:  # memory was freed: once more
                again = True
            else:
                found.problem[chosen[0]] = TOO_LONG
                done, again = done + 1, False
        return found

    def _find_ways(self, mode: Mode) -> Ways:
        """The trial, with a smaller budget where memory does not suffice for it."""
        while True:
            try:
                return find_ways(self._loaded, self._probes.layers, mode, self.budget)
            except (RuntimeError, MemoryError) as error:
                if not no_memory(error) or self.budget <= _LEAST_BUDGET:
                    raise
            self._free()
            self.budget //= 2

    def _fitting(self, lengths: Ints) -> int:
        """How many of the traces, longest first, make the next batch; at least one."""
        for border in self._ways.borders:
            if lengths[0] > border:
                lengths = lengths[: np.searchsorted(-lengths, -border)]
        if self._ways.packing:
            return max(1, int(np.searchsorted(np.cumsum(lengths), self.budget, side="right")))
        within = lengths[: max(1, self.budget // int(lengths[0]))]
        share = 1 - np.cumsum(within) / (lengths[0] * np.arange(1, len(within) + 1))
        return int(np.flatnonzero(share < MOST_PADDING)[-1]) + 1

    def _batch(self, rows: list[npt.NDArray[np.int64]]) -> Batch:
        # A trace by itself goes the model's own way: how long it is need not have been tried.
        return pack(rows) if self._ways.packing and len(rows) > 1 else pad(rows, self._loaded.pad_id)

    def _attempt(self, batch: Batch, reads: Reads) -> npt.NDArray[np.float32] | None:
        """Probe logits ``[R, Q]`` at the read positions of a batch; ``None`` where memory does not suffice."""
        try:
            return self._run(batch, reads)
        except (RuntimeError, MemoryError) as error:  # torch's own out-of-memory error is a RuntimeError
            if not no_memory(error):
                raise
        # Outside the handler: the traceback no longer holds the failed pass's tensors.
        self._free()
        return None

    def _free(self) -> None:
        gc.collect()
        if self._loaded.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _run(self, batch: Batch, reads: Reads) -> npt.NDArray[np.float32]:
        device = self._loaded.device
        positions = reads.positions(batch.starts)
        at_R, kept_K = (torch.from_numpy(places).to(device) for places in (positions, np.unique(positions)))
        logits_RQ = torch.empty((len(at_R), len(self._probes)), device=device)

        def read(layer: int, hidden: torch.Tensor) -> None:
            places, weights_QD, biases_Q = self._readers[layer]
            # A model over several GPUs has its blocks on all of them.
            states_RD = hidden.flatten(0, 1).index_select(0, at_R.to(hidden.device)).float().to(device)
            logits_RQ[:, places] = torch.addmm(biases_Q, states_RD, weights_QD.T)

        run_to(self._loaded, self._probes.layers, read, batch, self._ways, kept_K)
        return logits_RQ.cpu().numpy()
