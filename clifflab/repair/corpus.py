"""A scored corpus as columns: one row a trace, with everything that a choice of examples needs and no text.

Shape suffixes: N traces.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clifflab.config import SelectConfig
from clifflab.errors import InputError
from clifflab.repair.columns import CODE, SCORES, check_models, check_stratify, in_full, probe_rows
from clifflab.repair.texts import usable_target
from clifflab.science.selection import (
    JUDGES,
    RANKINGS,
    Codes,
    Ints,
    Keys,
    Rules,
    Texts,
    draw_keys,
    eligibility,
    id_codes,
    measures_of,
    score_keys,
)
from clifflab.science.stats import Floats

REFUSED, COMPLIED = "refused", "complied"


@dataclass(frozen=True)
class Corpus:
    """Traces with scores, labels and verdicts.

    Attributes:
        table: Columns ``COLUMNS`` and further text columns, a row a trace.
        total: Traces of the whole corpus, of which the table may hold only those that can be chosen.
    """

    table: pa.Table
    total: int
    _kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        traces: pa.Table,
        outcomes: pa.Table,
        cliffs: pa.Table,
        probe: str,
        guard: pa.Table | None = None,
        prompts: pa.Table | None = None,
        *,
        rewrite: bool = False,
    ) -> Corpus:
        """Join the tables of a study's corpus; traces that are not scored stay, without scores.

        Args:
            traces: ``tables.TRACES``.
            outcomes: ``tables.OUTCOMES``, row for row with the traces.
            cliffs: ``tables.CLIFFS``.
            probe: Training positions of the probe whose scores count.
            guard: ``tables.GUARD``.
            prompts: ``tables.PROMPTS``, for the category and the target.
            rewrite: Whether a harmful example needs a target of the prompts.

        Raises:
            InputError: The scores are of more than one model, or of other traces.
        """
        ids = traces["trace_id"].combine_chunks()
        own = probe_rows(cliffs, probe).select(["trace_id", "cluster", *SCORES])
        places = _places(own["trace_id"], ids)
        columns: dict[str, Any] = {
            name: traces[name].combine_chunks()
            for name in ("model", "trace_id", "id", "set", "label", "group", "finish_reason")
        }
        columns["outcome"] = outcomes["outcome"].combine_chunks()
        columns["tokens"] = pc.list_value_length(traces["token_ids"]).cast(pa.int32())
        columns["thinking_tokens"] = pc.subtract(traces["closing_start"], traces["thinking_start"])
        columns["closing_tokens"] = pc.subtract(traces["response_start"], traces["closing_start"])
        columns |= {name: own[name].combine_chunks().take(places) for name in ("cluster", *SCORES)}
        if guard is not None and guard.num_rows:
            columns["verdict"] = guard["verdict"].combine_chunks().take(_places(guard["trace_id"], ids))
        if prompts is not None:
            names, asked = (pc.binary_join_element_wise(t["set"], t["id"], "/") for t in (prompts, traces))
            places = _places(names, asked)
            columns["category"] = prompts["category"].combine_chunks().take(places)
            if rewrite:
                usable = pa.array([usable_target(text) for text in prompts["target"].to_pylist()], pa.bool_())
                columns["has_target"] = pc.fill_null(usable.take(places), False)
        table = in_full(pa.table({name: _flat(column) for name, column in columns.items()}))
        return cls.checked(table, table.num_rows)

    @classmethod
    def checked(cls, table: pa.Table, total: int) -> Corpus:
        """A corpus of one model whose traces have names of their own.

        Raises:
            InputError: They have not.
        """
        models = pc.unique(table["model"]).to_pylist()
        check_models(models)
        check_once(table)
        return cls(table, total)

    def strings(self, name: str) -> Texts:
        """A text column, ``[N]``; null is the empty text. Rows of equal text share it, which saves memory."""

        def read() -> Texts:
            coded = pc.fill_null(_flat(self.table[name]), "").dictionary_encode()
            if isinstance(coded, pa.ChunkedArray):
                coded = coded.combine_chunks()
            texts: Texts = np.asarray(coded.dictionary.to_pylist(), dtype=object)
            return texts[coded.indices.to_numpy(zero_copy_only=False)] if len(coded) else np.zeros(0, dtype=object)

        found: Texts = self._keep(name, read)
        return found

    def floats(self, name: str) -> Floats:
        """A number column, ``[N]``; null is NaN."""
        found: Floats = self._keep(name, lambda: self.table[name].cast(pa.float64()).to_numpy(zero_copy_only=False))
        return found

    def _keep(self, name: str, make: Any) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    @property
    def codes(self) -> Codes:
        """Hash of each trace's id, ``[N]``."""

        def read() -> Codes:
            if CODE in self.table.schema.names:
                return np.asarray(self.table[CODE].to_numpy(), np.uint64)
            return id_codes(self.table["trace_id"].to_pylist())

        found: Codes = self._keep(CODE, read)
        return found

    def take(self, rows: Ints) -> pa.Table:
        """Some rows, with the hash of their ids, so that it is computed once."""
        table = self.table
        if CODE not in table.schema.names:
            table = table.append_column(CODE, pa.array(self.codes))
        return table.take(pa.array(rows, pa.int64()))

    @property
    def labelled(self) -> npt.NDArray[np.bool_]:
        """Which traces have a label, ``[N]``."""
        return np.isin(self.strings("label").astype(str), ("harmful", "benign"))

    def why_not(self, rules: Rules, *, blind: bool = False) -> npt.NDArray[np.int8]:
        """Why each trace is not eligible: an index into ``REASONS``, ``[N]``.

        Args:
            rules: What makes a trace eligible.
            blind: As if no trace had a label.
        """
        labels = self.strings("label")
        return eligibility(
            np.full(len(labels), "", dtype=object) if blind else labels,
            self.strings("outcome"),
            {name: self.floats(name) for name in SCORES},
            np.nan_to_num(self.floats("thinking_tokens")).astype(np.int64),
            self.floats("tokens"),
            rules,
            self.floats("has_target") == 0,
        )

    def eligible(self, rules: Rules, *, blind: bool = False) -> Ints:
        """Rows of the eligible traces."""
        return np.flatnonzero(self.why_not(rules, blind=blind) == 0)

    @property
    def cut(self) -> npt.NDArray[np.bool_]:
        """Which traces ran into the limit of tokens, ``[N]``: their responses break off."""
        return np.asarray(self.strings("finish_reason") == "length")

    @property
    def judged(self) -> bool:
        """Whether there are verdicts of a guard."""
        return bool(self.table["verdict"].null_count < self.table.num_rows)

    @property
    def safe(self) -> npt.NDArray[np.bool_]:
        """Which traces the guard calls safe, ``[N]``; all where there are no verdicts."""
        if not self.judged:
            return np.ones(self.table.num_rows, dtype=bool)
        return np.asarray(self.strings("verdict") == "safe")

    def benign(self, rules: Rules) -> Ints:
        """Rows of labelled benign requests that were answered to the end, of a length that the rules allow.

        A trace without a label never counts: what no probe found harmful may be harmful all the same.
        """
        return np.flatnonzero(self._answered(rules) & ~self.cut)

    def _answered(self, rules: Rules) -> npt.NDArray[np.bool_]:
        answered = (self.strings("label") == "benign") & (self.strings("outcome") == COMPLIED)
        answered &= ~(self.floats("thinking_tokens") < rules.min_thinking)
        if rules.max_tokens is not None:
            answered &= self.floats("tokens") <= rules.max_tokens
        return np.asarray(answered)

    def refusers(self, rules: Rules) -> Ints:
        """Rows of harmful requests that were refused to the end, which can lend their refusals."""
        return np.flatnonzero(self._refused(rules) & ~self.cut)

    def cut_off(self, rules: Rules) -> dict[str, int]:
        """How many responses are not used since they break off: benign answers, and refusals that could be lent."""
        answers, refusals = self._answered(rules) & self.cut, self._refused(rules) & self.cut
        return {"benign": int(answers.sum()), "refusals": int(refusals.sum())}

    def _refused(self, rules: Rules) -> npt.NDArray[np.bool_]:
        labels, plateau = self.strings("label"), self.floats("plateau")
        harmful = (labels == "harmful") | (~self.labelled & (plateau >= rules.plateau))
        return np.asarray(harmful & (self.strings("outcome") == REFUSED) & self.safe)

    def cliff_cases(self, rules: Rules) -> npt.NDArray[np.bool_]:
        """Harm recognised in the thinking and then answered, ``[N]``: complied with, and a high plateau."""
        harmful = self.strings("label") != "benign"
        return np.asarray(harmful & (self.strings("outcome") == COMPLIED) & (self.floats("plateau") >= rules.plateau))

    def named_by(self, judge: str) -> npt.NDArray[np.bool_]:
        """Traces that a judge names for a repair, ``[N]``."""
        column, word = JUDGES[judge]
        return np.asarray(self.strings(column) == word)

    def keys(self, selector: str, rows: Ints, seed: int) -> Keys:
        """Keys of a selector's ranking of some rows."""
        ids = self.strings("trace_id")[rows]
        if selector in RANKINGS:
            measure, sign = RANKINGS[selector]
            return score_keys(self.floats(measure)[rows], self.floats(f"{measure}_logit")[rows], ids, sign)
        named = self.named_by(selector)[rows] if selector in JUDGES else None
        return draw_keys(ids, self.codes[rows], seed, f"select {selector}", named)

    def strata(self, column: str | None, rows: Ints) -> Texts | None:
        """Values of the column that shares the budget, of some rows.

        Raises:
            InputError: There is no such column, or it is empty.
        """
        if column is None:
            return None
        check_stratify(column, self.table.schema)
        if self.table[column].null_count == self.table.num_rows:
            raise InputError("stratify", column, "the column is empty", "give another column, or none")
        return self.strings(column)[rows]


def check_once(table: pa.Table) -> None:
    """Whether every trace stands in one row.

    Raises:
        InputError: One is scored twice.
    """
    counted = pc.value_counts(table["trace_id"])
    twice = counted.filter(pc.greater(counted.field("counts"), 1))
    if len(twice):
        problem = "is scored twice: it stands in several rows of one probe"
        raise InputError("scores", twice.field("values")[0], problem, "give each trace, and each file, once")


def rules_of(settings: SelectConfig, selectors: Collection[str] = ()) -> Rules:
    """What makes a trace eligible: for all selectors of the settings alike, and for those named here."""
    return Rules(
        outcomes=settings.outcomes,
        plateau=settings.plateau,
        min_thinking=settings.min_thinking,
        max_tokens=settings.max_tokens,
        measures=measures_of({settings.by, *settings.beside, *selectors}),
    )


def _places(keys: Any, wanted: Any) -> Any:
    """Row of each wanted key; null where there is none."""
    return pc.index_in(_flat(wanted), value_set=_flat(keys))


def _flat(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
