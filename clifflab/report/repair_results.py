"""What a repair wrote, in the form in which the report shows it: the choice, the tuning, and before against after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from clifflab.artifacts import read_json, read_parquet
from clifflab.report.corpus_results import Family, family

MEASURES = ("asr", "over_refusal", "unclosed", "degenerate")
CHOSEN_AS = ("cliff case", "harmful, answered", "harmful, refused", "unlabelled", "benign")
ATTACKED, HARMLESS = ("harmful", "mixed"), ("benign", "mixed")
Figure = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RepairFound:
    """How the examples of a model's repair were chosen, and how the tuning on them went.

    Attributes:
        selection: ``selection.json``; empty where there is none.
        tuning: ``tuning.json``; empty where nothing was tuned.
        rows: Rows of ``selection.parquet``.
    """

    selection: Mapping[str, Any]
    tuning: Mapping[str, Any]
    rows: Rows = ()

    @cached_property
    def selectors(self) -> list[str]:
        """Who chose, the study's own selector first."""
        names = list(self.selection.get("selectors", {}))
        return sorted(names, key=lambda name: name != self.selection["by"])

    def kinds(self, selector: str, plateau: float) -> Counter[str]:
        """How many of a selector's examples are of which kind (:data:`CHOSEN_AS`).

        Args:
            selector: Its name.
            plateau: Least plateau of a cliff case.
        """
        counts: Counter[str] = Counter()
        for row in self.rows:
            if row["selector"] == selector:
                counts[_kind(row, plateau)] += 1
        return counts

    def chosen_ids(self, selector: str) -> list[str]:
        """Traces that a selector chose, those with the model's own answer as target left out."""
        return [r["trace_id"] for r in self.rows if r["selector"] == selector and r["role"] != "benign"]

    def families(self, selector: str) -> Counter[Family]:
        """How many of a selector's examples are of which family and label."""
        mine = [row for row in self.rows if row["selector"] == selector]
        return Counter((family(row["set"], row["category"]), row["label"]) for row in mine)

    @cached_property
    def attacks(self) -> list[str]:
        """Families of the harmful examples that the model learnt from, the largest first."""
        mine = [r for r in self.rows if r["selector"] == self.selection["by"] and r["role"] != "benign"]
        return [name for name, _ in Counter(family(row["set"], row["category"]) for row in mine).most_common()]


def _kind(row: Mapping[str, Any], plateau: float) -> str:
    if row["role"] == "benign" or row["label"] == "benign":
        return "benign"
    if row["label"] != "harmful":
        return "unlabelled"
    if row["outcome"] != "complied":
        return "harmful, refused"
    return "cliff case" if row["plateau"] is not None and row["plateau"] >= plateau else "harmful, answered"


