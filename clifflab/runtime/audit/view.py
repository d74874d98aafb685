"""An audit as a reader sees it: the verdict first, then where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clifflab.errors import shorten
from clifflab.runtime.audit import Audit, place
from clifflab.runtime.audit.idle import Gap
from clifflab.runtime.status.steps import short_node
from clifflab.runtime.status.view import duration

_MOST = 10


def render_audit(found: Audit) -> Group:
    """The audit in at most 100 columns."""
    parts: list[RenderableType] = [*map(Text, _runs(found)), Text()]
    problems = found.problems()
    parts += [Text(shorten(f"broken: {problem}", 200), "red") for problem in problems[: 2 * _MOST]]
    if len(problems) > 2 * _MOST:
        parts.append(Text(f"and {len(problems) - 2 * _MOST} more", "red"))
    if not problems:
        parts.append(Text("kept: every rule that the log can show", "green"))
    parts += [Text(f"  {rule}") for rule in _rules(found)]
    if found.slots:
        parts += [Text(), _slots(found)]
        parts += [Text(line) for gap in found.gaps[:3] for line in _gap(gap, found)]
    if found.steps:
        parts += [Text(), _steps(found.steps)]
    if found.slowest:
        parts += [Text(), Text("slowest units", "dim")]
        parts += [Text(f"  {_seconds(unit['seconds']):>8}  {_told(unit)}") for unit in found.slowest[: _MOST // 2]]
    parts += _list("lost workers", found.lost, _loss)
    parts += _list("done twice", found.twice, lambda w: f"{_told(w)}: {w['why']}")
    if found.again:
        parts += [Text(), Text(f"{len(found.again)} units were done by an earlier run too: {_reasons(found.again)}")]
    parts += _list("failures", found.failures, lambda w: f"{_told(w)}: {w['error']}")
    return Group(*parts)


def _runs(found: Audit) -> Iterable[str]:
    for run in found.runs[-_MOST:]:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run["began"]))
        yield f"run {run['run']} of {len(found.runs)}: {run['runtime'] or 'unknown'}, {run['state']}, " + (
            f"began {began}, took {duration(run['seconds'])}"
        )


def _rules(found: Audit) -> Iterable[str]:
    """What was looked at, with how often it was broken."""
    yield f"{len(found.in_driver)} pieces of work in the driver's process"
    yield f"{len(found.wrong_gpus)} workers that saw other GPUs than they were given"
    yield f"{len(found.shared_gpus)} times two workers on one GPU"
    yield f"{len(found.loaded_again)} models loaded again by one worker"
    reasons = f" ({_reasons(found.twice)})" if found.twice else ""
    yield f"{len(found.twice)} units done twice in one run{reasons}"
    if found.slots:
        yield f"{found.longest_idle:.1f} s: the longest that a slot stood idle while units waited"


def _slots(found: Audit) -> Table:
    table = _table(("node", "place"), ("there", "at work", "", "starting", "idle while units waited", "longest"))
    for slot in found.slots[: 3 * _MOST]:
        share = f"{100 * slot.work_s / slot.there_s:.0f}%" if slot.there_s else "-"
        longest = _seconds(slot.gaps[0].seconds) if slot.gaps else "-"
        worked = (_seconds(slot.there_s), _seconds(slot.work_s), share, _seconds(slot.busy_s - slot.work_s))
        times = (*worked, _seconds(slot.idle_s), longest)
        table.add_row(Text(short_node(slot.node)), Text(shorten(place(slot.gpu), 12)), *times)
    if len(found.slots) > 3 * _MOST:
        table.add_row(f"and {len(found.slots) - 3 * _MOST} more")
    return table


def _gap(gap: Gap, found: Audit) -> Iterable[str]:
    began = gap.began - min(run["began"] for run in found.runs)
    waiting = ", ".join(f"{count} of {name}" for name, count in list(gap.waiting.items())[:3])
    idle = f"{place(gap.gpu)} of {short_node(gap.node)} stood idle for {_seconds(gap.seconds)}"
    yield shorten(f"{idle}, from {began:.1f} s on, after {gap.before}, until {gap.after}; waiting: {waiting}", 200)


def _steps(steps: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(("step",), ("units", "busy", "mean unit", "longest unit", "mean wait"))
    for step in steps:
        times = [_seconds(step[key]) for key in ("busy_s", "mean_s", "longest_s", "wait_s")]
        table.add_row(Text(shorten(step["step"], 30)), f"{step['units']:,}", *times)
    return table


def _list(title: str, entries: Sequence[Mapping[str, Any]], tell: Any) -> list[RenderableType]:
    if not entries:
        return []
    lines = [Text(f"  {shorten(tell(entry), 300)}") for entry in entries[:_MOST]]
    more = [Text(f"  and {len(entries) - _MOST} more")] if len(entries) > _MOST else []
    return [Text(), Text(f"{title} ({len(entries)})", "dim"), *lines, *more]


def _loss(entry: Mapping[str, Any]) -> str:
    reason = str(entry["reason"]).split(". ")[0]  # Ray goes on with what might be behind it
    return f"{_told(entry)}, try {entry['attempt']}: {reason}" if entry.get("unit") else f"{_told(entry)}: {reason}"


def _reasons(entries: Sequence[Mapping[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry["why"]] = counts.get(entry["why"], 0) + 1
    return shorten("; ".join(f"{why}: {count}" for why, count in counts.items()), 200)


def _told(entry: Mapping[str, Any]) -> str:
    what = f"{entry.get('step') or ''} {entry.get('unit') or ''}".strip()
    parts = [part for part in (what, entry.get("model")) if part]
    return shorten(" of ".join(parts) or f"worker {entry.get('worker')}", 100)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value < 10 else duration(value)


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in left:
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
