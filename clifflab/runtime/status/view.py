"""A snapshot of a run as a reader sees it: at most 100 columns, plain text on a pipe.

Names and errors come from models, files and logs: they are shown as text, never as markup, and cannot steer a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clifflab.errors import shorten
from clifflab.runtime.status.steps import short_node

_STYLES = {"running": "cyan", "done": "green", "partial": "yellow", "failed": "red", "stopped": "yellow"}
_SILENT = 120.0  # seconds without an event that a reader is told of
_MOST_ROWS, _MOST_WORKERS = 20, 8
_UNITS = ("done", "total")
_ENDS = ("done", "partial", "failed", "stopped")


def render(snapshot: Mapping[str, Any]) -> Group:
    """The run in a few lines, its models, the steps at work, the workers, and what failed."""
    parts: list[RenderableType] = [_head(snapshot), *_facts(snapshot)]
    if snapshot["models"] or snapshot["steps"]:
        parts += [Text(), _models(snapshot)]
    if active := [step for step in snapshot["steps"] if step["state"] == "running"]:
        parts += [Text(), _steps(active)]
    if snapshot["workers"]["list"]:
        parts += [Text(), *_workers(snapshot["workers"]["list"])]
    if failures := list(_failures(snapshot)):
        parts += [Text(), *failures]
    return Group(*parts)


def summary_line(snapshot: Mapping[str, Any]) -> Text:
    """A run in one line, for a list."""
    units = snapshot["units"]
    line = Text(f"{shorten(snapshot.get('job') or snapshot['study'], 40):<24}  ")
    line.append(f"{snapshot['state']:<8}", _STYLES.get(snapshot["state"], ""))
    line.append(f"  {_stands(snapshot)}")
    if units["failed"]:
        line.append(f", {units['failed']:,} failed")
    if snapshot["state"] == "running" and snapshot.get("told", True):
        line.append(f", time left: {_left(snapshot)}")
    return line


def duration(seconds: float) -> str:
    """Seconds in the unit that a reader thinks in."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest:02d} min" if hours < 48 else f"{seconds / 86400:.1f} days"


def short(number: float) -> str:
    """A count in at most six characters."""
    for size, mark in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e5, "k")):
        if number >= size:
            return f"{number / (1e3 if mark == 'k' else size):.{0 if mark == 'k' else 2}f}{mark}"
    return f"{number:,.0f}"


def _head(snapshot: Mapping[str, Any]) -> Text:
    line = Text()
    line.append(shorten(snapshot["study"]), "bold")
    line.append("  ")
    line.append(snapshot["state"], _STYLES.get(snapshot["state"], ""))
    units = snapshot["units"]
    line.append(f"  {_stands(snapshot)}")
    if units["failed"]:
        line.append(f", {units['failed']:,} failed", "red")
    if snapshot.get("run", 1) > 1:
        line.append(f", resumed ({snapshot['run'] - 1})")
    return line


def _facts(snapshot: Mapping[str, Any]) -> list[Text]:
    """Lines of a word and what it says."""
    speed, workers, lost = snapshot["throughput"], snapshot["workers"], snapshot["lost"]
    lately = f"last {duration(speed['window_s'])}" if snapshot["state"] == "running" else "the whole run"
    rates = [f"{_rate(speed[f'{name}_per_s'])} {name}/s" for name in ("units", "rows", "tokens")]
    facts = {"time": duration(snapshot["elapsed_s"]), "speed": f"{', '.join(rates)} ({lately})"}
    if not snapshot.get("told", True):
        facts = {}
    silent = snapshot["started"] + snapshot["elapsed_s"] - snapshot["updated"]
    if snapshot["state"] == "running" and facts:
        facts["left"] = _left(snapshot)
        nodes = f" on {workers['nodes']} node{'s' if workers['nodes'] != 1 else ''}" if workers["nodes"] else ""
        beside = workers.get("without_gpu", 0)
        places = f" of {workers['places']} places" if workers["places"] else ""
        more = f", and {beside} without a GPU" if beside else ""
        inline = snapshot["runtime"] == "inline"
        if inline or workers["now"] or workers["places"]:  # a scoring job tells of none
            facts["workers"] = "the run's own process" if inline else f"{workers['now'] - beside}{places}{nodes}{more}"
        if silent > _SILENT:
            facts["silent"] = f"nothing heard for {duration(silent)}"
    if snapshot["state"] == "stopped":
        facts["stopped"] = "it ended without finishing; the same command continues it"
    if any(lost.values()):
        facts["lost"] = f"{lost['lost']} workers died, {lost['hung']} hung; {lost['retried']} units tried again"
    if snapshot.get("error"):
        facts["error"] = shorten(snapshot["error"], 300)
    return [Text(f"{name:<8} {text}") for name, text in facts.items()]


