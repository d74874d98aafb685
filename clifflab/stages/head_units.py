"""What the steps of the search for heads share: which traces are swept, and what a worker needs to sweep them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from clifflab.artifacts import read_json
from clifflab.config import Study
from clifflab.config.heads import parse_head
from clifflab.errors import InputError
from clifflab.models.heads import Head, HeadMap, heads_of
from clifflab.models.intervene import HeadMeans, Intervention
from clifflab.models.loading import LoadedModel
from clifflab.science.effects import HALVES
from clifflab.stages.base import Context, Unit
from clifflab.stages.duplicates import group_clusters, held_out_sets
from clifflab.stages.head_ranks import cluster_halves
from clifflab.stages.openings import opening_ids, opening_lens
from clifflab.stages.readout import Readers, kept_readers
from clifflab.stages.traces import spans_of
from clifflab.sweep import Meter, SweepTrace, mean_outputs

RANKING, REPORTING = HALVES
# Attacked traces rank on one half and report on the other; controls are described beside the reported effects.
SWEPT = (("attacked", RANKING), ("attacked", REPORTING), ("plain", REPORTING), ("benign", REPORTING))
_ENOUGH = 8  # attacked traces that complied in a half; with fewer, other harmful traces join them
INPUTS = ("prompts", "duplicates", "traces", "judge", "probe", "controls")


@dataclass(frozen=True)
class Chosen:
    """The traces that heads are searched on, by ``(role, half)``.

    Attributes:
        rows: Indices into the traces table, ascending.
        clusters: Cluster of each.
        attacked: What the attacked traces are: harmful prompts that ``complied``, or ``harmful`` prompts of any
            outcome where too few did.
        complied: How many of the attacked traces of each half complied.
        reason: Why nothing is swept; empty where something is.
    """

    rows: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    clusters: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    attacked: str = ""
    complied: dict[str, int] = field(default_factory=dict)
    reason: str = ""


def search_settings(study: Study) -> dict[str, Any]:
    """What of the configuration decides the search's results; the memory budget does not."""
    return study.heads.model_dump(mode="json", exclude={"budget_mb"})


def chosen_traces(context: Context, model: str) -> Chosen:
    """Choose the traces, by seeded hash, spread over as many clusters as there are."""
    folder = context.layout.folder(model)
    names = ("traces.parquet", "outcomes.parquet", "probes.json")
    files = [*(folder / name for name in names), context.layout.root / "clusters.parquet"]
    return context.once(f"searched:{model}", files, lambda: _choose(context, model))


