"""The same trace gets the same tokens and score whatever its batch mates, padding, runtime and number of workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import clifflab
from clifflab.models import load
from clifflab.runtime.audit import audit
from clifflab.stages import STEPS
from clifflab.stages.base import ordered
from clifflab.stages.readout import Readers, read_traces
from clifflab.studyfile import load_study, parse_study
from tests.conftest import ARCHITECTURES
from tests.studies import FEW, NO_HEADS, assert_same_tables, events, tables_of

MODELS = ("planted", *ARCHITECTURES)


def study(checkpoints: dict[str, Path], traces: Path, guard: Path, **runtime: Any) -> Any:
    paths = {"planted": "organism:planted", **{name: str(path) for name, path in checkpoints.items()}}
    return parse_study(
        {
            "name": "agreement",
            "models": [{"name": name, "path": path} for name, path in paths.items()],
            "prompts": [
                {
                    "name": "written",
                    "path": str(traces),
                    "label": "benign",
                    "existing": True,
                    "columns": {"label": "label"},
                },
                {"name": "harmful", "path": "organism:harmful", "label": "harmful", "limit": 24},
            ],
            "traces": {"max_new_tokens": 48, "batch_size": 12},
            "judge": {"guard": {"path": str(guard), "batch_size": 64}},
            "probe": {"min_examples": 8, **FEW},
            "truncation": {"traces": 4, "max_new_tokens": 8},
            **NO_HEADS,
            "cliff": {"bootstrap": 100},
            "report": {"figures": False},
            "runtime": runtime,
        }
    )


@pytest.fixture(scope="module")
def roots(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoints: dict[str, Path],
    existing_traces: Path,
    guards: dict[str, Path],
) -> dict[str, Path]:
    """The same study inline, with one Ray worker and with two."""
    runs = {"inline": {"kind": "inline"}, "one": {"workers": 1}, "two": {"workers": 2}}
    return {
        name: clifflab.run(
            study(checkpoints, existing_traces, guards["llama"], **runtime), tmp_path_factory.mktemp(name)
        ).root
        for name, runtime in runs.items()
    }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("other", ["one", "two"])
def test_runtimes_and_worker_counts(roots: dict[str, Path], model: str, other: str) -> None:
    """Ids, tokens, order and a guard's verdicts exactly equal; floats to 1e-5."""
    tables = tables_of(roots["inline"], model)
    assert tables["guard"].num_rows > 100
    assert_same_tables(tables, tables_of(roots[other], model), 1e-5)


@pytest.mark.parametrize("other", ["one", "two"])
def test_fingerprints_know_no_runtime(roots: dict[str, Path], other: str) -> None:
    one, two = (json.loads((roots[name] / "manifest.json").read_text()) for name in ("inline", other))
    assert one["steps"].keys() == two["steps"].keys()
    for name, step in one["steps"].items():
        assert step["fingerprint"] == two["steps"][name]["fingerprint"], name
    for model in MODELS:
        assert one["files"][f"{model}/traces.parquet"] == two["files"][f"{model}/traces.parquet"]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_driver_computes_nothing(roots: dict[str, Path], workers: int) -> None:
    log = events(roots["one" if workers == 1 else "two"])
    driver = next(e["driver_pid"] for e in log if e["event"] == "run_start")
    work = [e for e in log if e["event"] in ("unit", "merge")]
    asked = load_study(roots["one"] / "study.yaml")
    assert {e["step"] for e in work} == {name for name, _ in ordered(asked, STEPS)}
    assert all(e["pid"] != driver for e in work)
    assert all({"node", "pid", "gpu_ids", "seconds"} <= e.keys() for e in work)
    # An actor holds one model at a time and loads none twice: to come back to one, another takes its place.
    assert audit(log).problems() == []
    assert {e["model"] for e in log if e["event"] == "model_load"} == {*MODELS, "(guard)"}
    there, most = 0, 0
    for event in log:
        there += {"worker_start": 1, "worker_stop": -1}.get(event["event"], 0)
        most = max(most, there)
    assert most == workers


@pytest.mark.parametrize("model", MODELS)
def test_batch_sizes_and_padding(
    roots: dict[str, Path],
    checkpoints: dict[str, Path],
    existing_traces: Path,
    guards: dict[str, Path],
    model: str,
) -> None:
    """Scores of the 200 written traces: batches of 1, 7 and 32, padded left and right, to 1e-4."""
    folder = roots["inline"] / model
    loaded = load(study(checkpoints, existing_traces, guards["llama"]).model(model))
    readers = Readers.of(folder)
    traces = pq.read_table(folder / "traces.parquet").to_pylist()
    traces = [t for t in traces if t["set"] == "written"]
    assert len(traces) == 200
    reference = stored_scores(folder, [t["trace_id"] for t in traces])
    # One at a time on either side is the same sequence without padding; the others are padded for real.
    for batch, padding in ((1, "right"), (7, "left"), (7, "right"), (32, "left"), (32, "right")):
        scored: list[Any] = []
        for start in range(0, 200, batch):
            scored += read_traces(loaded, traces[start : start + batch], readers, padding=padding)
        for own, kept in zip(scored, reference, strict=True):
            for k, layer in enumerate(readers.reported):
                difference = np.abs(sigmoid(own.probes[k, layer]) - sigmoid(np.asarray(kept[k], dtype=np.float32)))
                assert difference.max() <= 1e-4


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def stored_scores(folder: Path, trace_ids: list[str]) -> list[list[list[float]]]:
    """Logits of each trace by probe, as the study stored them."""
    found: dict[str, list[list[float]]] = {}
    for row in pq.read_table(folder / "scores.parquet").to_pylist():
        found.setdefault(row["trace_id"], []).append(row["logits"])
    return [found[trace_id] for trace_id in trace_ids]
