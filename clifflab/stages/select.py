"""Stage ``select``: the examples of a repair, and what the model is to write for them (SPEC section 6)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clifflab.artifacts import read_json, read_parquet
from clifflab.config import ModelSpec, Study
from clifflab.errors import InputError, TraceError
from clifflab.models.loading import load_renderer
from clifflab.repair.corpus import Corpus
from clifflab.repair.files import Selection, finish
from clifflab.repair.output import SELECTION, SUMMARY, TRAIN, write_nothing, write_selection
from clifflab.repair.select import NothingToChooseError, check_budget, choose
from clifflab.repair.stream import Plan, Stats
from clifflab.repair.summary import corpus_outcomes
from clifflab.repair.targets import make_targets, with_targets
from clifflab.repair.texts import Library
from clifflab.science.selection import parts_of
from clifflab.stages.base import CORPUS, REPAIR, Context, Layout, Step, Unit
from clifflab.stages.corpus import CONTAMINATED, SHARED
from clifflab.text.render import Messages, Renderer


class SelectStep(Step):
    """Nothing but a merge: a study's corpus fits in memory, and choosing takes seconds."""

    loads = False
    name = "select"
    inputs = ("corpus", "corpus_traces", "corpus_judge", "corpus_guard", "corpus_cliff")

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """Examples are chosen for the models that are repaired."""
        return model is not None and study.repairs(model)

    def settings(self, study: Study) -> Any:
        """Who chooses, from what, and the targets."""
        repair = study.repair
        return {
            "select": repair.select.model_dump(mode="json", exclude={"decontaminate"}),
            "targets": repair.targets.model_dump(mode="json"),
        }

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """What every selector chose, the training examples of the one that counts, and the figures."""
        return [layout.folder(model, REPAIR) / name for name in (SELECTION, TRAIN, SUMMARY)]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """No units."""
        return []

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Never called: there are no units."""
        raise AssertionError("the step has no units")

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Choose, and write the targets.

        Raises:
            InputError: The settings fit no corpus: a budget larger than it, an unknown column, a guard that is missing.
        """
        assert model is not None
        folder = context.layout.folder(model, REPAIR)
        corpus = read_corpus(context, model)
        settings, seed = context.study.repair.select, context.study.seed
        plan = Plan(settings, 0, 0, seed)
        stats = Stats.of(corpus, plan)
        try:
            selection = self._select(context, model, corpus, stats)
        except NothingToChooseError as error:
            trained = read_json(context.layout.folder(model) / "probes.json")
            reason = trained["reason"] if not trained["trained"] else f"{error.problem}; {error.remedy}"
            write_nothing(
                folder,
                {"reason": reason, "model": model, "by": settings.by, "corpus_outcomes": corpus_outcomes(stats)},
            )
            return {"examples": 0}
        except InputError as error:
            name = {"selector": "by"}.get(error.field, error.field)
            raise InputError(f"repair.select.{name}", error.value, error.problem, error.remedy) from None
        write_selection(folder, selection)
        return {"examples": len(selection.targets.rows)}

    def _select(self, context: Context, model: str, corpus: Corpus, stats: Stats) -> Selection:
        repair, seed = context.study.repair, context.study.seed
        settings = repair.select
        plan = Plan(settings, *parts_of(check_budget(settings.budget, corpus.total), settings.benign), seed)
        choices = {name: choose(corpus, name, settings.budget, settings, seed) for name in plan.selectors}
        check = check_of(load_renderer(context.spec(model)))
        library = read_library(context, model)
        choices[settings.by], made = with_targets(
            lambda without: choose(corpus, settings.by, settings.budget, settings, seed, without),
            lambda choice: make_targets(choice, library, repair.targets, plan.rules, seed, check),
        )
        selection = finish(corpus, stats, plan, choices, made)
        selection.summary.update(requests_left_out(context.layout.root))
        return selection


def requests_left_out(root: Path) -> dict[str, int]:
    """Requests that the corpus step left out because the study evaluates them, or their base request."""
    file = root / "corpus_rejects.parquet"
    reasons = Counter(read_parquet(file)["reason"].to_pylist()) if file.is_file() else Counter[str]()
    return {reason: reasons[reason] for reason in (CONTAMINATED, SHARED)}


def read_corpus(context: Context, model: str) -> Corpus:
    """A study's scored corpus, read once as long as its files stay the same."""
    folder = context.layout.folder(model, CORPUS)
    files = [folder / f"{name}.parquet" for name in ("traces", "outcomes", "cliffs", "guard")]
    files.append(context.layout.root / "corpus.parquet")
    probe, rewrite = context.study.repair.select.probe, context.study.repair.targets.kind == "rewrite"

    def join() -> Corpus:
        traces, outcomes, cliffs, guard, prompts = (context.table(file) for file in files)
        return Corpus.of(traces, outcomes, cliffs, probe, guard, prompts, rewrite=rewrite)

    return context.once(f"corpus:{model}:{probe}", files, join)


def read_library(context: Context, model: str) -> Library:
    """The words of a study's corpus, read once as long as its files stay the same."""
    files = [context.layout.folder(model, CORPUS) / "traces.parquet", context.layout.root / "corpus.parquet"]
    return context.once(f"library:{model}", files, lambda: Library.of(*map(context.table, files)))


def check_of(renderer: Renderer) -> Callable[[Messages, str | None, str], None]:
    """Whether an example can be rendered for a model, and its tokenizer can spell the target."""
    unknown = renderer.tokenizer.unk_token_id

    def check(messages: Messages, thinking: str | None, response: str) -> None:
        renderer.render(messages, thinking, response)
        if unknown is not None and unknown in renderer.encode(response):
            raise TraceError("unknown_words", "the tokenizer cannot spell the target")

    return check
