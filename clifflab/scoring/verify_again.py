"""A sample of a finished job done anew from its input: rejects by preparing blocks, scores by the plain way."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clifflab import tables
from clifflab.artifacts import HashCache
from clifflab.errors import InputError
from clifflab.models.loading import load, model_identity
from clifflab.scoring.job import DUPLICATES, HASHES, MANIFEST, REJECTS, SCORES, Folder, Job, input_identity
from clifflab.scoring.plain import score_plain
from clifflab.scoring.probes import load_probes
from clifflab.scoring.sources import find_sources
from clifflab.scoring.table import inputs_of, scored_table
from clifflab.scoring.task import Corpus, UnitPreparer
from clifflab.scoring.types import CLOSING_MISSING, NOT_FINITE, TOO_LONG, Block, Prepared, Source
from clifflab.scoring.verify_files import REMEDY, VerifyError, table_of
from clifflab.scoring.verify_rows import NO_MEMORY, Tally, model_made

# Of a score, and of a logit against 1 + the largest of its row: where a score is 0.5, a logit moves four times as much.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
TOLERANCE_LOGIT = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}
_BLOCKS = 10  # blocks of a sample, as each has to be read and prepared; and as many that hold rejects alone
_TELLS = ("row", "source", "source_row", "reason", "id")  # of a reject; details may be worded otherwise
_WRITTEN = (CLOSING_MISSING, TOO_LONG, NOT_FINITE)  # rejects of traces that the model wrote

Drawn = list[tuple[pa.Table, pa.Table]]  # traces as prepared anew, and their rows of scores


def check_sources(folder: Folder, job: Job, identity: Mapping[str, Any]) -> list[Source]:
    """The model, the probes and the input are still those that were scored.

    Raises:
        VerifyError: Says which are not, or not there any more.
    """
    changed = list[str]()

    def look(one: Callable[[], Any]) -> Any:
        try:
            return one()
        except InputError as error:
            changed.append(f"{error.field} {error.value}: {error.problem}")
        except OSError as error:
            changed.append(f"{error.filename or 'a file'}: {error.strerror}")
        return None

    model = look(lambda: model_identity(job.model, HashCache(folder.work(HASHES))))
    known = identity.get("model", {})
    # How a GGUF file is read belongs to the version of clifflab.
    other = [name for name in known if name not in ("name", "converter") and model and model.get(name) != known[name]]
    if other:
        changed.append(f"the model {job.model.path} has changed ({', '.join(other)})")
    probes = look(lambda: load_probes(job.probes, job.settings.probes))
    if probes is not None:
        digests = {probe["sha256"] for probe in identity["probes"]}
        moved = [f"the probes {file.path} have changed" for file in probes.files if file.sha256 not in digests]
        if not moved and probes.identity() != identity["probes"]:
            moved = ["probes.json has changed: it gives other layers or kinds of probes"]
        changed += moved
    sources = look(lambda: find_sources(job.input))
    if sources is not None:
        changed += _moved(input_identity(sources), identity["input"])
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise VerifyError(f"{'; '.join(changed[:3])}{more}; put back what was scored, or {REMEDY}")
    return sources or []


def _moved(now: Sequence[Sequence[Any]], before: Sequence[Sequence[Any]]) -> list[str]:
    """What became of the files of the input."""
    here, there = {source[0]: list(source) for source in now}, {source[0]: list(source) for source in before}
    found = [f"the input's {name} is gone" for name in there if name not in here]
    found += [f"the input's {name} is new" for name in here if name not in there]
    for name, old in there.items():
        if name in here and here[name] != old:
            size, time = here[name][3] != old[3], here[name][4] != old[4]
            what = "size" if size else "time of change" if time else "kind"
            found.append(f"the input's {name} has changed (another {what})")
    if not found and [source[0] for source in now] != [source[0] for source in before]:
        found.append("the input's files come in another order")
    return found


def check_rejects(
    folder: Folder, job: Job, sources: Sequence[Source], manifest: Mapping[str, Any], tally: Tally, rows: int,
    rng: random.Random,
) -> tuple[Drawn, str]:  # fmt: skip
    """Prepare some blocks anew: the same rows are rejected, for the same reasons, and the others are the scored ones.

    Args:
        folder: The job's folder.
        job: The job.
        sources: Its input.
        manifest: Its manifest.
        tally: What its files hold.
        rows: About how many traces to draw.
        rng: Draws the blocks and the traces.

    Returns:
        Traces to score anew, with their rows of scores, and a sentence.

    Raises:
        VerifyError: The blocks come out otherwise, or the input cannot be read.
    """
    chosen, drawn = _choose(tally, rows, rng), Drawn()
    tokens = rejected = 0
    try:
        prepare = UnitPreparer(Corpus(job, tuple(sources), str(folder.root / DUPLICATES)))
        for block in tally.blocks:
            if block.number not in chosen:
                continue
            (prepared,) = prepare([block])
            kept, lost = _kept(folder, block, tally)
            _compare_rejects(block, prepared, lost, written=job.generate is not None)
            rejected += len(prepared.rejects)
            forgotten = {reject["row"] for reject in lost if reject["detail"] == NO_MEMORY}
            for row, stop in zip(
                *(prepared.table[name].to_pylist() for name in ("row", "response_start")), strict=True
            ):
                tokens += stop if row not in forgotten else 0
            if chosen[block.number] and job.generate is None:
                wanted = rng.sample(sorted(set(kept["row"].to_pylist())), chosen[block.number])
                drawn.append((_rows(prepared.table, wanted), _rows(kept, wanted)))
    except InputError as error:
        raise VerifyError(str(error)) from None
    every = f"{len(chosen):,} of {len(tally.blocks):,} blocks prepared anew"
    if job.generate is not None:
        return drawn, f"{every}: {rejected:,} rejected prompts as before; NOT checked: traces that the model wrote"
    if len(chosen) == len(tally.blocks) and tokens != manifest["tokens"]:
        raise VerifyError(f"{MANIFEST} says {manifest['tokens']:,} tokens, the input has {tokens:,}; {REMEDY}")
    return drawn, f"{every}, {rejected:,} rejects as before"


def _choose(tally: Tally, rows: int, rng: random.Random) -> dict[int, int]:
    """How many traces of which blocks."""
    full = [block.number for block in tally.blocks if tally.scored[block.number]]
    bare = [block.number for block in tally.blocks if not tally.scored[block.number]]
    picked = rng.sample(full, min(len(full), _BLOCKS))
    share = -(-rows // max(len(picked), 1))
    chosen = {number: min(tally.scored[number], share) for number in picked}
    return chosen | dict.fromkeys(rng.sample(bare, min(len(bare), _BLOCKS)), 0)


def _kept(folder: Folder, block: Block, tally: Tally) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Scores and rejects of a block as they were written."""
    scores = table_of(folder.part(SCORES, block.number), tables.SCORED)
    if not tally.rejected[block.number]:
        return scores, []
    return scores, table_of(folder.part(REJECTS, block.number), tables.SCORE_REJECTS).to_pylist()