def _choose(context: Context, model: str) -> Chosen:
    settings, folder = context.study.heads, context.layout.folder(model)
    if not settings.traces:
        return Chosen(reason="heads.traces is 0")
    probes = read_json(folder / "probes.json")
    if not probes["trained"]:
        return Chosen(reason=f"no probe could be trained: {probes['reason']}")
    if not all(opening_ids(context, model)):
        return Chosen(reason="the training groups hold no refusals or no compliances to read opening words from")
    columns = ["trace_id", "set", "label", "group", "closed", "closing_start", "response_start"]
    traces = context.table(folder / "traces.parquet").select(columns).to_pylist()
    outcomes = context.table(folder / "outcomes.parquet")["outcome"].to_pylist()
    clusters, half_of, held_out = group_clusters(context), cluster_halves(context), held_out_sets(context.study)
    usable: dict[str, list[int]] = {half: [] for half in HALVES}
    for index, trace in enumerate(traces):
        if trace["closed"] and trace["closing_start"] < trace["response_start"]:
            usable[half_of[clusters[trace["group"]]]].append(index)
    if not any(usable.values()):
        return Chosen(reason="no trace of this model has closing tokens to change a head at")

    def matching(half: str, label: str, outcomes_wanted: Sequence[str], sets: Sequence[str]) -> list[int]:
        """Traces of a half; out-of-distribution sets, which no choice may rest on, only where they are named."""
        return [
            index
            for index in usable[half]
            if traces[index]["label"] == label
            and (traces[index]["set"] in sets if sets else traces[index]["set"] not in held_out)
            and (outcomes[index] in outcomes_wanted or not outcomes_wanted)
        ]

    def spread(indices: list[int], count: int) -> list[int]:
        """A seeded choice that takes one trace of every cluster before it takes a second one of any."""
        drawn = sorted(indices, key=lambda index: _order(context.study.seed, traces[index]["trace_id"]))
        seen: dict[str, int] = {}
        places = []
        for place, index in enumerate(drawn):
            cluster = clusters[traces[index]["group"]]
            seen[cluster] = seen.get(cluster, 0) + 1
            places.append((seen[cluster], place, index))
        return [index for *_, index in sorted(places)[:count]]

    any_of: tuple[str, ...] = ()
    rows: dict[tuple[str, str], list[int]] = {}
    attacked = "complied"
    for half in HALVES:
        wanted = matching(half, "harmful", ("complied",), settings.attacked)
        rows["attacked", half] = spread(wanted, settings.traces)
        if len(rows["attacked", half]) < min(_ENOUGH, settings.traces):
            attacked = "harmful"
    if attacked == "harmful":
        for half in HALVES:
            first = rows["attacked", half]
            others = [index for index in matching(half, "harmful", any_of, settings.attacked) if index not in first]
            rows["attacked", half] = first + spread(others, settings.traces - len(first))
    for half in HALVES:
        refused = matching(half, "harmful", ("refused",), settings.plain)
        taken = set(rows["attacked", half])
        rows["plain", half] = spread([index for index in refused if index not in taken], settings.controls)
        rows["benign", half] = spread(matching(half, "benign", ("complied",), ()), settings.controls)
        if not rows["attacked", half]:
            return Chosen(reason=f"the {half} half of the groups has no attacked trace with closing tokens")
    if settings.replace == "mean" and not rows["benign", RANKING]:
        return Chosen(reason="the ranking half of the groups has no benign answered trace to take mean outputs from")
    rows = {key: sorted(found) for key, found in rows.items()}
    return Chosen(
        rows=rows,
        clusters={key: [clusters[traces[index]["group"]] for index in found] for key, found in rows.items()},
        attacked=attacked,
        complied={half: sum(outcomes[index] == "complied" for index in rows["attacked", half]) for half in HALVES},
    )


def _order(seed: int, trace_id: str) -> str:
    return hashlib.sha256(f"heads:{seed}:{trace_id}".encode()).hexdigest()


def trace_shards(context: Context, step: str, model: str, cuts: Sequence[tuple[str, dict[str, Any]]]) -> list[Unit]:
    """Units of up to ``heads.batch_size`` traces of one role and half, once for each cut ``(name, payload)``.

    The study alone fixes them, never the number of workers.
    """
    chosen, size = chosen_traces(context, model), context.study.heads.batch_size
    return [
        Unit(step, model, f"{role}-{half}-{start:06d}{name}", {"role": role, "half": half, "start": start, **payload})
        for role, half in SWEPT
        for start in range(0, len(chosen.rows[role, half]), size)
        for name, payload in cuts
    ]


def shard_traces(context: Context, unit: Unit) -> list[SweepTrace]:
    """The traces of a unit, up to their final positions."""
    assert unit.model is not None
    rows = chosen_traces(context, unit.model).rows[unit.payload["role"], unit.payload["half"]]
    start = unit.payload["start"]
    return sweep_traces(context, unit.model, rows[start : start + context.study.heads.batch_size])


def sweep_traces(context: Context, model: str, rows: Sequence[int]) -> list[SweepTrace]:
    """Rows of the traces table, ready to be swept."""
    table = context.table(context.layout.folder(model) / "traces.parquet")
    traces = table.take(pa.array(rows, pa.int64())).to_pylist()
    return [SweepTrace.of(trace["token_ids"], spans_of(trace)) for trace in traces]


