"""The published way to score: one trace at a time, logits and all hidden states, the probe applied afterwards.

What the kernel is held against, by ``--verify``, by the benchmark and by the tests.

Shape suffixes: T scored tokens of one trace, Q probes, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from clifflab.models.hooks import capture
from clifflab.models.loading import LoadedModel
from clifflab.science.cliff import MEASURES, measure
from clifflab.science.stats import Floats
from clifflab.scoring.measures import Found, Reads, Tokens
from clifflab.scoring.probes import ProbeSet
from clifflab.scoring.types import NOT_FINITE
from clifflab.text.spans import Spans


def score_plain(
    loaded: LoadedModel,
    probes: ProbeSet,
    window: tuple[float, float],
    ids: Sequence[Tokens],
    spans: Sequence[Spans],
) -> Found:
    """Score traces one by one.

    Args:
        loaded: The model.
        probes: The probes.
        window: The plateau's part of the thinking.
        ids: Token ids of each trace; the response is not run.
        spans: Their borders.
    """
    reads = Reads.of(spans, window)
    found = Found.empty(reads, len(probes))
    end = 0
    for n, (row, span) in enumerate(zip(ids, spans, strict=True)):
        start, end = end, end + span.closing_tokens
        logits_QT = plain_logits(loaded, probes, row, span)
        found.tokens += span.response_start
        read = reads.take(np.array([n])).positions(np.zeros(1, dtype=np.int64)) - span.scored.start
        if not np.isfinite(logits_QT[:, read]).all():  # what no measure reads may be anything
            found.problem[n] = NOT_FINITE
            continue
        measured = measure(logits_QT[None], span.thinking_tokens, window)
        values = [kind[name][0] for kind in (measured.scores, measured.logits) for name in MEASURES]
        found.measures[n] = np.stack(values, -1)
        found.drops[start:end] = measured.drops[0, :, : span.closing_tokens].T
        found.drops_logit[start:end] = measured.drops_logit[0, :, : span.closing_tokens].T
    return found


@torch.no_grad()
def plain_logits(loaded: LoadedModel, probes: ProbeSet, ids: Tokens, span: Spans) -> Floats:
    """Logits of every probe at the scored tokens of one trace, ``[Q, T]``, from a full pass by the library's defaults.

    The model's own list ends with the last state after the final norm, which is no ``h_l`` (SPEC section 2): the state
    after the last block is captured beside it.
    """
    last = len(loaded.blocks) - 1
    own: list[torch.Tensor] = []
    row = torch.tensor([list(ids[: span.response_start])], device=loaded.device)
    with capture(loaded.blocks, [last], lambda _, hidden: own.append(hidden)):
        output = loaded.model(input_ids=row, output_hidden_states=True)
    states = [*output.hidden_states[1:-1], own[0]]
    scored = slice(span.scored.start, span.scored.stop)
    logits = []
    for probe in probes.probes:
        states_TD = states[probe.layer][0, scored].float()
        weight_D = torch.from_numpy(probe.weight).to(states_TD.device)
        logits.append((states_TD @ weight_D + probe.bias).cpu().numpy())
    return np.stack(logits)