def _compare_rejects(block: Block, prepared: Prepared, kept: Sequence[Mapping[str, Any]], *, written: bool) -> None:
    ready = set(prepared.table["row"].to_pylist())
    anew = {reject.row: vars(reject) for reject in prepared.rejects}
    for reject in kept:
        row = reject["row"]
        if row in ready:
            if not (model_made(reject) or (written and reject["reason"] in _WRITTEN)):
                raise VerifyError(
                    f"row {row} is rejected ({reject['reason']}), and is no reject when prepared anew; {REMEDY}"
                )
            continue
        if row not in anew:
            raise VerifyError(f"block {block.number}: the input has no row {row}; {REMEDY}")
        for name in _TELLS:
            if reject[name] != anew[row][name]:
                raise VerifyError(
                    f"row {row} is rejected with {name} {reject[name]}, anew with {anew[row][name]}; {REMEDY}"
                )
    if missed := sorted(set(anew) - {reject["row"] for reject in kept}):
        raise VerifyError(
            f"row {missed[0]} is scored, and rejected ({anew[missed[0]]['reason']}) when prepared anew; {REMEDY}"
        )


def _rows(table: pa.Table, wanted: Sequence[int]) -> pa.Table:
    return table.filter(pc.is_in(table["row"], pa.array(wanted, pa.int64())))


