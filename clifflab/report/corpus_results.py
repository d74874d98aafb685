"""What a study wrote of a repair's corpus, read by columns: scores, families, and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clifflab.science.stats import Floats

Family = tuple[str, str]  # category (or set), and label


def family(name: str, category: str | None) -> str:
    """What a request of the corpus belongs to: its category, or its set where it has none."""
    return category or name


@dataclass(frozen=True)
class CorpusScores:
    """One score of every corpus trace that has it.

    Attributes:
        measure: Which score.
        kinds: The scores by kind of trace, ``[N]`` each.
        chosen: Those of the chosen traces, ``[K]``.
    """

    measure: str
    kinds: Mapping[str, Floats]
    chosen: Floats


def corpus_scores(folder: Path, measure: str, positions: str, chosen: Sequence[str]) -> CorpusScores | None:
    """Scores of a model's corpus, read by columns; ``None`` where the corpus was not scored here.

    Args:
        folder: The model's folder.
        measure: A column of ``cliffs.parquet``.
        positions: Training positions of the probe that ranked.
        chosen: ``trace_id`` of the chosen traces.
    """
    file = folder / "corpus" / "cliffs.parquet"
    if not file.is_file():
        return None
    keep = [("train_positions", "=", positions), ("estimator", "=", "logistic"), ("reported", "=", True)]
    table = pq.read_table(file, columns=["trace_id", "label", "outcome", measure], filters=keep)
    table = table.filter(pc.is_valid(table[measure]))
    own = pc.is_in(table["trace_id"], pa.array(chosen, pa.string()))
    masks = {
        "harmful, answered": pc.and_(pc.equal(table["label"], "harmful"), pc.equal(table["outcome"], "complied")),
        "harmful, refused": pc.and_(pc.equal(table["label"], "harmful"), pc.equal(table["outcome"], "refused")),
        "benign": pc.equal(table["label"], "benign"),
        "unlabelled": pc.invert(pc.is_in(table["label"], pa.array(["harmful", "benign"]))),
    }
    kinds = {name: _column(table.filter(mask), measure) for name, mask in masks.items()}
    return CorpusScores(measure, {k: v for k, v in kinds.items() if len(v)}, _column(table.filter(own), measure))


def _column(table: pa.Table, name: str) -> Floats:
    return np.asarray(table[name].to_numpy(), dtype=np.float64)


def corpus_families(root: Path, folder: Path) -> dict[Family, Counter[str]] | None:
    """Outcomes of the corpus by family and label, the largest first; ``None`` where the study does not hold the corpus.

    Args:
        root: The study's folder.
        folder: The model's folder.
    """
    files = [root / "corpus.parquet", folder / "corpus" / "traces.parquet", folder / "corpus" / "outcomes.parquet"]
    if not all(file.is_file() for file in files):
        return None
    prompts, traces, outcomes = (
        pq.read_table(file, columns=columns)
        for file, columns in zip(files, (["set", "id", "category"], ["set", "id", "label"], ["outcome"]), strict=True)
    )
    joined = traces.append_column("outcome", outcomes["outcome"]).join(prompts, ["set", "id"])
    keys = ["set", "category", "label", "outcome"]
    found: dict[Family, Counter[str]] = {}
    for row in joined.group_by(keys).aggregate([([], "count_all")]).to_pylist():
        own = family(row["set"], row["category"]), row["label"]
        found.setdefault(own, Counter())[row["outcome"]] += row["count_all"]
    return dict(sorted(found.items(), key=lambda item: (-item[1].total(), item[0])))


def corpus_rejects(root: Path) -> dict[str, int]:
    """Corpus requests that were left out before any trace was written, by reason."""
    file = root / "corpus_rejects.parquet"
    return dict(Counter(pq.read_table(file, columns=["reason"])["reason"].to_pylist())) if file.is_file() else {}
