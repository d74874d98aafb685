"""A selection from files of any size: one pass over the scores, one over the texts.

How the batches of files are read and reduced is the business of a :class:`~clifflab.repair.reading.Reader`. Held in
memory are the rows that may be chosen and, where they are asked for, names of requests: those that are evaluated too,
those that a guard calls harmful, those that are too long, and all of them with their category where that shares the
budget.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clifflab.config import SelectConfig, TargetsConfig
from clifflab.errors import InputError
from clifflab.repair.beside import CATEGORY, categories_in, flat, safe_in, verdicts_in, with_target
from clifflab.repair.columns import NEEDED, PROBE, check_columns, check_models, check_stratify
from clifflab.repair.corpus import Corpus, check_once
from clifflab.repair.decontaminate import contaminated
from clifflab.repair.reading import Reader, schema_of
from clifflab.repair.select import HARMFUL, Choice, NothingToChooseError, check_budget, check_enough, choose
from clifflab.repair.stream import UNLABELLED, Plan, Stats, fold, lenders, names_of, reduce_scores
from clifflab.repair.summary import summarise
from clifflab.repair.targets import Targets, make_targets, with_targets
from clifflab.repair.texts import BORDERS, END, TEXTS, Library, wanted_texts
from clifflab.science.selection import parts_of


@dataclass(frozen=True)
class Sources:
    """Files of a corpus.

    Attributes:
        scores: ``tables.CLIFFS``.
        traces: ``tables.TRACES``.
        prompts: ``tables.PROMPTS``: conversations, categories, targets; none where requests are single turns.
        guard: ``tables.GUARD``; none without a guard.
        evaluated: Rows of prompts that are evaluated, with ``messages``, ``set`` and ``id``.
    """

    scores: Sequence[str]
    traces: Sequence[str]
    prompts: Sequence[str] = ()
    guard: Sequence[str] = ()
    evaluated: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class Selection:
    """What a selection gives.

    Attributes:
        table: ``tables.SELECTION``, all selectors.
        targets: The training examples of the one that counts.
        summary: Content of ``selection.json``.
    """

    table: pa.Table
    targets: Targets
    summary: dict[str, Any]


def select_files(
    sources: Sources, settings: SelectConfig, targets: TargetsConfig, seed: int, read: Reader
) -> Selection:
    """Choose examples from files and write their targets.

    Raises:
        InputError: The files are no corpus of one model, or hold too few examples.
    """
    columns = _check_scores(sources, settings)
    near = _near(sources, settings, seed, read)
    census = _census(sources, settings, near, read)
    total = census.traces - census.near
    if census.near and not total:
        remedy = "give other prompts, or another corpus"
        raise InputError("against", f"{census.near} traces", "all are of requests that are evaluated", remedy)
    harmful, benign = parts_of(check_budget(settings.budget, total), settings.benign)
    plan = Plan(
        settings,
        harmful,
        benign,
        seed,
        near=near,
        verdicts=verdicts_in(sources.guard, read) if sources.guard else None,
        cut=census.cut,
        targets=with_target(sources.prompts, read) if targets.kind == "rewrite" else None,
        too_long=census.too_long,
        categories=categories_in(sources.prompts, read)
        if settings.stratify == CATEGORY and CATEGORY not in columns
        else None,
    )
    part = fold(read(sources.scores, columns, lambda scores: reduce_scores(scores, plan)), plan)
    _check_rows(part.stats, settings.probe)
    check_once(part.table)
    stats = part.stats + _unscored(part.stats, census)
    if sources.guard and not stats.judged:
        raise InputError("guard", sources.guard[0], "judges none of these traces", "give the verdicts of these traces")
    check_enough({reason: count for reason, count in stats.left.items() if count}, harmful, stats.eligible)
    asked = _prompts(sources, part.table, read)
    corpus = Corpus.checked(_with_category(part.table, asked), total)
    choices = {name: choose(corpus, name, settings.budget, settings, seed) for name in plan.selectors}
    safe = safe_in(plan.verdicts)

    def make(choice: Choice) -> Targets:
        texts = _texts(sources, corpus, choice, plan, safe, read)
        if others := set(texts["model"].to_pylist()) - set(stats.models):
            raise InputError(
                "traces", min(others), f"not of the scores' model {min(stats.models)}", "give its own traces"
            )
        named = None if safe is None else set(texts["trace_id"].filter(pc.is_in(texts["trace_id"], safe)).to_pylist())
        return make_targets(choice, Library.of(texts, asked), targets, plan.rules, seed, safe=named)

    choices[settings.by], made = with_targets(
        lambda without: choose(corpus, settings.by, settings.budget, settings, seed, without), make
    )
    return finish(corpus, stats, plan, choices, made)


def finish(corpus: Corpus, stats: Stats, plan: Plan, choices: dict[str, Choice], made: Targets) -> Selection:
    """Tables and figures of finished choices.

    Raises:
        NothingToChooseError: No chosen trace can become a training example.
    """
    if not made.rows:
        why = ", ".join(f"{count} {reason}" for reason, count in made.about["rejected"].items())
        problem = f"no chosen trace can become a training example ({why})"
        raise NothingToChooseError(
            "targets", made.about["kind"], problem, "give other targets, or texts that have them"
        )
    table = pa.concat_tables([choice.table() for choice in choices.values()])
    return Selection(table, made, summarise(corpus, stats, plan, choices, made))


def _check_scores(sources: Sources, settings: SelectConfig) -> list[str]:
    """The columns to read of the scores."""
    names: dict[str, None] = dict.fromkeys((*NEEDED, *PROBE))
    for file in sources.scores:
        schema = schema_of(file)
        check_columns(schema, file)
        names |= dict.fromkeys(
            name for name in ("cluster", CATEGORY, "verdict", "closing_tokens", END) if name in schema.names
        )
        if settings.stratify and not (settings.stratify == CATEGORY and sources.prompts):
            check_stratify(settings.stratify, schema)
            names[settings.stratify] = None
    if "guard" in (settings.by, *settings.beside) and not sources.guard and "verdict" not in names:
        raise InputError("selector", "guard", "the corpus has no guard verdicts", "give --guard, or another selector")
    return list(names)


@dataclass(frozen=True)
class _Census:
    """What the traces say that the scores do not: they hold unclosed traces too.

    Attributes:
        traces: All traces.
        unclosed: Those whose thinking never ended, by set.
        near: Those of requests that are evaluated, unclosed ones not counted twice.
        too_long: Ids of those that are too long; ``None`` where no filter asks.
        cut: Ids of those that ran into the limit of tokens.
    """

    traces: int
    unclosed: Counter[str]
    near: int
    too_long: pa.Array | None
    cut: pa.Array


def _census(sources: Sources, settings: SelectConfig, near: pa.Array | None, read: Reader) -> _Census:
    limit = settings.max_tokens

    def count(traces: pa.Table) -> tuple[int, Counter[str], int, pa.Array, pa.Array]:
        dropped = traces.num_rows
        if near is not None:
            traces = traces.filter(pc.invert(pc.is_in(names_of(traces), value_set=near)))
        dropped -= traces.num_rows
        unclosed = traces.filter(pc.invert(traces["closed"]))["set"].to_pylist()
        long = pa.array([], pa.string())
        if limit is not None:
            long = flat(traces.filter(pc.greater(pc.list_value_length(traces["token_ids"]), limit))["trace_id"])
        cut = pa.array([], pa.string())
        if END in traces.schema.names:
            cut = flat(traces.filter(pc.equal(traces[END], "length"))["trace_id"])
        return dropped + traces.num_rows, Counter(unclosed), dropped, long, cut

    columns = ["set", "id", "closed", "trace_id", *(["token_ids"] if limit is not None else [])]
    for file in sources.traces:
        if lacking := [name for name in (*columns, *TEXTS) if name not in schema_of(file).names]:
            raise InputError("traces", file, f"has no column {lacking[0]}", "give a traces.parquet")
    total, unclosed, dropped = 0, Counter[str](), 0
    long, cut = [pa.array([], pa.string())], [pa.array([], pa.string())]
    for rows, open_, gone, too_long, broken in read(sources.traces, [*columns, END], count):
        total, unclosed, dropped = total + rows, unclosed + open_, dropped + gone
        long.append(too_long)
        cut.append(broken)
    return _Census(total, unclosed, dropped, None if limit is None else pa.concat_arrays(long), pa.concat_arrays(cut))


def _unscored(stats: Stats, census: _Census) -> Stats:
    """Counts of traces that the scores do not hold.

    Raises:
        InputError: There are fewer traces than scores.
    """
    known = {name: count for (name, outcome), count in stats.outcomes.items() if outcome == "unclosed"}
    unclosed = census.unclosed - Counter(known)
    lacking = census.traces - census.near - sum(stats.outcomes.values()) - unclosed.total()
    if lacking < 0:
        problem = f"{-lacking} more are scored than there are"
        raise InputError("traces", f"{census.traces} traces", problem, "give all traces, and each score file once")
    left = Counter({"unclosed": unclosed.total(), "no_score": lacking})
    outcomes = Counter({(name, "unclosed"): count for name, count in unclosed.items()})
    return Stats(outcomes=outcomes, left=+left, near=census.near)


def _check_rows(stats: Stats, probe: str) -> None:
    there = sorted(name for name, count in stats.probes.items() if count)
    if not there:
        remedy = "give the cliffs of a trained probe"
        raise InputError("scores", "reported", "no row is of a reported logistic probe", remedy)
    if probe not in there:
        raise InputError("probe", probe, "the scores have no such probe", f"choose from {', '.join(there)}")
    check_models(list(stats.models))
    if strange := sorted(set(stats.labels) - {"", UNLABELLED, "harmful", "benign"}):
        remedy = "give harmful, benign, unlabelled or nothing"
        raise InputError("scores", f"label {strange[0]!r}", "is no label of a score table", remedy)


def _near(sources: Sources, settings: SelectConfig, seed: int, read: Reader) -> pa.Array | None:
    """Names of requests that are evaluated too, or nearly."""
    if not sources.evaluated:
        return None

    def requests(table: pa.Table) -> list[dict[str, Any]]:
        if "messages" in table.schema.names:
            return list(table.to_pylist())
        once: list[dict[str, Any]] = table.group_by(["set", "id", "prompt"]).aggregate([]).to_pylist()
        return [{**row, "messages": [{"role": "user", "content": row["prompt"]}]} for row in once]

    columns = ["set", "id", "messages" if sources.prompts else "prompt"]
    rows = {
        f"{row['set']}/{row['id']}": row
        for part in read(sources.prompts or sources.traces, columns, requests)
        for row in part
    }
    names = sorted(rows)
    found = contaminated([rows[name] for name in names], sources.evaluated, settings.decontaminate, seed)
    return pa.array([names[index] for index in found], pa.string())


def _prompts(sources: Sources, candidates: pa.Table, read: Reader) -> pa.Table | None:
    """The requests of the rows that may be chosen."""
    if not sources.prompts:
        return None
    names = pc.unique(names_of(candidates))
    columns = ["set", "id", "messages", CATEGORY, "target"]
    mine = read(sources.prompts, columns, lambda table: table.filter(pc.is_in(names_of(table), value_set=names)))
    return pa.concat_tables(mine, promote_options="default").combine_chunks()


def _with_category(candidates: pa.Table, asked: pa.Table | None) -> pa.Table:
    place = candidates.schema.get_field_index(CATEGORY)
    if asked is None or CATEGORY not in asked.schema.names or candidates[CATEGORY].null_count < candidates.num_rows:
        return candidates
    rows = pc.index_in(names_of(candidates), value_set=names_of(asked).combine_chunks())
    return candidates.set_column(place, CATEGORY, asked[CATEGORY].take(rows))


def _texts(
    sources: Sources, corpus: Corpus, choice: Choice, plan: Plan, safe: pa.Array | None, read: Reader
) -> pa.Table:
    """Traces of the choice, those that lend their refusals, and those of the same groups."""
    names, groups = corpus.strings("trace_id"), corpus.strings("group")
    ids = {*choice.ids(HARMFUL), *choice.ids("benign"), *names[lenders(corpus, plan.rules, plan.seed)].tolist()}
    wanted = pa.array(sorted(ids), pa.string())
    mates = pa.array(sorted(set(groups[choice.harmful].tolist())), pa.string())
    near = plan.near if plan.near is not None else pa.array([], pa.string())

    def words(traces: pa.Table) -> pa.Table:
        clean = traces.filter(pc.invert(pc.is_in(names_of(traces), value_set=near)))
        return wanted_texts(clean, wanted, mates, safe)

    return pa.concat_tables(read(sources.traces, [*TEXTS, *BORDERS, END], words), promote_options="default")