def _models(snapshot: Mapping[str, Any]) -> Table:
    table = _table(("model", "state", "at"), ("steps", "units", "failed", "rows", "tokens", "busy"))
    own = [step for step in snapshot["steps"] if step["model"] is None]
    for model in snapshot["models"][: 5 * _MOST_ROWS]:
        done, total = model["steps"]["done"], model["steps"]["total"]
        state = Text(model["state"], _STYLES.get(model["state"], ""))
        begun = f"{done}/{total}" if total else str(done)
        table.add_row(_text(model["model"]), state, _text(model["step"] or ""), begun, *_counts(model))
    if own:
        busy = [step["step"] for step in own if step["state"] == "running"]
        sums = {key: sum(step[key] for step in own) for key in ("rows", "tokens", "busy_s")}
        units = {key: sum(step["units"][key] for step in own) for key in ("done", "total", "failed")}
        whole = str(sum(step["state"] == "done" for step in own))
        stands = "running" if busy else ("done" if int(whole) == len(own) else "")
        row = (Text(stands, _STYLES.get(stands, "")), _text(", ".join(busy)), whole)
        table.add_row(Text("(whole study)"), *row, *_counts({**sums, "units": units}))
    return table


def _steps(active: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(("at work", "model"), ("units", "queued", "failed", "rows", "tokens", "busy"))
    for step in active[:_MOST_ROWS]:
        units, *others = _counts(step)
        row = (units, short(step["units"]["queued"]), *others)
        table.add_row(_text(step["step"]), _text(step["model"] or ""), *row)
    if len(active) > _MOST_ROWS:
        table.add_row(f"and {len(active) - _MOST_ROWS} more")
    return table


def _workers(workers: Sequence[Mapping[str, Any]]) -> Iterable[Text]:
    """A line a node: what sits on its GPUs, and how many workers need none."""
    nodes: dict[str, list[Mapping[str, Any]]] = {}
    for worker in workers:
        nodes.setdefault(str(worker["node"]), []).append(worker)
    for node, here in list(nodes.items())[:_MOST_ROWS]:
        on_gpus = sorted((w for w in here if w["gpu_ids"]), key=lambda w: [str(gpu) for gpu in w["gpu_ids"]])
        held = [f"GPU {'+'.join(map(str, w['gpu_ids']))} {w['model'] or '-'}" for w in on_gpus[:_MOST_WORKERS]]
        if len(on_gpus) > _MOST_WORKERS:
            held.append(f"{len(on_gpus) - _MOST_WORKERS} more")
        others = [str(w["model"]) if w["model"] else None for w in here if not w["gpu_ids"]]
        loaded = [name for name in others if name]
        if others:
            names = f" ({', '.join(loaded[:_MOST_WORKERS])})" if loaded else ""
            held.append(f"{len(others)} without a GPU{names}")
        yield Text(shorten(f"node {short_node(node)}: {'; '.join(held)}", 300))
    if len(nodes) > _MOST_ROWS:
        yield Text(f"and {len(nodes) - _MOST_ROWS} more nodes")


def _failures(snapshot: Mapping[str, Any]) -> Iterable[Text]:
    """A line a failed model, then one a failed unit of no failed model."""
    named = set()
    for model in snapshot["models"]:
        if model["error"]:
            named.add(model["model"])
            yield _failure(f"{model['model']} failed{_at(model['step'])}: ", model["error"])
    others = [failure for failure in snapshot["failures"] if failure["model"] not in named]
    for failure in others[:_MOST_ROWS]:
        unit = f" unit {failure['unit']}" if failure.get("unit") else ""
        of = f" of {failure['model']}" if failure["model"] else ""
        yield _failure(f"failed{_at(failure['step'])}{of}{unit}: ", failure["error"])


def _failure(what: str, error: str) -> Text:
    line = Text(shorten(what), "red")
    return line.append(" ").append(shorten(error, 300), "default")


def _at(step: str | None) -> str:
    return f" at {step}" if step else ""


def _counts(entry: Mapping[str, Any]) -> tuple[str, ...]:
    units = entry["units"]
    failed = short(units["failed"]) if units["failed"] else "-"
    return _of(units), failed, short(entry["rows"]), short(entry["tokens"]), duration(entry["busy_s"])


def _of(units: Mapping[str, int]) -> str:
    return "/".join(short(units[key]) for key in _UNITS)


def _stands(snapshot: Mapping[str, Any]) -> str:
    progress = snapshot["progress"]
    if not snapshot.get("told", True):
        return "nothing was told of its progress" + ("" if snapshot["state"] in _ENDS else " yet")
    if snapshot["state"] == "done" and not progress["total"]:
        return "everything was there already"
    return f"{progress['done']} of {progress['total']} steps, {_of(snapshot['units'])} units"


def _left(snapshot: Mapping[str, Any]) -> str:
    if snapshot["eta_s"] is None:
        return "not known yet"
    unknown = snapshot["eta_unknown"]
    if unknown and snapshot["eta_s"] < 1:
        return f"not known yet, {unknown} step{'s' if unknown != 1 else ''} to come"
    if not snapshot["eta_at_least"]:
        return f"about {duration(snapshot['eta_s'])}"
    return f"at least {duration(snapshot['eta_s'])} ({unknown} step{'s' if unknown != 1 else ''} not timed yet)"


def _rate(value: float) -> str:
    return f"{value:.2g}" if 0 < value < 10 else short(value)


def _text(value: str) -> Text:
    return Text(shorten(value, 60), no_wrap=True, overflow="ellipsis")


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for heading in left:
        table.add_column(heading, no_wrap=True, overflow="ellipsis", min_width=7)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