@dataclass(frozen=True)
class Tools:
    """What a worker sweeps with.

    Attributes:
        loaded: The model.
        heads: Its heads.
        meter: The all-position probe at its reported layer, random directions beside it, and the refusal log-odds.
        intervention: What is done to a head.
    """

    loaded: LoadedModel
    heads: HeadMap
    meter: Meter
    intervention: Intervention


def sweep_tools(context: Context, model: str) -> Tools | None:
    """Everything that a sweep of this model needs; ``None`` where the model has no lens for its opening words.

    Raises:
        InputError: The model's attention has no single output projection, the probe is not of this model, or
            ``heads.only`` names a head that it does not have.
    """
    loaded, settings = context.loaded(model), context.study.heads
    try:
        heads = heads_of(loaded)
    except InputError as error:
        remedy = f"{error.remedy}, or set heads.traces to 0 to leave the search for heads out"
        raise InputError(error.field, error.value, error.problem, remedy) from None
    heads.check([parse_head(name) for name in settings.only], "heads.only")
    lens = opening_lens(context, model)
    if lens is None:
        return None
    readers = kept_readers(context, model)
    layer = readers.layer("all")
    weights = probe_and_random(readers, settings.random_directions, context.study.seed)
    biases = torch.zeros(len(weights))
    biases[0] = readers.biases[_place(readers), layer]
    meter = Meter((layer,) * len(weights), weights, biases, lens)
    meter.check(loaded)
    means = _means(context, model, loaded, heads) if settings.replace == "mean" else None
    return Tools(loaded, heads, meter, Intervention(settings.gamma, means, settings.renormalise))


def probe_and_random(readers: Readers, draws: int, seed: int) -> torch.Tensor:
    """The all-position logistic probe at its reported layer, then random directions of its length, ``[1 + draws, D]``.

    Random numbers are drawn in float64 from a seeded counter-based stream: every worker has the same.
    """
    probe = readers.weights[_place(readers), readers.layer("all")].float()
    digest = hashlib.sha256(f"directions:{seed}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:8], "big")))
    directions = rng.standard_normal((draws, len(probe)))
    directions *= float(probe.norm()) / np.linalg.norm(directions, axis=1, keepdims=True)
    return torch.cat([probe[None], torch.from_numpy(directions).float()])


def _place(readers: Readers) -> int:
    return next(k for positions, k, _ in readers.logistic if positions == "all")


def _means(context: Context, model: str, loaded: LoadedModel, heads: HeadMap) -> HeadMeans:
    """Mean outputs over the benign answered traces of the ranking half: the same in every worker."""
    files = [context.layout.folder(model) / name for name in ("traces.parquet", "outcomes.parquet")]

    def compute() -> HeadMeans:
        rows = chosen_traces(context, model).rows["benign", RANKING]
        return mean_outputs(loaded, heads, sweep_traces(context, model, rows))

    return context.once(f"head_means:{model}", files, compute)


def joined(parts: Sequence[tuple[Unit, Any]], names: Sequence[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Arrays of the unit files of one cut joined along the traces, by role and half; NaN where there are no traces."""
    found: dict[tuple[str, str], dict[str, list[npt.NDArray[Any]]]] = {}
    for unit, tensors in parts:
        mine = found.setdefault((unit.payload["role"], unit.payload["half"]), {name: [] for name in names})
        for name in names:
            mine[name].append(tensors[name])
    return {key: {name: np.concatenate(arrays) for name, arrays in mine.items()} for key, mine in found.items()}


def layers_of(total: int, block: int) -> Iterator[tuple[int, int]]:
    """Blocks of layers ``[first, last)``; 0 is one block of all."""
    size = block or max(total, 1)
    return ((first, min(first + size, total)) for first in range(0, total, size))


def head_list(heads_per_layer: Sequence[int], only: Sequence[str]) -> list[Head]:
    """Every head that is looked at, layer by layer."""
    wanted = {parse_head(name) for name in only}
    every = [(layer, head) for layer, count in enumerate(heads_per_layer) for head in range(count)]
    return [head for head in every if head in wanted or not wanted]