@dataclass(frozen=True)
class Compared:
    """One set of prompts, or a pool of sets, before and after.

    Attributes:
        name: The set's name, or the pool's.
        label: ``harmful``, ``benign`` or ``mixed``.
        prompts: How many.
        rates: Of each measure ``before``, ``after`` and the paired ``change``.
        sets: The sets of a pool; empty for a set.
        unreadable: Answers of the guard that could not be read, ``before`` and ``after``.
    """

    name: str
    label: str
    prompts: int
    rates: Mapping[str, Mapping[str, Figure]]
    sets: tuple[str, ...] = ()
    unreadable: Mapping[str, int] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name of its row."""
        return f"pool {self.name}" if self.sets else self.name

    def at(self, measure: str, when: str) -> Figure:
        """A rate; empty where there is none."""
        return self.rates.get(measure, {}).get(when) or {}

    def has(self, measure: str) -> bool:
        """Whether both models have this rate."""
        return all(self.at(measure, when).get("mean") is not None for when in ("before", "after"))


@dataclass(frozen=True)
class EvaluationFound:
    """A model beside the one that it was made from.

    Attributes:
        about: ``evaluation.json``.
        rows: Rows of ``evaluation.parquet``; empty where only figures are asked for.
    """

    about: Mapping[str, Any]
    rows: Rows = ()

    @property
    def reason(self) -> str:
        """Why nothing was compared; empty where something was."""
        return str(self.about.get("reason") or "")

    @property
    def by_guard(self) -> bool:
        """Whether a guard judged harm."""
        return bool(self.about["judged_by"] == "guard")

    @cached_property
    def sets(self) -> list[Compared]:
        """The sets, in the study's order."""
        return [_compared(name, entry) for name, entry in self.about["sets"].items()]

    @cached_property
    def pools(self) -> list[Compared]:
        """Sets that are judged together."""
        return [_compared(name, entry) for name, entry in self.about.get("pools", {}).items()]

    def of(self, measure: str) -> list[Compared]:
        """Sets, then pools, that have a rate on both sides."""
        labels = {"asr": ATTACKED, "over_refusal": HARMLESS}.get(measure)
        every = [*self.sets, *self.pools]
        return [entry for entry in every if (labels is None or entry.label in labels) and entry.has(measure)]

    @property
    def strongest(self) -> Compared | None:
        """The set that is attacked most successfully to begin with."""
        found = [entry for entry in self.of("asr") if not entry.sets]
        return max(found, key=lambda entry: entry.at("asr", "before")["mean"], default=None)

    @property
    def costliest(self) -> Compared | None:
        """The benign set with the highest over-refusal afterwards."""
        found = [entry for entry in self.of("over_refusal") if not entry.sets]
        return max(found, key=lambda entry: entry.at("over_refusal", "after")["mean"], default=None)

    @property
    def perplexity(self) -> Mapping[str, Any]:
        """Benign perplexity ``before``, ``after``, their paired ``ratio`` and the ``tokens``; maybe a ``reason``."""
        return self.about.get("perplexity") or {}

    @property
    def ratio(self) -> Figure | None:
        """Benign perplexity as a multiple of what it was; ``None`` where it was not measured."""
        found = self.perplexity.get("ratio") or {}
        return found if found.get("mean") is not None else None

    def rising(self, *measures: str) -> list[str]:
        """Sets in which one of these rates rises, by an interval of the paired change above 0."""
        return [s.name for s in self.sets if any((s.at(m, "change").get("low") or 0.0) > 0 for m in measures)]

    @property
    def choices(self) -> dict[str, Mapping[str, Any]]:
        """The multiple-choice sets that were answered."""
        every: Mapping[str, Mapping[str, Any]] = self.about.get("choices") or {}
        return {name: entry for name, entry in every.items() if (entry.get("after") or {}).get("mean") is not None}

    def transitions(self, label: str) -> Counter[tuple[str, str]]:
        """How many traces of a label went from which outcome to which."""
        return Counter((r["outcome_before"], r["outcome_after"]) for r in self.rows if r["label"] == label)

    def missing(self) -> list[str]:
        """What was not measured, with its reason, in the order of the file; excess cliffs say theirs themselves."""
        told = {name: part for name, part in self.about.items() if name not in ("reason", "excess_cliff")}
        return list(dict.fromkeys(_reasons(told, ())))


def _compared(name: str, entry: Mapping[str, Any]) -> Compared:
    sets, unreadable = tuple(entry.get("sets", ())), entry.get("unreadable") or {}
    return Compared(name, entry["label"], entry["prompts"], entry["rates"], sets, unreadable)


def _reasons(node: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Reasons of figures that are null; those of intervals stand beside their means."""
    if not isinstance(node, Mapping):
        return
    if node.get("reason") and node.get("mean") is None:
        yield f"{', '.join(part.replace('_', ' ') for part in path)}: {node['reason']}"
    for key, child in node.items():
        yield from _reasons(child, path if key in ("sets", "rates", "pools") else (*path, str(key)))


def read_repair(folder: Path) -> RepairFound | None:
    """What a model's repair wrote into its folder; ``None`` where it was not part of the study.

    Args:
        folder: The model's folder.
    """
    found = [read_json(folder / "repair" / f"{name}.json") for name in ("selection", "tuning")]
    if not any(found):
        return None
    file = folder / "repair" / "selection.parquet"
    return RepairFound(found[0] or {}, found[1] or {}, read_parquet(file).to_pylist() if file.is_file() else ())


def read_evaluation(folder: Path) -> EvaluationFound | None:
    """What the comparison with another model wrote; ``None`` for a model that is compared with none.

    Args:
        folder: The folder of the later model.
    """
    about = read_json(folder / "evaluation.json")
    if not about:
        return None
    file = folder / "evaluation.parquet"
    columns = ["label", "outcome_before", "outcome_after"]
    rows = read_parquet(file).select(columns).to_pylist() if file.is_file() else ()
    return EvaluationFound(about, rows)
