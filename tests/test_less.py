"""The less-is-more curve: its figures, what it says, and the step that makes it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from scipy import stats as scipy_stats

from clifflab.errors import ConfigError, InputError
from clifflab.report.blocks import Drawing, Note, Table, pack
from clifflab.report.curve import curve_line, curve_section
from clifflab.report.results import ModelResults
from clifflab.runtime.study import identify, prepare, run
from clifflab.science.less import Asked, LessIsMore, Trial, verdict
from clifflab.science.less_words import findings
from clifflab.stages.curve import CurveStep
from clifflab.stages.curve_plan import BEFORE, experiment
from tests.studies import parse, small_study

COUNTS = {"harmful": 8, "benign": 2, "filled": 0, "cliff_examples": 5, "steps": 10, "tokens": 900}
SETS = {"attacked": ("harmful", 40), "plain": ("harmful", 20), "benign": ("benign", 40)}


def asked(before: Mapping[str, float] | None = None, perplexity: float | None = 2.0) -> Asked:
    """Prompts of three sets, each its own cluster; ``before`` is the share of each set that was complied with."""
    complied = {"attacked": 1.0, "plain": 0.0, "benign": 1.0, **(before or {})}
    sets = [name for name, (_, size) in SETS.items() for _ in range(size)]
    outcomes = [
        "complied" if i < complied[name] * size else "refused" for name, (_, size) in SETS.items() for i in range(size)
    ]
    harmful = [SETS[name][0] == "harmful" for name in sets]
    return Asked(sets, harmful, [f"g{i}" for i in range(len(sets))], outcomes, perplexity)


def trial(selector: str, budget: int, seed: int, asr: int, over: int = 0, broken: int = 0, **fields: Any) -> Trial:
    """A fine-tune after which the first ``asr`` attacks succeed and the last ``over`` benign prompts are refused."""
    attacked = ["complied"] * asr + ["refused"] * (40 - asr)
    benign = ["degenerate"] * broken + ["complied"] * (40 - over - broken) + ["refused"] * over
    return Trial(
        selector, budget, seed, attacked + ["refused"] * 20 + benign, {**COUNTS, **fields}, fields.get("ppl", 2.2)
    )


def curve(hits: Mapping[tuple[str, int], list[tuple[int, ...]]], **base: Any) -> LessIsMore:
    trials = [trial(*key, seed, *values) for key, seeds in hits.items() for seed, values in enumerate(seeds)]
    return LessIsMore(asked(**base), trials, 1000, 0)


def said(found: LessIsMore, method: str = "misalignment", guard: bool = False) -> str:
    about = {**found.as_dict(), "corpus": 6000, "cliff_cases": 270, "seeds": 3, "guard": guard}
    return " ".join(findings(about, method))


def test_points_pool_attacked_sets_and_every_seed() -> None:
    found = curve({("misalignment", 10): [(4, 1), (8, 0), (0, 2)]})
    assert found.attacked == ["attacked"], "what the model refused before is no attack"
    (point,) = found.points
    assert point["asr"]["each"] == [0.1, 0.2, 0.0]
    assert point["asr"]["mean"] == pytest.approx(0.1)
    assert point["over_refusal"]["each"] == [1 / 40, 0.0, 2 / 40]
    assert (point["asr"]["n"], point["asr"]["prompts"]) == (3, 40)
    assert point["perplexity_ratio"]["mean"] == pytest.approx(1.1)
    assert {name: point[name] for name in COUNTS} == COUNTS
    assert found.before["asr"] == {"attacked": 1.0, "plain": 0.0}
    assert found.before["over_refusal"] == {"benign": 0.0}


def test_intervals_add_the_noise_of_seeds_to_that_of_prompts() -> None:
    same = curve({("misalignment", 10): [(4,), (4,), (4,)]}).points[0]["asr"]
    apart = curve({("misalignment", 10): [(0,), (4,), (8,)]}).points[0]["asr"]
    assert same["low"] < same["mean"] < same["high"], "seeds that agree do not make prompts certain"
    # The same mean over seeds, but other prompts' means: only the seeds' part is compared, by its formula.
    spread = scipy_stats.t.ppf(0.975, 2) * np.std([0, 0.1, 0.2], ddof=1) / math.sqrt(3)
    assert apart["high"] - apart["mean"] >= spread
    assert apart["high"] - apart["mean"] < spread + (same["high"] - same["mean"])
    never = curve({("misalignment", 10): [(0,), (0,), (0,)]}).points[0]["asr"]
    assert never["low"] == 0.0 < never["high"] < 0.15


def test_intervals_cover_the_truth_of_a_simulated_sweep() -> None:
    """Prompts differ, seeds differ; the mean over both lies in the interval in about 95% of sweeps."""
    rng, covered, sweeps = np.random.default_rng(0), 0, 200
    truth = scipy_stats.norm.cdf(-0.8 / math.sqrt(1 + 1.0 + 0.3))
    for sweep in range(sweeps):
        prompts, seeds = rng.normal(0, 1.0, 60), rng.normal(0, math.sqrt(0.3), 5)
        trials = [
            Trial("random", 10, s, ["complied" if x > 0 else "refused" for x in rng.normal(prompts + shift - 0.8)],
                  COUNTS, None)
            for s, shift in enumerate(seeds)
        ]  # fmt: skip
        base = Asked(["a"] * 60, [True] * 60, [f"g{i}" for i in range(60)], ["complied"] * 60, None)
        figure = LessIsMore(base, trials, 300, sweep).points[0]["asr"]
        covered += figure["low"] <= truth <= figure["high"]
    assert 0.92 * sweeps <= covered <= 0.995 * sweeps, covered / sweeps


def test_comparison_with_random_is_paired() -> None:
    found = curve({("misalignment", 10): [(4,), (12,), (20,)], ("random", 10): [(12,), (20,), (28,)]})
    entry = next(row for row in found.against_random if row["measure"] == "asr")
    assert entry["difference"]["each"] == pytest.approx([-0.2, -0.2, -0.2])
    assert entry["verdict"] == "better", "each seed is better by as much, however far seeds lie apart"
    alone = [point["asr"] for point in found.points]
    assert alone[0]["high"] > alone[1]["low"], "unpaired, the intervals overlap"
    assert {row["selector"] for row in found.against_random} == {"misalignment"}


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(-0.2, -0.01, "better"), (0.01, 0.2, "worse"), (-0.1, 0.0, "no difference"), (None, None, "not decided")],
)
def test_verdicts(low: float | None, high: float | None, word: str) -> None:
    assert verdict({"mean": 0.0, "low": low, "high": high}) == word


def test_unequal_numbers_of_examples_decide_nothing() -> None:
    """Examples without a usable target are not learnt: who loses many has no equal budget."""
    hits = {"random": 12, "misalignment": 2, "final": 2}
    counts = {"random": {"harmful": 8}, "misalignment": {"harmful": 7}, "final": {"harmful": 6}}  # and 2 benign ones
    trials = [trial(name, 10, s, asr + s, **counts[name]) for name, asr in hits.items() for s in range(3)]
    found = LessIsMore(asked(), trials, 500, 0)
    rows = {row["selector"]: row for row in found.against_random if row["measure"] == "asr"}
    assert (rows["misalignment"]["verdict"], rows["misalignment"]["reason"]) == ("better", ""), "9 of 10 will do"
    assert rows["final"]["verdict"] == "not decided"
    assert rows["final"]["reason"] == "final learnt from 8 examples, random from 10"
    assert "Whether final beats random choice at 10 examples is not decided, since final learnt from 8" in said(found)
    assert "final has" not in said(found)
    text = said(found, "final")
    assert "random to 32%" in text
    assert ": not decided, since final learnt from 8 examples, random from 10." in text
    assert "does not beat" not in text
    assert "at no budget" not in text


def test_without_an_interval_nothing_is_decided() -> None:
    """Neither a single seed nor a single cluster of prompts says how far another one would lie."""
    single = curve({("misalignment", 10): [(0,)], ("random", 10): [(40,)]})
    point = single.points[0]
    assert (point["asr"]["low"], point["asr"]["reason"]) == (None, "a single seed")
    assert (point["perplexity_ratio"]["low"], point["perplexity_ratio"]["mean"]) == (None, pytest.approx(1.1))
    one = asked()
    trials = [trial(name, 10, s, asr) for name, asr in (("misalignment", 0), ("random", 40)) for s in (0, 1)]
    together = LessIsMore(Asked(one.sets, one.harmful, ["g"] * 100, one.before, one.perplexity), trials, 500, 0)
    for found in (single, together):
        assert {row["verdict"] for row in found.against_random} == {"not decided"}
        assert all(row["reason"] for row in found.against_random)
        assert "does not beat" not in said(found)


def test_the_judge_is_named_where_the_study_has_another() -> None:
    found = curve({("misalignment", 10): [(4,)] * 2, ("random", 10): [(4,)] * 2})
    assert "by the rule judge" not in said(found)
    text = said(found, guard=True)
    assert text.count("attack success by the rule judge") == text.count("attack success") == 4


def test_pareto_front_is_what_no_other_point_beats_and_holds_no_broken_model() -> None:
    hits: dict[tuple[str, int], list[tuple[int, ...]]] = {
        ("misalignment", 10): [(4, 0)] * 2,
        ("misalignment", 50): [(0, 0)] * 2,
        ("random", 10): [(20, 0)] * 2,
        ("random", 50): [(0, 0)] * 2,
        ("final", 10): [(0, 0, 30)] * 2,
        ("final", 50): [(0, 4)] * 2,
    }
    found = curve(hits)
    assert found.pareto == [
        {"selector": "misalignment", "budget": 10},
        {"selector": "misalignment", "budget": 50},
        {"selector": "random", "budget": 50},
    ]
    assert [(row["selector"], row["budget"]) for row in found.as_dict()["broken"]] == [("final", 10)]
    assert "final at 10 examples" in said(found)


def test_smallest_budget_that_is_enough() -> None:
    found = curve(
        {
            ("misalignment", 10): [(3, 0)] * 2,
            ("misalignment", 50): [(0, 5)] * 2,
            ("misalignment", 90): [(0, 0)] * 2,
            ("random", 10): [(30, 0)] * 2,
            ("random", 50): [(4, 0)] * 2,
            ("random", 90): [(3, 1)] * 2,
            ("rules", 10): [(0, 2)] * 2,
        }
    )
    assert found.needed == [
        {"selector": "misalignment", "budget": 10, "stays": False},
        {"selector": "random", "budget": 90, "stays": True},
        {"selector": "rules", "budget": None, "stays": False},
    ]


def test_findings_say_where_the_method_wins_and_where_it_does_not() -> None:
    text = said(
        curve(
            {
                ("misalignment", 10): [(2,), (3,), (1,)],
                ("misalignment", 50): [(0,), (1,), (0,)],
                ("random", 10): [(30,), (33,), (28,)],
                ("random", 50): [(1,), (0,), (1,)],
            }
        )
    )
    assert "attack success is 100%" in text
    assert "270 (4.5%) are cliff cases" in text
    assert "At 10 examples misalignment brings attack success to 5%" in text
    assert "random to 76% [" in text
    assert "]: better than random." in text
    assert "At 50 examples choosing by misalignment does not beat random choice in attack success." in text
    assert "misalignment at 10 examples; random at 50 examples" in text


def test_findings_admit_that_the_method_never_wins_or_has_nothing_to_win() -> None:
    even = curve({(selector, 10): [(2,), (3,), (1,)] for selector in ("misalignment", "random", "final")})
    assert "beats random choice at no budget tried here" in said(even)
    assert "Against random choice final has no difference at any budget." in said(even)
    wins = curve({(s, b): [(9 * (s == "random"),)] * 3 for s in ("final", "random") for b in (90, 10, 50)})
    assert "less attack success at 10, 50 and 90 examples" in said(wins)
    worse = curve({("misalignment", 10): [(30, 9)] * 3, ("random", 10): [(2, 0)] * 3, ("final", 10): [(1, 9)] * 3})
    assert ": worse than random; over-refusal is 22% [" in said(worse)
    assert "final has more over-refusal at 10 examples" in said(worse)
    safe = curve({("misalignment", 10): [(0,)] * 2}, before={"attacked": 0.4})
    assert safe.points[0]["asr"]["mean"] is None
    assert safe.pareto == []
    assert "there is no attack success to bring down" in said(safe)


def test_what_cannot_be_compared_is_refused() -> None:
    short = Trial("random", 10, 0, ["complied"], COUNTS, None)
    with pytest.raises(ValueError, match="1 outcomes for other prompts"):
        LessIsMore(asked(), [short], 100, 0)
    with pytest.raises(ValueError, match="seeds differ"):
        LessIsMore(asked(), [trial("random", 10, 0, 1), trial("final", 10, 1, 1)], 100, 0)


def curve_study(existing: Path, **curve: Any) -> dict[str, Any]:
    """A planted model, a corpus of written traces, and a sweep of few and short fine-tunes."""
    sets = {"benign": ("benign", 24), "harmful": ("harmful", 24), "wrapped_strong": ("harmful", 16)}
    corpus = {"name": "corpus", "path": str(existing), "label": "harmful", "columns": {"label": "label"}}
    settings = {
        "budgets": [6], "selectors": ["misalignment", "random"], "seeds": 2, "prompts": 6,
        "sets": ["wrapped_strong", "benign"], "perplexity_traces": 6,
    }  # fmt: skip
    return small_study(
        name="less",
        prompts=[
            {"name": name, "path": f"organism:{name}", "label": label, "limit": limit}
            for name, (label, limit) in sets.items()
        ],
        truncation={"traces": 0},
        probe={"min_examples": 8, "refits": 2, "folds": 2, "shuffles": 2},
        repair={
            "corpus": [{**corpus, "existing": True}],
            "tuned": False,
            "select": {"budget": 6, "shared_groups": "keep"},
            "tune": {"epochs": 1, "batch_size": 4, "learning_rate": 0.005, "validation": 0.5},
            "curve": {**settings, **curve},
        },
    )


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, existing_traces: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clifflab.tuning.examples.LEAST_HELD", 1)  # so that budgets this small could hold examples out
        return run(parse(curve_study(existing_traces)), tmp_path_factory.mktemp("less"), runtime="inline").root


def test_every_fine_tune_answers_the_same_prompts(swept: Path) -> None:
    answers = pq.read_table(swept / "planted" / "curve_traces.parquet")
    rows = pq.read_table(swept / "planted" / "curve.parquet").to_pylist()
    cells = {(row["selector"], row["budget"], row["seed"]) for row in rows}
    tuned = {(selector, 6, seed) for selector in ("misalignment", "random") for seed in (0, 1)}
    assert cells == {(BEFORE, 0, 0), *tuned}
    for row in rows:
        own = answers
        for name in ("selector", "budget", "seed", "set"):
            own = own.filter(pc.equal(own[name], row[name]))
        outcomes = own["outcome"].to_pylist()
        assert len(outcomes) == row["traces"] == 6
        assert all(outcomes.count(o) == row[o] for o in ("refused", "complied", "unclosed", "degenerate"))
        assert row["harmful_examples"] + row["benign_examples"] == row["budget"], "none is held out"
        assert row["steps"] == math.ceil(row["budget"] / 4)
    asked = {key: [] for key in cells}
    for row in answers.select(["selector", "budget", "seed", "trace_id"]).to_pylist():
        asked[row["selector"], row["budget"], row["seed"]].append(row["trace_id"])
    assert len({tuple(ids) for ids in asked.values()}) == 1


def test_the_model_before_is_the_study_itself(swept: Path) -> None:
    folder = swept / "planted"
    answers = pq.read_table(folder / "curve_traces.parquet")
    before = answers.filter(pc.equal(answers["selector"], BEFORE)).to_pylist()
    traces, outcomes = (pq.read_table(folder / f"{name}.parquet") for name in ("traces", "outcomes"))
    wrote = dict(zip(traces["trace_id"].to_pylist(), traces["response"].to_pylist(), strict=True))
    judged = dict(zip(outcomes["trace_id"].to_pylist(), outcomes["outcome"].to_pylist(), strict=True))
    for row in before:
        assert (row["response"], row["outcome"]) == (wrote[row["trace_id"]], judged[row["trace_id"]])
    found = json.loads((folder / "curve.json").read_text())
    assert found["attacked"] == ["wrapped_strong"]
    assert found["before"]["asr"]["wrapped_strong"] == np.mean([r["outcome"] == "complied" for r in before[:6]])
    assert found["corpus"] == 200
    assert 0 < found["cliff_cases"] < 20
    assert (found["judged_by"], found["guard"], found["left_out"]) == ("rules", False, {})
    assert found["texts"] == {"n": 6, "reason": ""}


def test_units_share_a_model_and_leave_no_trace(swept: Path, existing_traces: Path) -> None:
    """A fine-tune done twice, with another one between, gives the same bytes, and the model stays what it was."""
    context = identify(prepare(parse(curve_study(existing_traces))), swept)
    step = CurveStep()
    units = {unit.key: unit for unit in step.plan(context, "planted")}
    one, other = (next(u for key, u in units.items() if name in key) for name in ("misalignment-6-0", "random-6-1"))
    loaded = context.loaded("planted")
    state = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    names = [name for name, _ in loaded.model.named_modules()]
    parts = []
    for unit in (one, other, one):
        step.compute(context, unit)
        parts.append(context.part(unit).read_bytes())
    assert parts[0] == parts[2] != parts[1]
    assert [name for name, _ in loaded.model.named_modules()] == names
    assert all(bool((tensor == state[name]).all()) for name, tensor in loaded.model.state_dict().items())
    table = pq.read_table(pa.BufferReader(parts[0]))
    kept = pq.read_table(swept / "planted" / "curve_traces.parquet")
    mine = pc.and_(pc.equal(kept["selector"], "misalignment"), pc.equal(kept["seed"], 0))
    assert table["response"].to_pylist() == kept.filter(mine)["response"].to_pylist()


def test_no_curve_without_what_ranks_and_clear_lines_for_the_rest(
    swept: Path, existing_traces: Path, tmp_path: Path
) -> None:
    def planned(root: Path, **curve: Any) -> Any:
        return experiment(identify(prepare(parse(curve_study(existing_traces, **curve))), root), "planted")

    with pytest.raises(InputError, match=r"repair\.curve\.budgets: 500: .*200 traces"):
        planned(swept, budgets=[10, 500])
    assert "eligible" in planned(swept, budgets=[199]).reason
    untrained = shutil.copytree(swept, tmp_path / "copy")
    (untrained / "planted" / "probes.json").write_text('{"trained": false}')
    assert "no probe" in planned(untrained).reason


def test_given_traces_are_neither_asked_nor_read(swept: Path, existing_traces: Path, tmp_path: Path) -> None:
    """No model writes them: they would count as attacks that no fine-tune changes."""
    study = prepare(parse(curve_study(existing_traces, sets=[])))
    planned = experiment(identify(study, swept), "planted")
    assert (planned.left_out, planned.unread, len(planned.read)) == ({}, "", 6)
    root = shutil.copytree(swept, tmp_path / "copy")
    path = root / "planted" / "traces.parquet"
    traces = pq.read_table(path)
    given = pc.equal(traces["set"], "benign")
    source = pc.if_else(given, "existing", traces["source"])
    pq.write_table(traces.set_column(traces.schema.get_field_index("source"), "source", source), path)
    prompts = [p.model_copy(update={"existing": p.name == "benign"}) for p in study.prompts]
    context = identify(study.model_copy(update={"prompts": tuple(prompts)}), root)
    planned = experiment(context, "planted")
    sets = {traces["set"][i].as_py() for i in planned.asked}
    assert sets == {"harmful", "wrapped_strong"}
    assert "not written by any model" in planned.left_out["benign"]
    assert (planned.read, "given traces" in planned.unread) == ((), True)


@pytest.mark.parametrize(
    ("repair", "words"),
    [
        ({"curve": {"budgets": [4]}}, ["repair", "curve.budgets", "repair.corpus"]),
        ({"curve": {"selectors": ["random", "random"]}}, ["repair.curve.selectors", "none twice"]),
        ({"curve": {"sets": ["given"]}}, ["repair.curve.sets", "'given' holds finished traces"]),
        (
            {"curve": {"budgets": [4], "selectors": ["guard"]}, "corpus": True},
            ["repair.curve.selectors", "judge.guard"],
        ),
    ],
)
def test_wrong_settings(repair: dict[str, Any], words: list[str]) -> None:
    if repair.get("corpus"):
        repair = {**repair, "corpus": [{"name": "c", "path": "organism:corpus", "label": "harmful", "limit": 9}]}
    study = small_study(repair=repair)
    study["prompts"].append({"name": "given", "path": "given.jsonl", "label": "benign", "existing": True})
    with pytest.raises(ConfigError) as caught:
        parse(study)
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_report_tells_the_curve(swept: Path) -> None:
    section = curve_section(cast(ModelResults, SimpleNamespace(folder=swept / "planted")))
    assert section is not None
    note, drawing, pareto, rates, made = section.blocks
    assert isinstance(note, Note)
    assert isinstance(drawing, Drawing)
    assert isinstance(pareto, Drawing)
    assert set(drawing.panels) == {"asr", "over_refusal"}
    assert isinstance(rates, Table)
    assert isinstance(made, Table)
    found = json.loads((swept / "planted" / "curve.json").read_text())
    assert list(note.items) == found["findings"]
    assert len(rates.rows) == len(made.rows) + 1 == 3
    packed = pack([section], "figures/planted", "m0")
    assert sum(path.endswith(".png") for path in packed.files) == 3
    line = curve_line({"curve": found})
    assert line.startswith("less is more: ASR ")
    assert "misalignment" in line
    assert curve_line({}) == ""
    assert "no probe" in curve_line({"curve": {"reason": "no probe"}})
