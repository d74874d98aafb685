"""Stage ``evaluate``: a tuned model beside the one before it, prompt by prompt (SPEC sections 5 and 6)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clifflab import tables
from clifflab.artifacts import read_parquet, write_json, write_parquet
from clifflab.config import ModelSpec, Study
from clifflab.data.choices import Question
from clifflab.data.files import source_hash
from clifflab.errors import TraceError
from clifflab.models.loading import LoadedModel
from clifflab.models.perplexity import Reading, total_nll
from clifflab.science.cliff import MEASURES, measure
from clifflab.science.probe import TRAIN_POSITIONS
from clifflab.stages.base import Context, Layout, Step, Unit, chunks
from clifflab.stages.corpus_cliff import read_logistic
from clifflab.stages.evaluation_figures import evaluation_figures
from clifflab.stages.evaluation_plan import (
    AFTER,
    BEFORE,
    CHOICES,
    TEXTS,
    TRACES,
    benign_texts,
    closed_traces,
    model_before,
    no_old_probe,
    no_texts,
    questions,
)
from clifflab.stages.readout import kept_readers
from clifflab.stages.traces import spans_of


class EvaluateStep(Step):
    """Both models have gone through the other steps; what only a comparison needs is read here.

    A unit is a batch of the tuned model's traces for the probe of the model before, or of benign texts that the model
    before wrote, or of multiple-choice questions; the last two are read by both. Units are ordered by the model that
    reads, so that a worker loads each once.
    """

    name = "evaluate"
    inputs = ("prompts", "duplicates", "traces", "judge", "guard", "probe", "controls", "cliff")
    compares = True

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """To models that are compared with another one."""
        return model is not None and model.before is not None

    def settings(self, study: Study) -> Any:
        """What is compared (sources enter by their content), and the cliff's window and bootstrap."""
        settings = study.repair.evaluate.model_dump(mode="json", exclude={"choices": {"__all__": {"path"}}})
        return {**settings, "cliff": study.cliff.model_dump(mode="json"), "samples": study.traces.samples}

    def reads(self, study: Study, file_hash: Callable[[Path], str]) -> Any:
        """The multiple-choice sets, by content."""
        return {spec.name: source_hash(spec.path) for spec in study.repair.evaluate.choices} or None

    def needs(self, context: Context, unit: Unit | None, model: str | None) -> str | None:
        """The model of the unit's side."""
        if unit is None or model is None:
            return None
        return model_before(context, model) if unit.payload["side"] == BEFORE else model

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """Every trace before and after, and the figures."""
        return [layout.folder(model) / "evaluation.parquet", layout.folder(model) / "evaluation.json"]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """What the tuned model reads, then what the model before reads."""
        assert model is not None
        size, asked = context.study.repair.evaluate.batch_size, len(questions(context))
        traces = 0 if no_old_probe(context, model) else len(closed_traces(context, model))
        texts = 0 if no_texts(context, model) else len(benign_texts(context, model))
        work = [(AFTER, TRACES, traces, context.study.cliff.batch_size)]
        work += [(side, *part, size) for side in (AFTER, BEFORE) for part in ((TEXTS, texts), (CHOICES, asked))]
        return [
            Unit(self.name, model, f"{number}-{kind}-{side}-{u.key}", {"reads": kind, "side": side, **u.payload})
            for number, (side, kind, total, batch) in enumerate(work)
            for u in chunks(total, batch, self.name, model)
        ]

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Read one batch."""
        assert unit.model is not None
        side, rows = unit.payload["side"], slice(unit.payload["start"], unit.payload["stop"])
        before = model_before(context, unit.model)
        loaded = context.loaded(before if side == BEFORE else unit.model)
        if unit.payload["reads"] == CHOICES:
            records = _answers(loaded, questions(context)[rows], side)
            write_parquet(context.part(unit), pa.Table.from_pylist(records, schema=PARTS[CHOICES]))
            return {"rows": len(records)}
        reads = unit.payload["reads"]
        chosen = (closed_traces if reads == TRACES else benign_texts)(context, unit.model)[rows]
        path = context.layout.folder(unit.model if reads == TRACES else before) / "traces.parquet"
        traces = context.table(path).take(pa.array(chosen, pa.int64())).to_pylist()
        records = _cliffs(context, before, loaded, traces) if reads == TRACES else _perplexity(loaded, traces, side)
        write_parquet(context.part(unit), pa.Table.from_pylist(records, schema=PARTS[reads]))
        return {"rows": len(records), "tokens": sum(len(trace["token_ids"]) for trace in traces)}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Pair the two models' traces, and sum up."""
        assert model is not None
        read: dict[str, list[dict[str, Any]]] = {kind: [] for kind in PARTS}
        for unit in self.plan(context, model):
            read[unit.payload["reads"]] += read_parquet(context.part(unit)).to_pylist()
        rows, figures = evaluation_figures(context, model, read)
        out, out_json = self.outputs(context.layout, model)
        write_parquet(out, pa.Table.from_pylist(rows, schema=tables.EVALUATION))
        write_json(out_json, figures)
        return {"traces": len(rows), "texts": len(read[TEXTS]), "answers": len(read[CHOICES])}


