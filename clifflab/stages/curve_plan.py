"""What the less-is-more curve tunes, asks and reads: fixed by the study alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from clifflab.artifacts import read_json
from clifflab.config import SelectConfig, Study, TuneConfig
from clifflab.errors import InputError
from clifflab.repair.corpus import rules_of
from clifflab.repair.select import HARMFUL, NothingToChooseError, choose
from clifflab.repair.targets import make_targets, with_targets
from clifflab.science.ablation import ranked_by_hash
from clifflab.stages.base import CORPUS, Context
from clifflab.stages.evaluation_plan import why_no_text
from clifflab.stages.select import check_of, read_corpus, read_library

BEFORE = "none"  # selector of the model before, at budget 0
_FIELDS = {"budget": "repair.curve.budgets", "selector": "repair.curve.selectors"}  # by what the choice calls them
_COLUMNS = ["trace_id", "id", "sample", "set", "label", "group", "source"]
_GIVEN = "its traces are given and not written by any model"


class Cell(NamedTuple):
    """One fine-tune: who chooses how many examples, and the number of its seed."""

    selector: str
    budget: int
    seed: int


@dataclass(frozen=True)
class Examples:
    """What one fine-tune learns from.

    Attributes:
        rows: Training examples, as in ``train.jsonl``.
        filled: Ids of those that the selector did not itself name.
        cliff_cases: Ids of those that are cliff cases.
    """

    rows: Sequence[dict[str, Any]]
    filled: frozenset[str]
    cliff_cases: frozenset[str]

    def counts(self, usable: Collection[str]) -> dict[str, int]:
        """How many examples of each kind there are, of those with one of these ids."""
        harmful = {row["id"] for row in self.rows if row["role"] == HARMFUL and row["id"] in usable}
        return {
            "harmful": len(harmful),
            "benign": sum(row["id"] in usable for row in self.rows) - len(harmful),
            "filled": len(harmful & self.filled),
            "cliff_examples": len(harmful & self.cliff_cases),
        }


@dataclass(frozen=True)
class Experiment:
    """The plan of one model's curve.

    Attributes:
        reason: Why there is none; empty where there is one.
        cells: The fine-tunes, the largest first.
        asked: Indices of the study's traces whose prompts are answered anew, set by set.
        read: Indices of the benign answered traces, all written by the model, whose perplexity is measured.
        unread: Why there are none of these; empty where there are.
        left_out: Sets that are not asked, and why.
        corpus: ``traces`` of the corpus, ``eligible`` ones and ``cliff_cases``.
    """

    reason: str
    cells: tuple[Cell, ...] = ()
    asked: tuple[int, ...] = ()
    read: tuple[int, ...] = ()
    unread: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)
    corpus: Mapping[str, int] = field(default_factory=dict)


def experiment(context: Context, model: str) -> Experiment:
    """The plan, from the traces and their outcomes; computed once as long as they stay the same.

    Raises:
        InputError: A budget is larger than the corpus, or a selector lacks its verdicts.
    """
    folder = context.layout.folder(model)
    files = [folder / part / name for part in ("", CORPUS) for name in ("traces.parquet", "outcomes.parquet")]
    return context.once(f"curve:{model}", files, lambda: _experiment(context, model))


def _experiment(context: Context, model: str) -> Experiment:
    settings, folder = context.study.repair.curve, context.layout.folder(model)
    if not read_json(folder / "probes.json")["trained"]:
        return Experiment("no probe could be trained, so that nothing ranks the corpus")
    scored, how, most = read_corpus(context, model), choice_settings(context.study), settings.budgets[-1]
    try:
        for selector in settings.selectors:  # who can fill the largest budget fills them all
            choose(scored, selector, most, how, context.study.seed)
    except NothingToChooseError as error:
        return Experiment(f"{most:,} examples cannot be chosen: {error.problem}")
    except InputError as error:
        field = _FIELDS.get(error.field, f"repair.select.{error.field}")
        raise InputError(field, error.value, error.problem, error.remedy) from None
    cells = tuple(
        Cell(selector, budget, seed)
        for budget in reversed(settings.budgets)
        for selector in settings.selectors
        for seed in range(settings.seeds)
    )
    traces = context.table(folder / "traces.parquet").select(_COLUMNS).to_pylist()
    judged = context.table(folder / "outcomes.parquet")
    outcomes = judged["outcome"].to_pylist()
    asked, seed = list[int](), context.study.seed
    wanted = settings.sets or [prompt_set.name for prompt_set in context.study.prompts]
    left_out = {p.name: _GIVEN for p in context.study.prompts if p.existing and p.name in wanted}
    for name in (name for name in wanted if name not in left_out):
        members = [i for i, trace in enumerate(traces) if trace["set"] == name and trace["sample"] == 0]
        asked += _drawn(seed, "curve", traces, members)[: settings.prompts]
    if not asked:
        return Experiment("no prompt of repair.curve.sets has a trace that the model wrote", left_out=left_out)
    kind = ("benign", "generated", "complied")
    benign = [i for i, trace in enumerate(traces) if (trace["label"], trace["source"], outcomes[i]) == kind]
    first = {(traces[i]["set"], traces[i]["id"]): i for i in reversed(benign)}  # one trace of each prompt
    read = _drawn(seed, "curve perplexity", traces, sorted(first.values()))[: settings.perplexity_traces]
    unread = "" if read else why_no_text(context.table(folder / "traces.parquet"), judged)
    rules = rules_of(how)
    about = {
        "traces": scored.total,
        "eligible": len(scored.eligible(rules)),
        "cliff_cases": int(scored.cliff_cases(rules).sum()),
    }
    return Experiment("", cells, tuple(asked), tuple(read), unread, left_out, about)


def choice_settings(study: Study) -> SelectConfig:
    """How examples are chosen: as in the study's selection, from traces that all selectors of the curve can rank."""
    return study.repair.select.model_copy(update={"beside": study.repair.curve.selectors})


def recipe(study: Study) -> TuneConfig:
    """How every fine-tune learns: as the study's, but nothing is held out.

    Only large budgets could hold examples out, so that the recipe would change along the curve, and with it the number
    of examples that are learnt.
    """
    return study.repair.tune.model_copy(update={"validation": 0.0})


def examples(context: Context, model: str, cell: Cell, seed: int) -> Examples:
    """The training examples of one fine-tune with their targets."""
    settings = choice_settings(context.study)
    corpus, rules = read_corpus(context, model), rules_of(settings)
    library, check = read_library(context, model), check_of(context.renderer(model))
    chosen, made = with_targets(
        lambda without: choose(corpus, cell.selector, cell.budget, settings, seed, without),
        lambda choice: make_targets(choice, library, context.study.repair.targets, rules, seed, check),
    )
    names, cases = corpus.strings("trace_id"), corpus.cliff_cases(rules)
    rows = chosen.harmful
    return Examples(made.rows, frozenset(names[rows[chosen.filled]]), frozenset(names[rows[cases[rows]]]))


def _drawn(seed: int, purpose: str, traces: Sequence[dict[str, Any]], members: Sequence[int]) -> list[int]:
    """Members in a seeded order that depends on each trace alone."""
    return [members[place] for place in ranked_by_hash(seed, purpose, [traces[i]["trace_id"] for i in members])]
