"""From bare prompts to traces: the model writes them, and they are scored in the same pass."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence

import pyarrow as pa
import torch

from clifflab.config import ScoreConfig, TracesConfig
from clifflab.engines import Completion, Request, TransformersEngine, row_seed
from clifflab.errors import TraceError
from clifflab.models.forward import NotFiniteError, no_memory
from clifflab.models.loading import LoadedModel
from clifflab.science.judges import judge
from clifflab.scoring.prepare import fit
from clifflab.scoring.ready import Ready, bare_prompts, ready_table, trace_id
from clifflab.scoring.types import CLOSING_MISSING, NOT_FINITE, TOO_LONG, Prepared, Reject
from clifflab.stages.traces import spans_written


def complete(
    loaded: LoadedModel, prepared: Prepared, sampling: TracesConfig, seed: int, set_name: str, settings: ScoreConfig
) -> tuple[pa.Table, list[Reject]]:
    """Write a trace to every prompt of a block.

    A trace depends on its prompt, its id and the seed, not on the block's other rows (but for rounding, which may turn
    a choice between two tokens that are all but equally probable). Prompts of about equal length share a batch.

    Args:
        loaded: The model.
        prepared: A block of bare prompts.
        sampling: How traces are written; one a prompt, whatever ``samples`` says.
        seed: The job's.
        set_name: Name of the corpus.
        settings: What becomes of long traces, and whether texts are kept.

    Returns:
        ``tables.READY`` in the order of the input, and the prompts whose trace cannot be scored. A prompt at which the
        model yields numbers that are not finite, or that alone does not fit into memory, is one of these.
    """
    prompts = bare_prompts(prepared.table)
    limit = min(loaded.context, settings.max_tokens or loaded.context)
    written: dict[int, Ready | TraceError] = {}
    engine = TransformersEngine(loaded)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].ids))
    for start in range(0, len(order), sampling.batch_size):
        places = order[start : start + sampling.batch_size]
        requests = [_request(loaded, prompts[place], sampling, seed, set_name) for place in places]
        for place, completion in zip(places, _write(engine, requests, sampling), strict=True):
            try:
                if isinstance(completion, TraceError):
                    raise completion
                written[place] = fit(
                    _trace(loaded, prompts[place], completion, keep=settings.keep_traces), limit, settings
                )
            except TraceError as error:
                written[place] = error
    traces: list[Ready] = []
    rejects: list[Reject] = []
    for place, prompt in enumerate(prompts):
        found = written[place]
        if isinstance(found, Ready):
            traces.append(found)
            continue
        row = prompt.row - prepared.block.base
        rejects.append(Reject(prompt.row, prepared.source, row, prompt.id, found.reason, found.detail))
    return ready_table(traces), rejects


def _request(loaded: LoadedModel, prompt: Ready, sampling: TracesConfig, seed: int, set_name: str) -> Request:
    limit = min(sampling.max_new_tokens, loaded.context - len(prompt.ids))
    return Request(tuple(prompt.ids), row_seed(seed, trace_id(set_name, prompt.id)), limit)


def _write(
    engine: TransformersEngine, requests: Sequence[Request], sampling: TracesConfig, *, again: bool = True
) -> list[Completion | TraceError]:
    """Complete requests; a batch that cannot be completed is halved, down to the requests at fault.

    Args:
        engine: What writes.
        requests: The batch.
        sampling: How.
        again: Whether a request that does not fit into memory alone is tried once more, now that memory is free.
    """
    try:
        return list(engine.generate(requests, sampling))
    except NotFiniteError:
        fault = TraceError(NOT_FINITE, "the model's next-token logits are not finite")
    except (RuntimeError, MemoryError) as error:
        if not no_memory(error):
            raise
        tokens = f"{len(requests[0].prompt_ids)} tokens of the prompt and up to {requests[0].limit} more"
        fault = TraceError(TOO_LONG, f"{tokens} do not fit into memory")
    # Outside the handler: the traceback no longer holds the failed pass's tensors.
    if fault.reason == TOO_LONG and engine.loaded.device.type == "cuda":
        torch.cuda.empty_cache()
    if len(requests) > 1:
        half = len(requests) // 2
        return _write(engine, requests[:half], sampling) + _write(engine, requests[half:], sampling)
    if fault.reason == TOO_LONG and again:
        gc.collect()
        return _write(engine, requests, sampling, again=False)
    return [fault]


def _trace(loaded: LoadedModel, prompt: Ready, completion: Completion, *, keep: bool) -> Ready:
    spans = spans_written(loaded, prompt.ids, completion)
    if not spans.closed:
        raise TraceError(CLOSING_MISSING, f"the thinking did not end within {len(completion.ids)} tokens")
    ids = [*prompt.ids, *completion.ids]
    thinking, response = loaded.renderer.texts(ids, spans)
    found = dataclasses.replace(
        prompt, ids=ids, spans=spans, outcome=judge(response, True).outcome, finish_reason=completion.finish_reason
    )
    if keep:
        found.thinking, found.response = thinking, response
    return found
