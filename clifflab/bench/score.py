"""``clifflab bench score``: the scoring kernel against the published way and against a bare forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from clifflab.bench.geometries import PREFIX, random_model
from clifflab.bench.records import Record, Timing, UnequalResultsError, timed
from clifflab.bench.score_limit import best_limit, matmul_peak, pass_flops
from clifflab.config import ModelSpec
from clifflab.errors import InputError
from clifflab.models.loading import LoadedModel, load
from clifflab.scoring.kernel import Kernel
from clifflab.scoring.measures import COLUMNS, Found
from clifflab.scoring.plain import score_plain
from clifflab.scoring.probes import Probe, ProbeFile, ProbeSet
from clifflab.text.spans import Spans

PLANTED = "organism:planted"
MODELS = (PREFIX + "smollm2-135m", PLANTED)
WINDOW = (0.5, 0.9)
_DEPTH = 22 / 30  # of the model's blocks: where the probe reads by default
_TRACES = {True: 384, False: 12}  # of the practice corpus, of random tokens
_CLOSING = 4
_SPREAD = 2.0  # of the logits
_MOST, _HALF = 1e-4, 0.1  # largest difference of a score from plain, in float32 and in half precision


@dataclass(frozen=True)
class ScoreBench:
    """What to run.

    Attributes:
        models: Each ``geometry:NAME`` (random weights), ``organism:planted`` (on its practice corpus), or anything that
            a study takes as a model's path (on random tokens).
        dtype: Of the weights; ``auto`` is bfloat16 on a GPU and float32 on a CPU.
        traces: Traces of one run; by default 384 of the practice corpus, 12 of random tokens.
        shortest: Tokens of the shortest trace of random tokens; the others are spread evenly.
        longest: Tokens of the longest.
        layer: Probed layer; by default as deep as layer 22 of 30.
        token_budget: Tokens of one pass of the kernel.
        repeats: Timed rounds.
        seed: Of tokens, probe and random weights.
    """

    models: tuple[str, ...] = MODELS
    dtype: str = "auto"
    traces: int | None = None
    shortest: int = 64
    longest: int = 1024
    layer: int | None = None
    token_budget: int | None = None
    repeats: int = 5
    seed: int = 0


@dataclass(frozen=True)
class ScoreRecord(Record):
    """One method's figures; ``tokens`` is the mean over the traces.

    Attributes:
        traces: Traces of one run.
        layer: Probed layer.
        padding_share: Padding among the tokens that were run.
        ratio_to_limit: Tokens per second over those of the limit.
        peak_share: Arithmetic of the passes per second over what a large matrix product reaches on this GPU; ``None``
            on a CPU and where a pass is not bare.
        max_abs_diff_float32: Largest difference of a score from the same weights in float32; ``None`` in float32.
    """

    traces: int
    layer: int
    padding_share: float
    ratio_to_limit: float
    peak_share: float | None
    max_abs_diff_float32: float | None


@dataclass(frozen=True)
class PipelineRun:
    """What a run through Ray Data took.

    Attributes:
        timing: Seconds of the runs, and the peak of memory of all processes together.
        traces: Traces of one run.
        tokens: Their tokens.
        padding_share: Padding among the tokens that were run.
        max_abs_diff: Largest difference of a score from the plain way's.
    """

    timing: Timing
    traces: int
    tokens: int
    padding_share: float
    max_abs_diff: float


# Runs the whole of ``clifflab score`` with a model and a probe; None where the model has no text to read.
Pipeline = Callable[[str, ScoreBench, ProbeSet, Callable[[str], None]], PipelineRun | None]


def bench_score(
    settings: ScoreBench, note: Callable[[str], None], pipeline: Pipeline | None = None
) -> list[ScoreRecord]:  # fmt: skip
    """Run the benchmark, one model after the other.

    Args:
        settings: What to run.
        note: Told of the progress.
        pipeline: The way through Ray Data; it is timed by itself, after the others.

    Raises:
        UnequalResultsError: A fast way's scores differ from the plain way's.
    """
    return [record for model in settings.models for record in _bench(model, settings, note, pipeline)]


def _bench(
    model: str, settings: ScoreBench, note: Callable[[str], None], pipeline: Pipeline | None
) -> list[ScoreRecord]:  # fmt: skip
    loaded = _load(model, settings)
    ids, spans = _traces(loaded, model, settings)
    probes = _probe(loaded, settings, ids, spans)
    layer = probes.layers[0]
    lengths = np.array([span.response_start for span in spans])
    note(f"{model}: {len(ids)} traces of {lengths.min()} to {lengths.max()} tokens, layer {layer}")
    kernel = Kernel(loaded, probes, WINDOW, settings.token_budget)
    note(f"kernel: {kernel.mode}, {kernel.budget} tokens a pass")
    limit = best_limit(loaded, layer, lengths, settings.seed, note)
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: score_plain(loaded, probes, WINDOW, ids, spans),
        "limit": limit.run,
        "kernel": lambda: kernel.score(ids, spans),
    }
    note("comparing kernel with plain")
    plain, found = ways["plain"](), ways["kernel"]()
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    difference = _difference(found, plain, "kernel", _MOST if dtype == "float32" else _HALF)
    runs = {
        name: (time, int(lengths.sum())) for name, time in timed(ways, settings.repeats, loaded.device, note).items()
    }
    runs["limit"] = runs["limit"][0], limit.tokens
    traces, padding = dict.fromkeys(runs, len(ids)), {"kernel": found.padding_share}
    differences: dict[str, float] = {"kernel": difference}
    flops = {"kernel": pass_flops(loaded, layer, lengths), "limit": pass_flops(loaded, layer, limit.lengths)}
    peak = matmul_peak(loaded.device, loaded.model.dtype) if loaded.device.type == "cuda" else None
    through = pipeline(model, settings, probes, note) if pipeline else None
    if through:
        runs["pipeline"], traces["pipeline"] = (through.timing, through.tokens), through.traces
        padding["pipeline"], differences["pipeline"] = through.padding_share, through.max_abs_diff
        _check("pipeline", through.max_abs_diff, _MOST if dtype == "float32" else _HALF)
    rounding = _rounding(loaded, probes, ids, spans, {"plain": plain, "kernel": found})
    speed = {name: tokens / time.median for name, (time, tokens) in runs.items()}
    return [
        ScoreRecord(
            bench="score",
            model=model,
            dtype=dtype,
            method=name,
            tokens=round(tokens / traces[name]),
            repeats=len(time.seconds),
            seconds_median=time.median,
            tokens_per_second=speed[name],
            ratio_to_plain=speed[name] / speed["plain"],
            max_abs_diff=differences.get(name, 0.0),
            peak_memory_bytes=time.peak,
            traces=traces[name],
            layer=layer,
            padding_share=padding.get(name, 0.0),
            ratio_to_limit=speed[name] / speed["limit"],
            peak_share=flops[name] / time.median / peak if peak and name in flops else None,
            max_abs_diff_float32=rounding.get(name),
        )
        for name, (time, tokens) in runs.items()
    ]


def _load(model: str, settings: ScoreBench) -> LoadedModel:
    if not model.startswith(PREFIX):
        form = "auto" if model == PLANTED else "none"
        return load(ModelSpec(name="bench", path=model, dtype=settings.dtype, thinking_format=form))  # type: ignore[arg-type]
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return random_model(model, dtype, settings.seed)


def _probe(loaded: LoadedModel, settings: ScoreBench, ids: list[Any], spans: list[Spans]) -> ProbeSet:
    """A random direction, scaled so that its scores spread as a trained probe's do."""
    layers = len(loaded.blocks)
    layer = int(_DEPTH * layers) if settings.layer is None else settings.layer
    if layer >= layers:
        raise InputError("--layer", layer, f"the model has layers 0 to {layers - 1}", "give one of them")
    rng = np.random.default_rng(settings.seed)
    weight = (rng.standard_normal(loaded.d_model) / np.sqrt(loaded.d_model)).astype(np.float32)
    about = ProbeFile("", "0" * 64, {}, "", layers)
    probe = Probe("0" * 12, "all", "logistic", layer, True, weight, 0.0)
    found = Kernel(loaded, ProbeSet((probe,), (about,)), WINDOW, settings.token_budget).score(ids, spans)
    logits = found.measures[..., COLUMNS.index("final_logit")]
    scale = _SPREAD / max(float(logits.std()), 1e-6)
    bias = -scale * float(logits.mean())
    return ProbeSet((replace(probe, weight=(scale * weight).astype(np.float32), bias=bias),), (about,))


