"""Stage ``report``: the figures of all models in ``metrics.json``, one HTML page, and its figures as files."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from clifflab.artifacts import code_hash, read_json, write_atomic, write_json, write_text
from clifflab.config import Study
from clifflab.stages.base import Context, Layout, Step, Unit
from clifflab.stages.metrics import study_metrics


class ReportStep(Step):
    """Draws each model's part, one unit each, and joins them."""

    name = "report"
    per_model = False
    loads = False
    tells_failures = True
    inputs = (
        "prompts", "duplicates", "traces", "judge", "guard", "probe", "controls", "cliff", "truncation", "heads",
        "head_sets", "ablation", "select", "tune", "curve", "evaluate",
    )  # fmt: skip
    suffix = ".zip"

    def reads(self, study: Study, file_hash: Callable[[Path], str]) -> Any:
        """The ground truth of models that have one: shown beside what was found, and known to no other step."""
        from clifflab.report.head_results import ground_truth_file

        files = {model.name: ground_truth_file(model) for model in study.models}
        found = {name: {"ground truth": file_hash(file)} for name, file in files.items() if file}
        return found or None

    def settings(self, study: Study) -> Any:
        """The study's name and its sets, and how the page is made: a new look draws the page anew, and nothing else."""
        return {
            "name": study.name,
            "sets": [prompt_set.name for prompt_set in study.prompts],
            "report": study.report.model_dump(mode="json"),
            "code": code_hash(("report",)),
        }

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """Metrics, page, list of figures, and the figures that it names: how many there are depends on the data."""
        index = layout.root / "figures" / "index.json"
        figures = [layout.root / entry[kind] for entry in read_json(index) or [] for kind in ("pdf", "png")]
        return [layout.root / "metrics.json", layout.root / "report.html", index, *figures]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """One unit a model."""
        return [
            Unit(self.name, None, f"{number:03d}-{spec.name}", {"number": number})
            for number, spec in enumerate(context.study.models)
        ]

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Draw one model's part; its file holds plain data for the page, and the figures."""
        from clifflab.models.loading import load_renderer
        from clifflab.report import ModelResults, draw_model

        number = unit.payload["number"]
        spec = context.study.models[number]
        results = ModelResults(context.study, spec.name, context.layout, load_renderer(spec))
        about, files = draw_model(results, number)

        def write(scratch: Path) -> None:
            with zipfile.ZipFile(scratch, "w") as archive:
                archive.writestr("about.json", json.dumps(about))
                for path, content in files.items():
                    archive.writestr(path, content)

        write_atomic(context.part(unit), write)
        return {"figures": len(about["index"])}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Put metrics, figures and page in place; figures of an earlier run that are no longer drawn go."""
        from clifflab.report import StudyResults, draw_study, provenance, render_page

        root, study = context.layout.root, context.study
        models: dict[str, Any] = {}
        files: dict[str, bytes] = {}
        for unit, spec in zip(self.plan(context, None), study.models, strict=True):
            with zipfile.ZipFile(context.part(unit)) as archive:
                models[spec.name] = json.loads(archive.read("about.json"))
                files |= {name: archive.read(name) for name in archive.namelist() if name != "about.json"}
        failed = context.identities.failed
        metrics = study_metrics(study, context.layout, failed)
        results = StudyResults(study, metrics, models, failed)
        overall = draw_study(results)
        files |= overall.files
        origin = provenance(study, context.identities, {name: about["template"] for name, about in models.items()})
        page = render_page(results, overall, origin)
        for name, content in files.items():
            write_atomic(root / name, partial(_put, content))
        index = [entry for about in models.values() for entry in about["index"]]
        write_json(root / "figures" / "index.json", [*overall.index, *index])
        for path in (root / "figures").rglob("*.*"):
            if path.suffix in (".pdf", ".png") and path.relative_to(root).as_posix() not in files:
                path.unlink()
        write_text(root / "report.html", page)
        write_json(root / "metrics.json", metrics)
        return {"models": len(models), "figures": len(files) // 2}


def _put(content: bytes, scratch: Path) -> None:
    scratch.write_bytes(content)
