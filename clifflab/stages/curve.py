"""Stage ``curve``: many small fine-tunes, by who chose the examples and how many (SPEC section 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clifflab import tables
from clifflab.artifacts import read_parquet, write_json, write_parquet
from clifflab.config import ModelSpec, Study
from clifflab.engines import Request, TransformersEngine, row_seed
from clifflab.models.loading import LoadedModel
from clifflab.models.perplexity import Reading, total_nll
from clifflab.science.judges import judge
from clifflab.science.less import COUNTS
from clifflab.stages.base import Context, Layout, Step, Unit
from clifflab.stages.curve_figures import curve_figures, curve_rows
from clifflab.stages.curve_plan import BEFORE, Cell, examples, experiment, recipe
from clifflab.stages.duplicates import group_clusters
from clifflab.stages.traces import spans_written
from clifflab.tuning.job import adapted, prepare

# Of how a model is tuned, what no fine-tune of the curve depends on: nothing is held out, and none is saved.
_OTHERWISE = {"validation", "patience", "save_every", "workers", "max_failures"}
_TRACE = ("trace_id", "id", "set", "label", "group")


class CurveStep(Step):
    """A unit is one fine-tune (a selector, a budget, a seed) with all that the tuned model is asked.

    One more unit is the model before.

    Every prompt is answered with the random numbers of the study's own first trace of it, so that all models, the one
    before included, are paired. Rules judge every answer, whatever guard the study has. The tuned weights live no
    longer than their unit.
    """

    name = "curve"
    inputs = (
        "prompts", "duplicates", "traces", "judge", "probe", "corpus", "corpus_traces", "corpus_judge", "corpus_guard",
        "corpus_cliff",
    )  # fmt: skip

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """To models that are repaired, where budgets are given."""
        return model is not None and study.repairs(model) and bool(study.repair.curve.budgets)

    def settings(self, study: Study) -> Any:
        """The sweep, how examples are chosen and learnt, and the sampling of the study."""
        repair = study.repair
        sampling = study.traces.model_dump(mode="json", include={"max_new_tokens", "temperature", "top_p"})
        return {
            **repair.curve.model_dump(mode="json"),
            "select": repair.select.model_dump(mode="json", exclude={"beside", "budget", "decontaminate"}),
            "targets": repair.targets.model_dump(mode="json"),
            "tune": repair.tune.model_dump(mode="json", exclude=_OTHERWISE),
            "sampling": sampling,
            "judge": study.judge.kind,
            "guard": study.judge.guard is not None,
            "bootstrap": study.cliff.bootstrap,
        }

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """Counts of every fine-tune and set, the figures, and every answer."""
        return [layout.folder(model) / name for name in ("curve.parquet", "curve.json", "curve_traces.parquet")]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """The model before, then every fine-tune, the largest first."""
        assert model is not None
        plan = experiment(context, model)
        if plan.reason:
            return []
        return [
            Unit(self.name, model, f"{number:05d}-{cell.selector}-{cell.budget}-{cell.seed}", cell._asdict())
            for number, cell in enumerate([Cell(BEFORE, 0, 0), *plan.cells])
        ]

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Choose, tune, ask, judge and read; or report what the model before did."""
        assert unit.model is not None
        cell, plan = Cell(**unit.payload), experiment(context, unit.model)
        loaded = context.loaded(unit.model)
        table = context.table(context.layout.folder(unit.model) / "traces.parquet")
        asked, texts = (table.take(pa.array(rows, pa.int64())).to_pylist() for rows in (plan.asked, plan.read))
        if cell.selector == BEFORE:
            answers, counts = _earlier(context, unit.model, asked), dict.fromkeys(COUNTS, 0)
            perplexity = _perplexity(loaded, texts)
        else:
            # Whose seed is the study's own chooses and learns as the study's selection and tuning do.
            seed, tune = context.study.seed + cell.seed, recipe(context.study)
            chosen = examples(context, unit.model, cell, seed)
            prepared = prepare(loaded, chosen.rows, tune, seed)
            with adapted(loaded, prepared.data, tune, seed) as progress:
                answers, perplexity = _answers(context, loaded, asked), _perplexity(loaded, texts)
            counts = {
                **chosen.counts({example.id for example in prepared.data.train}),
                "steps": progress.step,
                "tokens": sum(step["tokens"] for step in progress.curve),
            }
        about = {"model": unit.model, **cell._asdict(), **counts, "perplexity": perplexity}
        records = [
            {**{name: trace[name] for name in _TRACE}, **answer, **about}
            for trace, answer in zip(asked, answers, strict=True)
        ]
        write_parquet(context.part(unit), pa.Table.from_pylist(records, schema=_PART))
        return {"rows": len(records), "examples": counts["harmful"] + counts["benign"], "steps": counts["steps"]}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Join the fine-tunes and sum up."""
        assert model is not None
        out, out_json, out_traces = self.outputs(context.layout, model)
        parts = [read_parquet(context.part(unit)) for unit in self.plan(context, model)]
        table = pa.concat_tables([_PART.empty_table(), *parts])
        rows = table.drop_columns(["response"]).to_pylist()
        write_parquet(out_traces, table.select(tables.CURVE_TRACES.names).cast(tables.CURVE_TRACES))
        write_parquet(out, pa.Table.from_pylist(curve_rows(rows), schema=tables.CURVE))
        plan = experiment(context, model)
        if plan.reason:
            judged = {"judged_by": context.study.judge.kind, "left_out": dict(plan.left_out)}
            write_json(out_json, {"reason": plan.reason, **judged})
            return {"tunes": 0}
        write_json(out_json, curve_figures(context.study, rows, group_clusters(context), plan))
        return {"tunes": len(parts) - 1, "answers": table.num_rows}


def _earlier(context: Context, model: str, asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the model before wrote, with the study's own verdicts."""
    table = context.table(context.layout.folder(model) / "outcomes.parquet")
    wanted = table.filter(pc.is_in(table["trace_id"], pa.array([trace["trace_id"] for trace in asked])))
    judged = {row["trace_id"]: row for row in wanted.select(["trace_id", "outcome", "outcome_reason"]).to_pylist()}
    return [
        {
            "thinking_tokens": trace["closing_start"] - trace["thinking_start"],
            "response_tokens": len(trace["token_ids"]) - trace["response_start"],
            **{name: trace[name] for name in ("response", "closed", "finish_reason")},
            **{name: judged[trace["trace_id"]][name] for name in ("outcome", "outcome_reason")},
        }
        for trace in asked
    ]


