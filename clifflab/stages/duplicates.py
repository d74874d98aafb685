"""Stage ``duplicates``: which prompts ask the same in the same or similar words, within and across sets.

It stands beside the generation and not before it: another threshold changes splits and intervals, but no trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clifflab import tables
from clifflab.artifacts import read_parquet, write_json, write_parquet
from clifflab.config import Study
from clifflab.data.clusters import Requests, find_clusters
from clifflab.data.duplicates import near_pairs
from clifflab.science.probe import OOD, split_groups
from clifflab.stages.base import Context, Layout, Step, Unit

_PAIRS = pa.schema([("left", pa.int64()), ("right", pa.int64()), ("similarity", pa.float64())])


class DuplicatesStep(Step):
    """Near-duplicate pairs of all requests are one unit; the clusters and the report follow from them."""

    name = "duplicates"
    per_model = False
    loads = False
    inputs = ("prompts",)

    def settings(self, study: Study) -> Any:
        """What counts as near, which sets are out of distribution, and whose hashes propose the candidates."""
        return {
            "duplicates": study.duplicates.model_dump(mode="json"),
            "ood": _ood(study),
            "datasketch": metadata.version("datasketch"),
        }

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """Cluster of every prompt, the pairs behind them, and the contamination report."""
        return [layout.root / name for name in ("clusters.parquet", "duplicates.parquet", "duplicates.json")]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """One unit: a pair may span any two sets."""
        return [Unit(self.name, None, "pairs")]

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Find the near-duplicate pairs of distinct requests."""
        settings = context.study.duplicates
        requests = self._requests(context)
        columns = near_pairs(
            requests.normals if settings.enabled else [],
            threshold=settings.threshold,
            ngram=settings.ngram,
            permutations=settings.permutations,
            seed=context.study.seed,
        )
        write_parquet(context.part(unit), pa.table(list(columns), schema=_PAIRS))
        return {"rows": len(requests.prompts), "texts": len(requests.normals), "pairs": len(columns[0])}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Join groups into clusters and write the figures."""
        requests = self._requests(context)
        part = read_parquet(context.part(self.plan(context, None)[0]))
        left, right, similarity = (np.asarray(part[name]) for name in _PAIRS.names)
        found = find_clusters(requests, (left, right, similarity), _ood(context.study))
        out, out_links, out_report = self.outputs(context.layout, None)
        columns: dict[str, Any] = {
            name: [prompt[name] for prompt in requests.prompts] for name in ("row", "id", "set", "label", "group")
        }
        columns |= {"cluster": found.clusters, "label_conflict": found.conflicts}
        write_parquet(out, pa.table(columns, schema=tables.CLUSTERS))
        write_parquet(out_links, pa.Table.from_pylist(found.links, schema=tables.DUPLICATES))
        write_json(out_report, {**context.study.duplicates.model_dump(mode="json"), **found.report})
        return {"clusters": len(set(found.clusters)), "links": len(found.links)}

    def _requests(self, context: Context) -> Requests:
        path = context.layout.root / "prompts.parquet"
        columns = ["row", "id", "set", "label", "group", "messages"]
        return context.once("requests", [path], lambda: Requests.of(context.table(path).select(columns).to_pylist()))


def group_clusters(context: Context) -> dict[str, str]:
    """Cluster of every group of the study's prompts."""
    path = _path(context)
    return context.once("group_clusters", [path], lambda: _columns(context.table(path), "group", "cluster"))


def group_splits(context: Context) -> dict[str, str]:
    """Split of every group of the study's prompts, the same for all groups of a cluster.

    A cluster is ``ood`` where all its prompts are of out-of-distribution sets: what a prompt of another set asks too is
    no test out of distribution. All others are assigned within their label, harmful where one of their prompts is.
    """
    path = _path(context)
    return context.once("group_splits", [path], lambda: _splits(context.table(path), context.study))


def held_out_sets(study: Study) -> frozenset[str]:
    """Sets that no probe may be trained on, whatever their clusters share with others."""
    return frozenset(prompt_set.name for prompt_set in study.prompts if prompt_set.ood)


def _splits(table: pa.Table, study: Study) -> dict[str, str]:
    rows = table.select(["set", "label", "group", "cluster"]).to_pylist()
    ood = _ood(study)
    labels: dict[str, str] = {}
    for row in rows:
        if not ood[row["set"]]:
            labels[row["cluster"]] = row["label"] if labels.get(row["cluster"]) != "harmful" else "harmful"
    splits = split_groups(labels, study.probe.train_share, study.seed)
    return {row["group"]: splits.get(row["cluster"], OOD) for row in rows}


def _ood(study: Study) -> Mapping[str, bool]:
    return {prompt_set.name: prompt_set.ood for prompt_set in study.prompts}


def _path(context: Context) -> Path:
    return context.layout.root / "clusters.parquet"


def _columns(table: pa.Table, key: str, value: str) -> dict[str, str]:
    return dict(zip(table[key].to_pylist(), table[value].to_pylist(), strict=True))
