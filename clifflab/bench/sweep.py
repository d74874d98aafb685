"""``clifflab bench sweep``: every way to sweep heads against the published one, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clifflab.bench.geometries import PREFIX, random_model
from clifflab.bench.records import Record, UnequalResultsError, timed
from clifflab.config import ModelSpec
from clifflab.errors import InputError
from clifflab.models.heads import Head, HeadMap, find_heads
from clifflab.models.intervene import Intervention
from clifflab.models.lens import make_lens
from clifflab.models.loading import LoadedModel, load
from clifflab.sweep import Meter, SweepTrace, attribution, direct_effects, sweep
from clifflab.sweep.plain import plain_sweep

METHODS = ("plain", "closing", "all", "direct", "attribution")
_SHARE, _MOST = 0.01, 1e-4  # of the largest plain result, and at most this, in float32
_HALF_SHARE = 0.25  # in half precision, whose rounding moves the plain way itself


@dataclass(frozen=True)
class SweepBench:
    """What to run.

    Attributes:
        model: ``geometry:NAME`` (random weights), or anything that a study takes as a model's path.
        dtype: Of the weights; ``auto`` is bfloat16 on a GPU and float32 on a CPU.
        traces: Traces of one run.
        tokens: Tokens of a trace before its closing tokens.
        closing: Closing tokens.
        plain_heads: Heads of the plain sweep, spread over the layers; its time counts for all heads in proportion.
        repeats: Timed rounds.
        methods: Which ways; the plain one is always among them.
        seed: Of tokens and random weights.
    """

    model: str = PREFIX + "smollm2-135m"
    dtype: str = "auto"
    traces: int = 8
    tokens: int = 256
    closing: int = 4
    plain_heads: int = 3
    repeats: int = 5
    methods: tuple[str, ...] = ("plain", "closing", "direct", "attribution")
    seed: int = 0


def bench_sweep(settings: SweepBench, note: Callable[[str], None]) -> list[Record]:
    """Run the benchmark.

    Args:
        settings: What to run.
        note: Told of the progress.

    Raises:
        UnequalResultsError: A fast way's results differ from the plain way's.
    """
    loaded = _load(settings)
    heads = find_heads(loaded)
    if settings.tokens + settings.closing > loaded.context:
        remedy = f"give at most {loaded.context - settings.closing}"
        raise InputError("--tokens", settings.tokens, f"the model reads {loaded.context} tokens", remedy)
    traces, meter = _traces(loaded, settings), _meter(loaded, settings.seed)
    every = list(heads)
    few = [every[i] for i in np.linspace(0, len(every) - 1, settings.plain_heads).round().astype(int)]
    note(f"{len(every)} heads, {settings.traces} traces of {settings.tokens} + {settings.closing} tokens")
    ways = {name: _way(name, loaded, heads, traces, meter, every, few) for name in ("plain", *settings.methods)}
    differences = _compare(loaded, heads, traces, meter, ways, every, few, note)
    times = timed(ways, settings.repeats, loaded.device, note)
    # The plain way is a full pass a head and one for the unchanged model; so it is for all heads.
    full_pass = times["plain"].median / (len(few) + 1)
    whole = full_pass * (len(every) + 1)
    swept = {name: len(few) if name == "plain" else len(every) for name in ways}
    length = settings.tokens + settings.closing
    return [
        Record(
            bench="sweep",
            model=settings.model,
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            method=name,
            tokens=length,
            repeats=settings.repeats,
            seconds_median=time.median,
            tokens_per_second=settings.traces * length * (swept[name] + 1) / time.median,
            ratio_to_plain=1.0 if name == "plain" else whole / time.median,
            max_abs_diff=differences[name],
            peak_memory_bytes=time.peak,
        )
        for name, time in times.items()
    ]


def _load(settings: SweepBench) -> LoadedModel:
    if not settings.model.startswith(PREFIX):
        return load(ModelSpec(name="bench", path=settings.model, dtype=settings.dtype, thinking_format="none"))  # type: ignore[arg-type]
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return random_model(settings.model, dtype, settings.seed)


def _traces(loaded: LoadedModel, settings: SweepBench) -> list[SweepTrace]:
    rng = np.random.default_rng(settings.seed)
    size = int(loaded.model.config.get_text_config().vocab_size)
    length = settings.tokens + settings.closing
    ids = rng.integers(1, size, (settings.traces, length)).tolist()
    return [SweepTrace(tuple(row), settings.tokens) for row in ids]


def _meter(loaded: LoadedModel, seed: int) -> Meter:
    """A random direction two thirds up the model, and log-odds of two sets of tokens."""
    lens = make_lens(loaded, range(10, 18), range(20, 28))
    if lens is None:
        raise InputError("--model", loaded.spec.path, "has no final norm and output head", "take another model")
    rng = np.random.default_rng(seed)
    weights = torch.tensor(rng.standard_normal((1, loaded.d_model)) / np.sqrt(loaded.d_model), dtype=torch.float32)
    return Meter((2 * len(loaded.blocks) // 3,), weights.to(loaded.device), torch.zeros(1), lens)


def _way(
    name: str, loaded: LoadedModel, heads: HeadMap, traces: Sequence[SweepTrace], meter: Meter, every: list[Head],
    few: list[Head],
) -> Callable[[], Any]:  # fmt: skip
    removal = Intervention()
    if name == "plain":
        sets = [[head] for head in few]
        return lambda: plain_sweep(loaded, heads, traces, sets, meter, removal, "closing", published=True)
    if name in ("closing", "all"):
        sets = [[head] for head in every]
        return lambda: [sweep(loaded, heads, trace, sets, meter, removal, name) for trace in traces]  # type: ignore[arg-type]
    if name == "direct":
        return lambda: [direct_effects(loaded, heads, trace, meter) for trace in traces]
    return lambda: [attribution(loaded, heads, trace, meter, removal, "closing") for trace in traces]


def _compare(
    loaded: LoadedModel, heads: HeadMap, traces: Sequence[SweepTrace], meter: Meter, ways: dict[str, Any],
    every: list[Head], few: list[Head], note: Callable[[str], None],
) -> dict[str, float]:  # fmt: skip
    """Largest difference of each way from the plain one, which also warms everything up.

    Direct effects are held against the probe's logit, which they must add up to, and the first-order estimate against
    gradients through whole sequences.

    Raises:
        UnequalResultsError: A difference that is not small beside the results themselves.
    """
    where = [every.index(head) for head in few]
    removal, half = Intervention(), loaded.model.dtype != torch.float32
    share, most = (_HALF_SHARE, np.inf) if half else (_SHARE, _MOST)
    found = {"plain": 0.0}
    for name, way in ways.items():
        note(f"comparing {name}")
        got = way()
        if name == "plain":
            plain = got
            continue
        if name in ("closing", "all"):
            sets = [[head] for head in few]
            wanted = plain if name == "closing" else plain_sweep(loaded, heads, traces, sets, meter, removal, "all")
            pairs = [(own.effects[where], reference.effects) for own, reference in zip(got, wanted, strict=True)]
        elif name == "direct":
            pairs = [(own.total() + meter.biases.numpy(), own.logits) for own in got]
        else:
            whole = [attribution(loaded, heads, trace, meter, removal, "closing", share=False) for trace in traces]
            pairs = list(zip(got, whole, strict=True))
        own, reference = (np.concatenate([np.ravel(pair[side]) for pair in pairs]) for side in (0, 1))
        if not (np.isnan(own) == np.isnan(reference)).all():
            raise UnequalResultsError(f"bench sweep: {name} has no number where plain has one, or the reverse")
        found[name] = float(np.nanmax(np.abs(own - reference)))
        limit = min(share * float(np.nanmax(np.abs(reference))), most)
        if not found[name] <= limit:
            problem = f"bench sweep: {name} differs from plain by {found[name]:.2g}, more than {limit:.2g}"
            raise UnequalResultsError(problem)
    return found