def _answers(context: Context, loaded: LoadedModel, asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a tuned model writes to the same prompts, judged by rules."""
    study, found = context.study, list[dict[str, Any]]()
    engine, size = TransformersEngine(loaded), study.traces.batch_size
    for start in range(0, len(asked), size):
        prompts = [trace["token_ids"][: trace["prefix_end"]] for trace in asked[start : start + size]]
        seeds = [row_seed(study.seed, trace["trace_id"]) for trace in asked[start : start + size]]
        requests = [
            Request(tuple(ids), seed, min(study.traces.max_new_tokens, loaded.context - len(ids)))
            for ids, seed in zip(prompts, seeds, strict=True)
        ]
        for ids, completion in zip(prompts, engine.generate(requests, study.traces), strict=True):
            spans = spans_written(loaded, ids, completion)
            _, response = loaded.renderer.texts([*ids, *completion.ids], spans)
            verdict = judge(response, spans.closed)
            found.append(
                {
                    "thinking_tokens": spans.thinking_tokens,
                    "response_tokens": spans.end - spans.response_start,
                    "response": response,
                    "closed": spans.closed,
                    "finish_reason": completion.finish_reason,
                    "outcome": verdict.outcome,
                    "outcome_reason": verdict.reason,
                }
            )
    return found


def _perplexity(loaded: LoadedModel, texts: Sequence[dict[str, Any]]) -> float | None:
    """Perplexity per token of what the model before wrote; ``None`` without a text, or where it is no finite number."""
    readings = [Reading(tuple(trace["token_ids"]), trace["prefix_end"]) for trace in texts]
    tokens = sum(len(reading.ids) - reading.start for reading in readings)
    if not tokens:
        return None
    mean = sum(total_nll(loaded, None, readings)) / tokens
    return math.exp(mean) if mean < 700 else None


_PART = pa.schema(
    [
        *tables.CURVE_TRACES,
        *(pa.field(name, pa.int64()) for name in COUNTS),
        pa.field("perplexity", pa.float64()),
    ]
)
