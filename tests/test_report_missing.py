"""A study some of whose models failed says so at the top of its page, and in its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clifflab.report import StudyResults, render_page
from clifflab.report.blocks import pack
from clifflab.stages.base import Layout
from clifflab.stages.metrics import study_metrics
from tests.browser import Elements
from tests.studies import parse, small_study

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> {{ 7*7 }}\x1b[2J\u202e"
FAILED = [
    {"model": "weak", "step": "traces", "error": f"cannot be read: {HOSTILE}; s3://me:secret@bucket/x"},
    {"model": "big", "step": None, "error": "the weights need 141 GB\nand a GPU has 80 GB"},
    {"model": "big", "step": "probe", "error": "told a second time"},
]


def page_of(failed: Any, root: Path) -> str:
    study = parse(small_study(models=[{"name": name, "path": "organism:planted"} for name in ("weak", "big")]))
    metrics = study_metrics(study, Layout(root), FAILED)
    results = StudyResults(study, metrics, {}, failed)
    origin = {"version": "0", "seed": 0, "models": [], "sources": {}, "reads": {}, "packages": {}, "settings": ""}
    return render_page(results, pack([], "figures", "study", False), origin)


def test_missing_models_are_named_first(tmp_path: Path) -> None:
    page = page_of(FAILED, tmp_path)
    notice = page[page.index('<section class="missing"') : page.index('<section class="short"')]
    assert "Incomplete: 2 of 2 models are missing" in notice
    assert "<strong>weak</strong>, at traces: cannot be read: &lt;script&gt;alert(1)" in notice
    assert "<strong>big</strong>: the weights need 141 GB and a GPU has 80 GB" in notice
    assert "{{ 7*7 }}\\x1b[2J\\u202e" in notice
    assert "told a second time" not in page
    assert "secret" not in page
    assert not {tag for tag, _ in Elements(page).found} & {"script", "img"}


def test_a_whole_study_has_no_notice(tmp_path: Path) -> None:
    assert "Incomplete" not in page_of((), tmp_path)
    assert 'class="missing"' not in page_of((), tmp_path)


def test_metrics_name_what_failed_and_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clifflab.stages.metrics.model_metrics", lambda study, layout, name: {"of": name})
    study = parse(small_study(models=[{"name": name, "path": "organism:planted"} for name in ("weak", "whole")]))
    found = study_metrics(study, Layout(tmp_path), FAILED[:1])
    assert found["models"] == {"whole": {"of": "whole"}}
    assert [(entry["model"], entry["step"]) for entry in found["failed"]] == [("weak", "traces")]
    assert "secret" not in found["failed"][0]["error"]
    assert "failed" not in study_metrics(study, Layout(tmp_path))
