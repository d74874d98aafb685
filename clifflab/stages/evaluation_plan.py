"""What is read again to compare a tuned model with the one before: fixed by the study and both models' traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from clifflab.artifacts import read_json
from clifflab.config import ModelSpec
from clifflab.data.choices import Question, Questions, read_choices
from clifflab.data.files import source_hash
from clifflab.errors import InputError
from clifflab.models.loading import fetch, load_renderer
from clifflab.stages.ablation_plan import one_a_prompt
from clifflab.stages.base import Context

TRACES, TEXTS, CHOICES = "traces", "texts", "choices"  # what a unit reads
BEFORE, AFTER = "before", "after"


def model_before(context: Context, model: str) -> str:
    """Name of the model that a model is compared with."""
    before = context.study.model(model).before
    assert before is not None  # the step applies to models that have one
    return before


def differences(context: Context, model: str) -> str:
    """Why tokens of the model before mean nothing to this one; empty where they do."""

    def compare() -> str:
        one, other = (load_renderer(context.spec(name)) for name in (model_before(context, model), model))
        if one.template_hash != other.template_hash:
            return "the two models' chat templates, thinking formats or system messages differ"
        if one.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            return "the two models' tokenizers differ"
        return ""

    return context.once(f"differences:{model}", [], compare)


def no_texts(context: Context, model: str) -> str:
    """Why there is no perplexity; empty where there is."""
    if found := differences(context, model):
        return found
    if benign_texts(context, model):
        return ""
    path = context.layout.folder(model_before(context, model))
    return why_no_text(*(context.table(path / f"{name}.parquet") for name in ("traces", "outcomes")))


def why_no_text(traces: Any, outcomes: Any) -> str:
    """Why a model wrote no benign answer to read: there is none at all, or all of them were given to it."""
    complied = outcomes["outcome"].to_pylist()
    benign = [
        (label, outcome) == ("benign", "complied")
        for label, outcome in zip(traces["label"].to_pylist(), complied, strict=True)
    ]
    if any(benign):
        return "all benign answers are given traces, which the model before did not write"
    return "the model before answered no benign prompt"


def no_old_probe(context: Context, model: str) -> str:
    """Why the probe of the model before cannot read this one; empty where it can."""
    about = read_json(context.layout.folder(model_before(context, model)) / "probes.json")
    if not about["trained"]:
        return f"the model before has no probe: {about['reason']}"
    if found := differences(context, model):
        return found
    sizes = [_size(context.spec(name)) for name in (model_before(context, model), model)]
    if sizes[0] != sizes[1]:
        layers, widths = zip(*sizes, strict=True)
        return f"the two models differ in layers ({layers[0]}, {layers[1]}) or in width ({widths[0]}, {widths[1]})"
    return "" if closed_traces(context, model) else "no trace of the tuned model closed its thinking"


def _size(spec: ModelSpec) -> tuple[int, int]:
    """Layers and width, from the checkpoint's config."""
    from transformers import AutoConfig

    options: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    config = AutoConfig.from_pretrained(fetch(spec), **options).get_text_config()
    return int(config.num_hidden_layers), int(config.hidden_size)


def closed_traces(context: Context, model: str) -> list[int]:
    """Indices of the tuned model's traces whose thinking ended."""
    path = context.layout.folder(model) / "traces.parquet"
    closed = context.table(path)["closed"]
    return context.once(f"closed:{model}", [path], lambda: np.flatnonzero(closed.to_numpy()).tolist())


def benign_texts(context: Context, model: str) -> list[int]:
    """Indices of traces that the model before wrote: a seeded choice of benign answered ones, one a prompt."""
    before = model_before(context, model)
    files = [context.layout.folder(before) / name for name in ("traces.parquet", "outcomes.parquet")]

    def choose() -> list[int]:
        traces = context.table(files[0]).select(["trace_id", "id", "set", "label", "source"]).to_pylist()
        outcomes = context.table(files[1])["outcome"].to_pylist()
        members = [
            index
            for index, (trace, outcome) in enumerate(zip(traces, outcomes, strict=True))
            if (trace["label"], trace["source"], outcome) == ("benign", "generated", "complied")
        ]
        chosen = one_a_prompt(context, "perplexity", traces, members)
        return sorted(chosen[: context.study.repair.evaluate.perplexity_traces])

    return context.once(f"benign_texts:{before}", files, choose)


def questions(context: Context) -> list[tuple[str, Question]]:
    """All multiple-choice questions with the name of their set, set after set."""
    return [(name, question) for name, found in choice_sets(context).items() for question in found.rows]


def choice_sets(context: Context) -> dict[str, Questions]:
    """The multiple-choice sets by name.

    Raises:
        InputError: A source cannot be used, or is no longer what it was when the run began.
    """
    sets = context.study.repair.evaluate.choices

    def read() -> dict[str, Questions]:
        known = context.identities.reads["evaluate"] if sets else {}
        found = {}
        for index, spec in enumerate(sets):
            field = f"repair.evaluate.choices.{index}"
            found[spec.name] = read_choices(spec, field)
            if source_hash(spec.path) != known[spec.name]:
                raise InputError(f"{field}.path", spec.path, "changed while the study ran", "run it again")
        return found

    return context.once("choices", [Path(spec.path) for spec in sets], read)
