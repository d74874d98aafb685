"""A repair's place in a study: which steps there are, in which order, and what a corpus is measured with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from clifflab.errors import ConfigError
from clifflab.runtime.prepare import with_repaired
from clifflab.runtime.study import identify, plan, prepare, run
from clifflab.stages import STEPS
from clifflab.stages.base import ordered, upstream
from tests.studies import parse, small_study

CORPUS = {"name": "corpus", "path": "organism:corpus", "label": "harmful", "limit": 200}


def repair_study(**repair: Any) -> dict[str, Any]:
    sets = {"benign": ("benign", 24), "harmful": ("harmful", 24), "wrapped_strong": ("harmful", 24)}
    prompts = [
        {"name": name, "path": f"organism:{name}", "label": label, "limit": limit}
        for name, (label, limit) in sets.items()
    ]
    return small_study(
        name="repair",
        prompts=prompts,
        truncation={"traces": 0},
        probe={"min_examples": 8, "refits": 2, "folds": 2, "shuffles": 2},
        repair={"corpus": [CORPUS], "batch_size": 64, "select": {"shared_groups": "keep"}, **repair},
    )


def test_a_repaired_model_follows_from_its_base() -> None:
    study = parse(repair_study())
    study = study.model_copy(update={"models": with_repaired(study, study.models)})
    assert [(m.name, m.adapter, m.before) for m in study.models] == [
        ("planted", None, None),
        ("planted-repaired", "repair:planted", "planted"),
    ]
    assert with_repaired(study, study.models) == study.models  # a written study is read back as it is
    pairs = ordered(study, STEPS)
    place = {pair: number for number, pair in enumerate(pairs)}
    for name, model in pairs:
        for pair in upstream(study, STEPS, name, model):
            assert place[pair] < place[name, model], (pair, name, model)
    assert ("tune", "planted") in upstream(study, STEPS, "traces", "planted-repaired")
    assert ("traces", "planted") in upstream(study, STEPS, "evaluate", "planted-repaired")
    assert ("heads", "planted-repaired") not in place
    assert ("corpus_traces", "planted-repaired") not in place
    assert pairs[-1] == ("report", None)


def test_no_corpus_no_repair() -> None:
    study = parse(small_study())
    assert with_repaired(study, study.models) == study.models
    names = {name for name, _ in ordered(study, STEPS)}
    assert not names & {"corpus", "corpus_traces", "select", "tune", "curve", "evaluate"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"repair": {"corpus": [{**CORPUS, "name": "benign"}]}}, ["repair.corpus", "'benign'", "another name"]),
        ({"repair": {"corpus": [CORPUS], "models": ["other"]}}, ["repair.models", "'other'", "planted"]),
        ({"repair": {"select": {"budget": 1.5}}}, ["repair.select.budget", "1.5", "share of the corpus"]),
        ({"repair": {"curve": {"budgets": [20, 10]}}}, ["repair.curve.budgets", "ascending"]),
        ({"models": [{"name": "b", "path": "organism:planted", "before": "a"}]}, ["'b'", "'a'", "before it"]),
    ],
)
def test_wrong_settings(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(small_study(**change))
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_adapter_of_no_repair() -> None:
    repaired = {"name": "after", "path": "organism:planted", "adapter": "repair:planted"}
    study = parse(small_study(models=[{"name": "planted", "path": "organism:planted"}, repaired]))
    with pytest.raises(ConfigError, match="this study makes no such repair"):
        prepare(study)


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    after = {"name": "after", "path": "organism:planted", "adapter": str(tmp_path)}
    study = parse(small_study(models=[{"name": "planted", "path": "organism:planted"}, after]))
    with pytest.raises(Exception, match=r"models.adapter: .*holds no adapter_config.json"):
        prepare(study)


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose corpus is generated, judged and scored."""
    return run(parse(repair_study(tuned=False)), tmp_path_factory.mktemp("repair"), runtime="inline").root


def test_the_corpus_is_scored_like_the_study(selected: Path) -> None:
    """Traces of the corpus have the cliff that the step ``cliff`` would give them."""
    from clifflab.models.loading import load
    from clifflab.science.cliff import measure
    from clifflab.stages.readout import Readers, read_traces

    folder = selected / "planted"
    traces = pq.read_table(folder / "corpus" / "traces.parquet").to_pylist()
    cliffs = pq.read_table(folder / "corpus" / "cliffs.parquet")
    closed = [trace for trace in traces if trace["closed"]]
    assert len(cliffs) == 2 * len(closed)
    assert {trace["label"] for trace in traces} == {"harmful", "benign"}
    readers = Readers.of(folder)
    spec = parse(repair_study()).models[0]
    some = closed[:6]
    for trace, logits in zip(some, read_traces(load(spec), some, readers), strict=True):
        mine = cliffs.filter(pc.equal(cliffs["trace_id"], trace["trace_id"])).to_pylist()
        for kind, k, layer in readers.logistic:
            row = next(row for row in mine if row["train_positions"] == kind)
            thinking = trace["closing_start"] - trace["thinking_start"]
            found = measure(logits.probes[k : k + 1, layer : layer + 1], thinking, (0.5, 0.9))
            assert row["layer"] == layer
            assert row["reported"]
            assert row["cliff"] == pytest.approx(found.scores["cliff"].item(), abs=1e-4)
            assert row["misalignment_logit"] == pytest.approx(found.logits["misalignment"].item(), abs=1e-3)


def test_what_is_evaluated_is_not_in_the_corpus(selected: Path) -> None:
    texts = {row[-1]["content"] for row in pq.read_table(selected / "prompts.parquet")["messages"].to_pylist()}
    kept = {row[-1]["content"] for row in pq.read_table(selected / "corpus.parquet")["messages"].to_pylist()}
    rejects = pq.read_table(selected / "corpus_rejects.parquet").to_pylist()
    assert not texts & kept
    assert rejects
    assert {row["reason"] for row in rejects} == {"contaminated"}
    assert len(kept) + len(rejects) == 200


def test_a_changed_budget_keeps_the_corpus(selected: Path) -> None:
    study = prepare(parse(repair_study(tuned=False, select={"budget": 12, "shared_groups": "keep"})))
    assert [name for name, _ in plan(identify(study, selected))] == ["select", "report"]


def test_evaluated_requests_in_other_wrappers_are_left_out(selected: Path) -> None:
    groups = set(pq.read_table(selected / "prompts.parquet")["group"].to_pylist())
    kept = pq.read_table(selected / "corpus.parquet").to_pylist()
    assert any(row["group"] in groups for row in kept)  # this study keeps them
    study = prepare(parse(repair_study(tuned=False, select={"shared_groups": "leave-out"})))
    context = identify(study, selected)
    unit = STEPS["corpus"].plan(context, None)[0]
    STEPS["corpus"].compute(context, unit)
    counts = STEPS["corpus"].merge(context, None)
    left = pq.read_table(selected / "corpus.parquet").to_pylist()
    assert counts["shared_group"] == sum(row["group"] in groups for row in kept)
    assert [row["id"] for row in left] == [row["id"] for row in kept if row["group"] not in groups]
