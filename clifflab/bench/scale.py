"""``clifflab bench scale``: does ``clifflab score`` keep its speed and its memory when the corpus grows?

The command runs as users run it, in processes of its own; this process looks at them and at the log of the job, and
afterwards compares every row of the results with the corpus.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clifflab.artifacts import output_error, remove
from clifflab.bench.exactly_once import Counted, check_results, read_planted
from clifflab.bench.processes import Family, Memory, can_measure
from clifflab.bench.records import UnequalResultsError
from clifflab.errors import ClifflabError, InputError, shorten

_EVERY = 0.5  # seconds between two looks at the memory
_SHARE = 0.08  # of a core that looking may take: what is measured shares the cores
_FEW = 10  # blocks too few to tell a steady speed
_TELL = 30.0  # seconds between two notes
_OURS = ("scores", "rejects", "job.json")


class CommandError(ClifflabError):
    """A command that the benchmark runs failed."""


@dataclass(frozen=True)
class ScaleBench:
    """What to run.

    Attributes:
        probes: A model's folder in a study's results, or its probes.safetensors.
        work: Folder of the corpora, which are kept for the next time, and of the results.
        model: A checkpoint, or ``organism:planted``.
        rows: Rows of each corpus.
        malformed: Share of rows that are spoilt.
        workers: Most scoring workers; ``None`` leaves it to the command.
        object_store: Size of Ray's object store, in MiB.
        seed: Of the corpora.
    """

    probes: str
    work: Path
    model: str = "organism:planted"
    rows: tuple[int, ...] = (100_000, 1_000_000)
    malformed: float = 0.01
    workers: int | None = None
    object_store: int = 512
    seed: int = 0


@dataclass(frozen=True)
class ScaleRecord:
    """One size's figures.

    Attributes:
        bench: Name of the benchmark.
        model: What scored.
        method: ``score``.
        rows: Rows of the corpus.
        scored: Rows with scores.
        rejected: Rows that were rejected: just those that were spoilt.
        reasons: Rejected rows by reason.
        tokens: Tokens that the model read.
        workers: Scoring workers that did a block.
        blocks: Blocks of the job.
        seconds: Of the whole command, from its start to its exit.
        rows_per_second: Rows in these seconds.
        steady_seconds: From the first finished block to the last.
        steady_rows_per_second: Rows of the blocks behind the first, in these seconds; null for less than ten blocks.
        speed_ratio: Rows per second of the whole command over those of the smallest corpus.
        steady_speed_ratio: The same of the steady ones, where both have one.
        peak_memory_bytes: Most memory of all processes together (proportional set size, see
            :mod:`clifflab.bench.processes`); peaks shorter than the time between two looks are missed.
        peak_driver_bytes: Most of the command's own process.
        peak_workers_bytes: Most of Ray's workers together: tasks and actors.
        peak_driver_and_workers_bytes: Most of both together.
        peak_shared_bytes: Most shared memory, a part of the total: the object store's pages in use.
        memory_ratio: Peak of driver and workers over that of the smallest corpus.
        total_memory_ratio: Peak of all processes over that of the smallest corpus.
        looks: How often the memory was looked at.
        differences: Rows that are missing, doubled, or not what was planted; always 0.
    """

    bench: str
    model: str
    method: str
    rows: int
    scored: int
    rejected: int
    reasons: Mapping[str, int]
    tokens: int
    workers: int
    blocks: int
    seconds: float
    rows_per_second: float
    steady_seconds: float
    steady_rows_per_second: float | None
    speed_ratio: float
    steady_speed_ratio: float | None
    peak_memory_bytes: int
    peak_driver_bytes: int
    peak_workers_bytes: int
    peak_driver_and_workers_bytes: int
    peak_shared_bytes: int
    memory_ratio: float
    total_memory_ratio: float
    looks: int
    differences: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Course:
    """How one run went.

    Attributes:
        rows: Rows of the corpus.
        seconds: Of the whole command.
        memory: Memory by seconds since the start.
        done: Rows done by seconds since the start.
        tokens: Tokens of all blocks.
        workers: Processes that did a block.
        blocks: Blocks done.
    """

    rows: int
    seconds: float
    memory: tuple[tuple[float, Memory], ...]
    done: tuple[tuple[float, int], ...]
    tokens: int
    workers: int
    blocks: int

    @property
    def steady(self) -> tuple[float, float | None]:
        """Seconds from the first finished block to the last, and rows per second in them where there are enough."""
        (first, before), (last, after) = self.done[0], self.done[-1]
        seconds = last - first
        return seconds, (after - before) / seconds if self.blocks >= _FEW and seconds > 0 else None


def bench_scale(settings: ScaleBench, note: Callable[[str], None]) -> tuple[list[ScaleRecord], list[Course]]:
    """Score corpora of several sizes, the smallest first.

    Args:
        settings: What to run.
        note: Told of the progress.

    Raises:
        InputError: This system does not tell how much memory processes share.
        OutputError: The work folder cannot be used.
        CommandError: A command failed.
        UnequalResultsError: Results are not what the corpus makes them.
    """
    if not can_measure():
        raise InputError("bench scale", sys.platform, "does not tell how much memory processes share", "run on Linux")
    courses: list[Course] = []
    found: list[Counted] = []
    for rows in sorted(set(settings.rows)):
        corpus = write_corpus(settings, rows, note)
        root = settings.work / f"scores-{rows}"
        _clear(root)
        course = watch(score_command(settings, corpus, root), root, rows, settings.work / f"score-{rows}.log", note)
        note(f"{rows:,} rows: {course.seconds:.1f} s; comparing every row with the corpus")
        found.append(check_results(root, corpus, read_planted(corpus)))
        if found[-1].rows != rows:
            raise UnequalResultsError(f"bench scale: {found[-1].rows} rows in the results of {rows}")
        courses.append(course)
    return [_record(settings, *pair, courses[0]) for pair in zip(courses, found, strict=True)], courses


def write_corpus(settings: ScaleBench, rows: int, note: Callable[[str], None]) -> Path:
    """The practice corpus of a size, written unless it is there."""
    corpus = settings.work / f"corpus-{rows}-{settings.malformed:g}-{settings.seed}.jsonl"
    if corpus.is_file() and Path(f"{corpus}.malformed.json").is_file():
        note(f"{rows:,} rows: {corpus} is there")
        return corpus
    note(f"{rows:,} rows: writing {corpus}")
    try:
        settings.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(settings.work, error) from None
    options = ["--rows", str(rows), "--malformed", str(settings.malformed), "--seed", str(settings.seed)]
    command = [sys.executable, "-m", "clifflab", "organism", "corpus", *options, "--out", str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise CommandError(f"bench scale: the corpus was not written ({_last_line(done.stderr)})")
    return corpus


def score_command(settings: ScaleBench, corpus: Path, root: Path) -> list[str]:
    """What is run."""
    options = {
        "--model": settings.model,
        "--probes": settings.probes,
        "--input": corpus,
        "--output": root,
        "--object-store": settings.object_store,
        "--workers": settings.workers,
    }
    given = [part for name, value in options.items() if value is not None for part in (name, str(value))]
    return [sys.executable, "-m", "clifflab", "score", *given, "--runtime", "ray"]


def watch(command: Sequence[str], root: Path, rows: int, log: Path, note: Callable[[str], None]) -> Course:
    """Run a scoring command and look at its processes until it ends.

    Args:
        command: The command.
        root: Its output folder, empty.
        rows: Rows of its corpus.
        log: File of what it prints.
        note: Told of the progress.

    Raises:
        CommandError: It failed.
    """
    samples: list[tuple[float, Memory]] = []
    began, start = time.time(), time.monotonic()
    with log.open("wb") as printed:
        process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT
        )
        try:
            seconds = _look(process, start, samples, lambda: _note(root, rows, samples, note))
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        line = _last_line(log.read_text(errors="replace"))
        raise CommandError(f"bench scale: clifflab score ended with {process.returncode} ({line}); see {log}")
    blocks = _blocks(root)
    done, total = [], 0
    for event in blocks:
        total += event["read"]
        done.append((event["time"] - began, total))
    tokens, workers = sum(event["tokens"] for event in blocks), {(e.get("node"), e.get("pid")) for e in blocks}
    return Course(rows, seconds, tuple(samples), tuple(done), tokens, len(workers), len(blocks))


def _look(
    process: subprocess.Popen[bytes], start: float, samples: list[tuple[float, Memory]], tell: Callable[[], None]
) -> float:
    """Look at the memory until the process ends; the seconds that it took."""
    family, told = Family(process.pid), start
    while True:
        before, now = time.process_time(), time.monotonic()
        samples.append((now - start, family.memory()))
        if now - told >= _TELL:
            told = now
            tell()
        try:
            process.wait(max(_EVERY, (time.process_time() - before) / _SHARE))
        except subprocess.TimeoutExpired:
            continue
        return time.monotonic() - start


def _note(root: Path, rows: int, samples: Sequence[tuple[float, Memory]], note: Callable[[str], None]) -> None:
    done, (seconds, memory) = sum(event["read"] for event in _blocks(root)), samples[-1]
    note(f"{rows:,} rows: {done:,} done after {seconds:.0f} s, {memory.total / 2**20:,.0f} MiB in all")


def _blocks(root: Path) -> list[dict[str, Any]]:
    """Events of finished blocks; a line that is being written is left out."""
    try:
        text = (root / "events.jsonl").read_text()
    except FileNotFoundError:
        return []
    events = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [event for event in events if event["event"] == "block"]


def _clear(root: Path) -> None:
    """Remove the results of an earlier run."""
    if any((root / name).exists() for name in _OURS):
        shutil.rmtree(root)
    remove(root / ".lock")


def _record(settings: ScaleBench, course: Course, found: Counted, smallest: Course) -> ScaleRecord:
    speed, speed_of_smallest = course.rows / course.seconds, smallest.rows / smallest.seconds
    (steady_seconds, steady), steady_of_smallest = course.steady, smallest.steady[1]
    both, total = _peak(course, lambda m: m.driver + m.workers), _peak(course, lambda m: m.total)
    return ScaleRecord(
        bench="scale",
        model=settings.model,
        method="score",
        rows=course.rows,
        scored=found.scored,
        rejected=found.rows - found.scored,
        reasons=found.reasons,
        tokens=course.tokens,
        workers=course.workers,
        blocks=course.blocks,
        seconds=course.seconds,
        rows_per_second=speed,
        steady_seconds=steady_seconds,
        steady_rows_per_second=steady,
        speed_ratio=speed / speed_of_smallest,
        steady_speed_ratio=steady / steady_of_smallest if steady and steady_of_smallest else None,
        peak_memory_bytes=total,
        peak_driver_bytes=_peak(course, lambda m: m.driver),
        peak_workers_bytes=_peak(course, lambda m: m.workers),
        peak_driver_and_workers_bytes=both,
        peak_shared_bytes=_peak(course, lambda m: m.shared),
        memory_ratio=both / _peak(smallest, lambda m: m.driver + m.workers),
        total_memory_ratio=total / _peak(smallest, lambda m: m.total),
        looks=len(course.memory),
        differences=0,
    )


def _peak(course: Course, part: Callable[[Memory], int]) -> int:
    return max(part(memory) for _, memory in course.memory)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines() or ["it said nothing"]
    return shorten(lines[-1], 400)