def _traces(loaded: LoadedModel, model: str, settings: ScoreBench) -> tuple[list[Any], list[Spans]]:
    """Traces of the practice corpus, or of random tokens with lengths spread evenly, in a random order."""
    count = settings.traces or _TRACES[model == PLANTED]
    if model == PLANTED:
        from clifflab.organism.corpus import corpus_rows

        rendered = [
            loaded.renderer.render([{"role": "user", "content": row["prompt"]}], row["thinking"], row["response"])
            for row in corpus_rows(count, settings.seed)
        ]
        return [np.array(ids) for ids, _ in rendered], [span for _, span in rendered]
    if settings.longest > loaded.context:
        raise InputError("--longest", settings.longest, f"the model reads {loaded.context} tokens", "give at most that")
    least = 4 * _CLOSING
    if not least <= settings.shortest <= settings.longest:
        raise InputError("--shortest", settings.shortest, f"not between {least} and --longest", "give less or more")
    rng = np.random.default_rng(settings.seed)
    size = int(loaded.model.config.get_text_config().vocab_size)
    lengths = rng.permutation(np.linspace(settings.shortest, settings.longest, count).round().astype(int))
    ids = [rng.integers(1, size, length) for length in lengths]
    spans = []
    for length in lengths.tolist():
        prefix = max(1, length // 8)
        spans.append(Spans(prefix, prefix, length - _CLOSING, length, length, closed=True))
    return ids, spans


def _rounding(
    loaded: LoadedModel, probes: ProbeSet, ids: Sequence[Any], spans: list[Spans], found: dict[str, Found]
) -> dict[str, float]:
    """How far each way's scores lie from those of the same weights in float32; the model is float32 afterwards."""
    if loaded.model.dtype == torch.float32:
        return {}
    loaded.model.float()
    exact = Kernel(loaded, probes, WINDOW).score(ids, spans)
    return {name: _difference(own, exact, name, np.inf) for name, own in found.items()}


def _difference(found: Found, plain: Found, name: str, most: float) -> float:
    """Largest difference of a score from the plain way's; logits are held to it on their own scale.

    Raises:
        UnequalResultsError: It is too large, or one side has no number where the other has one.
    """
    half = found.measures.shape[-1] // 2
    pairs = [(found.measures[..., :half], plain.measures[..., :half]), (found.drops, plain.drops)]
    logits = [(found.measures[..., half:], plain.measures[..., half:]), (found.drops_logit, plain.drops_logit)]
    if found.problem != plain.problem or any((np.isnan(a) != np.isnan(b)).any() for a, b in (*pairs, *logits)):
        raise UnequalResultsError(f"bench score: {name} has no number where plain has one, or the reverse")
    difference = max(float(np.nanmax(np.abs(a - b))) for a, b in pairs)
    _check(name, difference, most)
    scale = max(1.0, *(float(np.nanmax(np.abs(b))) for _, b in logits))
    _check(f"{name} in logits", max(float(np.nanmax(np.abs(a - b))) for a, b in logits) / scale, most)
    return difference


def _check(name: str, difference: float, most: float) -> None:
    if not difference <= most:
        raise UnequalResultsError(f"bench score: {name} differs from plain by {difference:.2g}, more than {most:.2g}")
