"""Workers' counters stand where a node's metrics are read, and nowhere without Ray."""

from __future__ import annotations

import re
import stat
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clifflab.config import RuntimeConfig
from clifflab.runtime import score_pool
from clifflab.runtime.score_pool import _Score
from clifflab.runtime.status import meters
from clifflab.runtime.status.meters import BUSY, ROWS, TOKENS, UNITS, record

_PATIENCE = 25.0


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray whose workers tell their metrics often; nobody else reads its files, and they go with it."""
    from clifflab.runtime.local import start_ray, stop_ray

    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    started = start_ray(RuntimeConfig(workers=2, object_store_mb=80))
    import ray

    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    if started:
        assert stat.S_IMODE(session.parents[1].stat().st_mode) == 0o700
        assert session.parents[1].name.startswith("clifflab-ray-")
    yield ray
    if started:
        stop_ray()
        assert not session.parents[1].exists()


def scraped(port: int) -> dict[tuple[str, str, str], float]:
    """What all workers of a node told: sums by counter, step and model."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found: dict[tuple[str, str, str], float] = {}
    for name, tags, value in re.findall(r"^ray_(clifflab_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        own = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        key = (name, own["step"], own["model"])
        found[key] = found.get(key, 0.0) + float(value)
    return found


def test_workers_tell_rays_metrics(ray: Any) -> None:
    class Told:
        def tell(self, times: int) -> int:
            from clifflab.runtime.status.meters import record

            for _ in range(times):
                record("traces", "planted", {"rows": 10, "tokens": 100, "rejects": 3}, 1.5)
            record("judge", None, {"rows": 2, "tokens": None}, 0.25)
            return times

    workers = [ray.remote(num_cpus=1)(Told).remote() for _ in range(2)]
    assert ray.get([worker.tell.remote(times) for worker, times in zip(workers, (3, 4), strict=True)]) == [3, 4]
    expected = {
        (ROWS, "traces", "planted"): 70.0,
        (TOKENS, "traces", "planted"): 700.0,
        (UNITS, "traces", "planted"): 7.0,
        (BUSY, "traces", "planted"): 10.5,
        (ROWS, "judge", ""): 4.0,
        (UNITS, "judge", ""): 2.0,
        (BUSY, "judge", ""): 0.5,
    }
    port, until = ray.nodes()[0]["MetricsExportPort"], time.monotonic() + _PATIENCE
    while (found := scraped(port)) != expected and time.monotonic() < until:
        time.sleep(0.25)
    assert found == expected


def test_without_ray_nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "_counters", lambda: pytest.fail("a counter was made"))
    monkeypatch.setitem(meters.sys.modules, "ray", None)
    record("traces", "planted", {"rows": 1}, 1.0)
    monkeypatch.setitem(meters.sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    record("traces", "planted", {"rows": 1}, 1.0)


def test_scoring_counts_each_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    receipts = iter([{"read": 50, "scored": 49, "tokens": 700, "seconds": 2.5}, {"read": 9, "again": True}])
    told: list[Any] = []
    monkeypatch.setattr(score_pool, "_node", lambda: "n1")
    monkeypatch.setattr(score_pool, "BlockScorer", lambda *_: lambda prepared: next(receipts))
    monkeypatch.setattr(score_pool, "unpack", lambda row: row)
    monkeypatch.setattr(score_pool, "record", lambda *given: told.append(given))
    scorer = _Score(SimpleNamespace(model=SimpleNamespace(name="planted")), "/nowhere", "f", 1)  # type: ignore[arg-type]
    rows = list(scorer({"error": ["", ""]}))
    assert [row["error"] for row in rows] == [[""], [""]]
    ((step, model, counts, seconds),) = told
    assert (step, model, counts["rows"], counts["tokens"], seconds) == ("score", "planted", 50, 700, 2.5)
