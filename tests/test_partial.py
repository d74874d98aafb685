"""One model's failure never stops the others: it is told at the end, and the rest is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import clifflab
from clifflab.errors import ClifflabError
from tests.forkserver import Server
from tests.strengths import broken, checkpoint, nan
from tests.studies import events, parse, small_study


def study(models: dict[str, Path], **settings: Any) -> dict[str, Any]:
    data = small_study(name="part")
    data["models"] = [{"name": name, "path": str(path)} for name, path in models.items()]
    return data | {"report": {"figures": False}} | settings


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "broken": broken(root / "broken"),
        "good": checkpoint(root / "good", 1.0),
        "nan": nan(root / "nan"),
        "missing": root / "missing",
    }


@pytest.fixture(scope="module")
def partial(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, forkserver: Server) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("out")
    file = out / "part.yaml"
    file.write_text(yaml.safe_dump(study(folders)))
    process = forkserver.start(["run", str(file), "--out", str(out), "--runtime", "inline"], out, os.environ)
    _, errors = process.communicate(timeout=300)
    return out, (process.returncode, errors)


def test_the_rest_is_done(partial: tuple[Path, Any]) -> None:
    out, (code, errors) = partial
    assert code == 4, errors
    lines = [line for line in errors.splitlines() if line.startswith("clifflab: ")]
    assert [line.split(":")[1].strip() for line in lines] == ["missing", "broken", "nan", "partial"]
    assert "no such folder" in lines[0]
    assert "cannot be loaded" in lines[1]
    assert "not finite" in lines[2]
    assert "1 of 4 models are done" in lines[3]
    assert "Traceback" not in errors
    metrics = json.loads((out / "part" / "metrics.json").read_text())
    assert list(metrics["models"]) == ["good"]
    assert sorted(failure["model"] for failure in metrics["failed"]) == ["broken", "missing", "nan"]
    manifest = json.loads((out / "part" / "manifest.json").read_text())
    assert len(manifest["failed"]) == 3
    page = (out / "part" / "report.html").read_text()
    assert "broken" in page
    assert "missing" in page
    assert events(out / "part")[-1]["state"] == "partial"


def test_the_good_model_is_as_if_it_were_alone(
    partial: tuple[Path, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    alone = clifflab.run(parse(study({"good": folders["good"]})), tmp_path, runtime="inline").root
    for name in ("traces", "outcomes", "cliffs", "curves"):
        mine, other = (root / "good" / f"{name}.parquet" for root in (partial[0] / "part", alone))
        assert mine.read_bytes() == other.read_bytes(), name


def test_mended_models_are_all_that_is_computed(
    partial: tuple[Path, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(partial[0] / "part", tmp_path / "part")
    mended = folders | {"broken": folders["good"], "missing": folders["good"], "nan": folders["good"]}
    del mended["nan"], mended["missing"]
    result = clifflab.run(parse(study(mended)), tmp_path, runtime="inline")
    assert result.failed == []
    assert list(result.metrics["models"]) == ["broken", "good"]
    assert "failed" not in result.metrics
    log = events(tmp_path / "part")
    last = max(place for place, event in enumerate(log) if event["event"] == "run_start")
    assert {e["model"] for e in log[last:] if e["event"] == "unit" and e["step"] == "traces"} == {"broken"}
    assert not (tmp_path / "part" / ".work").exists()


def test_where_all_fail_the_first_error_is_told(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ClifflabError, match="cannot be loaded"):
        clifflab.run(parse(study({name: folders[name] for name in ("broken", "nan")})), tmp_path, runtime="inline")
