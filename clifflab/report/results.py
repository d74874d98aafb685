"""What a study has written about one model, as the report reads it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clifflab.artifacts import read_json, read_parquet
from clifflab.config import ModelSpec, Study
from clifflab.report.ablation_results import AblationFound, read_ablation
from clifflab.report.head_results import HeadsFound, read_heads
from clifflab.report.repair_results import EvaluationFound, RepairFound, read_evaluation, read_repair
from clifflab.science.stats import Floats
from clifflab.stages.base import Layout
from clifflab.stages.metrics import model_metrics
from clifflab.text import Renderer


@dataclass(frozen=True)
class ModelResults:
    """One model's tables, read when they are asked for.

    Attributes:
        study: The study.
        name: The model's name.
        layout: Where the study's files are.
        renderer: Turns its token ids into text.
    """

    study: Study
    name: str
    layout: Layout
    renderer: Renderer

    @cached_property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.study.model(self.name)

    @property
    def folder(self) -> Path:
        """Folder of its tables."""
        return self.layout.folder(self.name)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The model's part of ``metrics.json``."""
        return model_metrics(self.study, self.layout, self.name)

    @cached_property
    def probes(self) -> dict[str, Any]:
        """``probes.json``."""
        return dict(read_json(self.folder / "probes.json"))

    @property
    def trained(self) -> bool:
        """Whether there are scores."""
        return bool(self.probes["trained"])

    @property
    def closing(self) -> list[str]:
        """Texts of the most frequent closing tokens."""
        return list(self.summary["closing"]["tokens"])

    @cached_property
    def labels(self) -> dict[str, str]:
        """Label of each set, ``mixed`` where its rows' own labels differ."""
        held: dict[str, set[str]] = {p.name: set() for p in self.study.prompts}
        for name, label in zip(self.traces["set"].to_pylist(), self.traces["label"].to_pylist(), strict=True):
            held[name].add(label)
        return {
            p.name: "mixed" if len(held[p.name]) > 1 else next(iter(held[p.name]), p.label) for p in self.study.prompts
        }

    def sets(self, label: str | None = None) -> list[str]:
        """Names of the sets of a label, or of all, in the study's order."""
        return [name for name, own in self.labels.items() if label in (None, own)]

    def layer(self, positions: str) -> int:
        """Reported layer of the logistic probe trained at these positions."""
        return int(self.summary["probe"][positions]["layer"])

    @cached_property
    def curves(self) -> pa.Table:
        """``curves.parquet`` of the logistic probes, all outcomes together."""
        table = read_parquet(self.folder / "curves.parquet")
        return table.filter(pc.and_(pc.equal(table["outcome"], "any"), pc.equal(table["estimator"], "logistic")))

    @cached_property
    def cliffs(self) -> pa.Table:
        """``cliffs.parquet`` of unseen groups at the reported layer of the logistic all-position probe."""
        table = read_parquet(self.folder / "cliffs.parquet")
        table = table.filter(pc.and_(table["reported"], pc.is_in(table["split"], pa.array(["test", "ood"]))))
        return table.filter(
            pc.and_(pc.equal(table["train_positions"], "all"), pc.equal(table["estimator"], "logistic"))
        )

    @cached_property
    def traces(self) -> pa.Table:
        """``traces.parquet``."""
        return read_parquet(self.folder / "traces.parquet")

    @cached_property
    def rejects(self) -> dict[str, int]:
        """How many rows did not become a scored trace, by stage and reason."""
        table = read_parquet(self.folder / "rejects.parquet")
        counts: dict[str, int] = {}
        for stage, reason in zip(table["stage"].to_pylist(), table["reason"].to_pylist(), strict=True):
            counts[f"{stage}: {reason}"] = counts.get(f"{stage}: {reason}", 0) + 1
        return counts

    @cached_property
    def heads(self) -> HeadsFound | None:
        """What the search for suppression heads found, and the model's own ground truth beside it."""
        return read_heads(self.folder, self.spec)

    @cached_property
    def ablation(self) -> AblationFound | None:
        """What the model did with heads removed."""
        return read_ablation(self.folder, self.study.heads.fraction)

    @cached_property
    def repair(self) -> RepairFound | None:
        """How examples for a repair of this model were chosen, and how the tuning on them went."""
        return read_repair(self.folder)

    @cached_property
    def repair_of_before(self) -> RepairFound | None:
        """The same of the model that this one is the repair of."""
        return read_repair(self.layout.folder(self.spec.repairs)) if self.spec.repairs else None

    @cached_property
    def evaluation(self) -> EvaluationFound | None:
        """This model beside the one that it is compared with."""
        return read_evaluation(self.folder)

    def token_logits(self, row: int) -> Floats:
        """Logits of a trace's scored tokens, by the logistic all-position probe at its reported layer, ``[T]``."""
        table = self._scores
        found = table.filter(pc.equal(table["row"], row))["logits"].to_pylist()
        return np.asarray(found[0], dtype=np.float64)

    @cached_property
    def _scores(self) -> pa.Table:
        table = read_parquet(self.folder / "scores.parquet")
        return table.filter(
            pc.and_(pc.equal(table["train_positions"], "all"), pc.equal(table["estimator"], "logistic"))
        )