def check_scores(job: Job, drawn: Drawn, other: str) -> str:
    """Score the drawn traces the plain way.

    Args:
        job: The job.
        drawn: From :func:`check_rejects`.
        other: What to say of results of another version.

    Raises:
        VerifyError: A value differs by more than rounding.
    """
    try:
        loaded, probes = load(job.model), load_probes(job.probes, job.settings.probes)
    except InputError as error:
        raise VerifyError(str(error)) from None
    worst, worst_logit, count = 0.0, 0.0, 0
    for ready, mine in drawn:
        found = score_plain(loaded, probes, job.window, *inputs_of(ready))
        if any(found.problem):
            raise VerifyError(f"row {ready['row'][found.problem.index(NOT_FINITE)]} is not finite the plain way{other}")
        anew = scored_table(ready, found, probes, job.model.name, job.rows.name)
        try:
            gaps = _gaps(mine, anew, job.model.dtype)
        except VerifyError as fault:
            raise VerifyError(f"{fault}{other}; {REMEDY}") from None
        worst, worst_logit = max(worst, gaps[0]), max(worst_logit, gaps[1])
        count += ready.num_rows
    return f"{count:,} rows scored the plain way, largest difference {worst:.1e} (logits {worst_logit:.1e}){other}"


def _gaps(mine: pa.Table, anew: pa.Table, dtype: str) -> tuple[float, float]:
    """Largest difference of a score, and of a logit against 1 + the largest of its row.

    Raises:
        VerifyError: A value differs by more than rounding, or at all where it is no number.
    """
    names = [
        field.name for field in tables.SCORED if field.name.endswith("_logit") and pa.types.is_floating(field.type)
    ]
    logits = [_numbers(anew[name].combine_chunks()) for name in names]
    scale = 1 + np.nan_to_num(np.abs(np.stack(logits))).max(0)
    worst = {False: 0.0, True: 0.0}
    rows = anew["row"].to_numpy()
    if mine.num_rows != anew.num_rows:
        raise VerifyError(f"{mine.num_rows} rows of scores, the plain way gives {anew.num_rows}")
    for name in tables.SCORED.names:
        a, b = mine[name].combine_chunks(), anew[name].combine_chunks()
        places = np.arange(len(rows))
        if pa.types.is_list(a.type):
            _equal(name, rows, pc.list_value_length(a), pc.list_value_length(b))
            places = pc.list_parent_indices(b).to_numpy()
            a, b = pc.list_flatten(a), pc.list_flatten(b)
        if not pa.types.is_floating(a.type):
            _equal(name, rows, a, b)
            continue
        _equal(name, rows[places], pc.is_null(a), pc.is_null(b))
        logit = "_logit" in name
        gaps = np.nan_to_num(np.abs(_numbers(a) - _numbers(b)), nan=0.0) / (scale[places] if logit else 1)
        limit = (TOLERANCE_LOGIT if logit else TOLERANCE)[dtype]
        if len(gaps) and gaps.max() > limit:
            at = int(gaps.argmax())
            values = f"{a[at].as_py():.6g}, the plain way gives {b[at].as_py():.6g}"
            raise VerifyError(f"row {rows[places[at]]}: {name} is {values}")
        worst[logit] = max(worst[logit], float(gaps.max(initial=0.0)))
    return worst[False], worst[True]


def _equal(name: str, rows: npt.NDArray[Any], a: Any, b: Any) -> None:
    """Values without rounding are the same."""
    if not a.equals(b):
        at = next(place for place, (x, y) in enumerate(zip(a.to_pylist(), b.to_pylist(), strict=True)) if x != y)
        raise VerifyError(f"row {rows[at]}: {name} is other than the plain way's")


def _numbers(column: Any) -> npt.NDArray[np.float64]:
    """Values of an array, nulls as NaN."""
    found: npt.NDArray[np.float64] = column.to_numpy(zero_copy_only=False).astype(np.float64)
    return found