def _cliffs(context: Context, before: str, loaded: LoadedModel, traces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cliff's measures of the tuned model's traces by the probes of the model before and their refits."""
    readers, window = kept_readers(context, before), context.study.cliff.window
    records = []
    for trace, logits in zip(traces, read_logistic(loaded, traces, readers, refits=True), strict=True):
        thinking = spans_of(trace).thinking_tokens
        found = [measure(logits[positions][None], thinking, window).scores for positions in TRAIN_POSITIONS]
        values = np.stack([[scores[name][0] for name in MEASURES] for scores in found])
        records.append({"trace_id": trace["trace_id"], "values": values.astype(np.float32).ravel()})
    return records


def _perplexity(loaded: LoadedModel, traces: list[dict[str, Any]], side: str) -> list[dict[str, Any]]:
    """How probable a model finds what the model before wrote: thinking, closing tokens and response."""
    readings = [Reading(tuple(trace["token_ids"]), trace["prefix_end"]) for trace in traces]
    return [
        {"side": side, **{name: trace[name] for name in ("trace_id", "group")}, "tokens": tokens, "nll": nll}
        for trace, tokens, nll in zip(
            traces, [len(r.ids) - r.start for r in readings], total_nll(loaded, None, readings), strict=True
        )
    ]


def _answers(loaded: LoadedModel, asked: list[tuple[str, Question]], side: str) -> list[dict[str, Any]]:
    """Log-probability of every choice as the response to its question; none where one does not fit the model."""
    readings: list[Reading] = []
    records: list[dict[str, Any]] = []
    for name, question in asked:
        record: dict[str, Any] = {"side": side, "set": name, "row": question.row, "question": question.question}
        record |= {"answer": question.answer, "characters": [len(choice) for choice in question.choices]}
        try:
            mine = [choice_reading(loaded, question.question, choice) for choice in question.choices]
            records.append({**record, "start": len(readings), "rejected": None})
            readings += mine
        except TraceError as error:
            records.append({**record, "start": None, "rejected": error.reason})
    sums = total_nll(loaded, None, readings) if readings else []
    for record in records:
        start = record.pop("start")
        stop = None if start is None else start + len(record["characters"])
        record["log_probabilities"] = None if start is None else [-nll for nll in sums[start:stop]]
    return records


def choice_reading(loaded: LoadedModel, question: str, choice: str) -> Reading:
    """A choice as the response to a question, of which the response's tokens count.

    It is rendered as every trace is. A model that thinks is given an empty thinking block that is closed with the
    closing tokens of its format: what it finds probable without a thought of its own.

    Raises:
        TraceError: ``too_long`` for the context, or the choice does not survive as a response.
    """
    thinking = "" if loaded.renderer.form.thinks else None
    ids, spans = loaded.renderer.render([{"role": "user", "content": question}], thinking, choice)
    if len(ids) > loaded.context:
        raise TraceError("too_long", f"{len(ids)} tokens exceed the context of {loaded.context}")
    if spans.response_start >= len(ids):
        raise TraceError("no_tokens", "the choice has no token")
    return Reading(tuple(ids), spans.response_start)


PARTS = {
    TRACES: pa.schema([("trace_id", pa.string()), ("values", pa.list_(pa.float32()))]),
    TEXTS: pa.schema(
        [
            ("side", pa.string()),
            ("trace_id", pa.string()),
            ("group", pa.string()),
            ("tokens", pa.int32()),
            ("nll", pa.float64()),
        ]
    ),
    CHOICES: pa.schema(
        [
            ("side", pa.string()),
            ("set", pa.string()),
            ("row", pa.int64()),
            ("question", pa.string()),
            ("answer", pa.int32()),
            ("characters", pa.list_(pa.int32())),
            ("log_probabilities", pa.list_(pa.float64())),
            ("rejected", pa.string()),
        ]
    ),
}
