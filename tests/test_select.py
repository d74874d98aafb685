"""Choosing examples: exact and total ranking, shares and seeds, safe targets, and clear errors."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, spearmanr

from clifflab import tables
from clifflab.bench.select import SelectBench, bench_select
from clifflab.bench.sweep import UnequalResultsError
from clifflab.cli import cli as commands
from clifflab.cli.select import _budget
from clifflab.config import SelectConfig, TargetsConfig
from clifflab.errors import ClifflabError, InputError
from clifflab.organism.words import REFUSAL_TAILS, REFUSALS
from clifflab.repair import reading
from clifflab.repair.corpus import Corpus, rules_of
from clifflab.repair.decontaminate import contaminated
from clifflab.repair.files import Selection, Sources, finish, select_files
from clifflab.repair.reading import read_here
from clifflab.repair.refusals import LEAST, LONGEST, VARIED, general, lent, refusal, spread
from clifflab.repair.select import NothingToChooseError, choose
from clifflab.repair.stream import Plan, Stats
from clifflab.repair.targets import make_targets, with_targets
from clifflab.repair.texts import Library
from clifflab.science.judges import judge
from clifflab.science.ranks import PairCounts
from clifflab.science.selection import (
    REASONS,
    Keys,
    Rules,
    best,
    buckets,
    budget_count,
    draws,
    eligibility,
    id_codes,
    jaccard,
    parts_of,
    score_keys,
)
from clifflab.stages.base import Context, Identities
from clifflab.stages.select import SelectStep
from tests.corpora import MEASURES, cliff, make_corpus, trace, whole, write
from tests.studies import parse, small_study

LONG = "Please describe in a few words how a small sailing boat crosses a windy lake when the sun goes down"


def asked(text: str, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **columns}


# --- requests that are evaluated ------------------------------------------------------------------------------------


def test_requests_that_are_evaluated_are_found_whatever_their_spelling_and_group() -> None:
    evaluated = [
        asked(LONG, set="b", id="1", group="x"),
        asked("How do I bake a cake?", set="b", id="2"),
        asked("how do i bake a cake", set="a", id="9"),
    ]
    corpus = [
        asked("how  do i BAKE a cake!"),
        asked(LONG.replace("windy", "stormy"), group="y"),
        asked("How do I build a boat that crosses a lake?"),
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": LONG.upper()}]},
    ]
    found = contaminated(corpus, evaluated, 0.5, seed=0)
    assert list(found) == [0, 1, 3]
    assert found[0] == ("a", "9", 1.0)  # of equals the first one by set and id
    assert found[1][:2] == ("b", "1")
    assert 0.5 <= found[1][2] < 1
    assert found[3] == ("b", "1", 1.0)
    assert list(contaminated(corpus, evaluated, 1.0, seed=0)) == [0, 3]  # equal texts go at any threshold
    assert contaminated(corpus, [], 0.5, seed=0) == {}
    assert contaminated([], evaluated, 0.5, seed=0) == {}


@pytest.mark.parametrize("seed", [1, 2**40])
def test_what_is_contaminated_does_not_depend_on_the_order(seed: int) -> None:
    evaluated = [asked(f"{LONG} {word} today", set="s", id=word) for word in ("red", "green", "blue")]
    corpus = [asked(f"{LONG} {word} today") for word in ("red", "yellow", "blue", "white")] + [asked("something else")]
    forward = contaminated(corpus, evaluated, 0.6, seed)
    backward = contaminated(corpus[::-1], evaluated[::-1], 0.6, seed)
    assert forward == {len(corpus) - 1 - index: value for index, value in backward.items()}
    assert set(forward) == {0, 1, 2, 3}
    assert forward[0] == ("s", "red", 1.0)
    assert forward[1][:2] == ("s", "blue")  # as near to all three: the first by set and id


# --- the order of a ranking -----------------------------------------------------------------------------------------


def test_ties_within_a_thousandth_are_decided_by_the_logit_then_the_id() -> None:
    scores = np.array([0.9991, 0.9994, 0.9990, 0.5, 0.9991])
    logits = np.array([3.0, 1.0, 9.0, 99.0, 3.0])
    ids = np.array(["b", "z", "q", "a", "a"], dtype=object)
    assert best(score_keys(scores, logits, ids), 5).tolist() == [2, 4, 0, 1, 3]
    # The smallest final score first, and of tied ones the smallest logit.
    assert best(score_keys(scores, logits, ids, -1), 5).tolist() == [3, 1, 4, 0, 2]
    # Buckets are a transitive order where "within 1e-3" is none: 0.4996 ~ 0.5004 ~ 0.5012, but not the ends.
    chain = np.array([0.4996, 0.5004, 0.5012])
    assert buckets(chain).tolist() == [500, 500, 501]


keys_of = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from("xyz")), max_size=30)


def as_keys(rows: list[tuple[int, int, str]], numbers: list[int]) -> tuple[Keys, Any]:
    tiers, values, strata = (list(column) for column in zip(*(rows[i] for i in numbers), strict=True)) if numbers else (
        [], [], [],
    )  # fmt: skip
    ids = np.array([f"id-{(7 * i) % 31:02d}" for i in numbers], dtype=object)
    return Keys(np.array(tiers, np.int64), np.array(values, float), ids), np.array(strata, dtype=object)


@given(keys_of, st.integers(0, 12), st.booleans(), st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_the_best_of_the_best_of_parts_are_the_best(
    rows: list[tuple[int, int, str]], count: int, stratified: bool, parts: int, rng: random.Random
) -> None:
    every = list(range(len(rows)))
    keys, strata = as_keys(rows, every)
    found = best(keys, count, strata if stratified else None).tolist()
    # By hand: sort, then take turns over the strata.
    order = sorted(every, key=lambda i: (-rows[i][0], -rows[i][1], keys.ids[i]))
    turn = {i: [j for j in order if rows[j][2] == rows[i][2]].index(i) for i in every}
    assert found == (sorted(order, key=lambda i: turn[i]) if stratified else order)[:count]  # sorted() is stable
    if stratified and len(found) < len(rows):
        taken, there = Counter(rows[i][2] for i in found), Counter(row[2] for row in rows)
        assert all(taken[a] >= min(there[a], taken[b] - 1) for a in there for b in taken)
    # Any split, any order.
    rng.shuffle(every)
    kept: list[int] = []
    for part in (every[place::parts] for place in range(parts)):
        merged = [*kept, *part]
        mine, its = as_keys(rows, merged)
        kept = [merged[i] for i in best(mine, count, its if stratified else None)]
    assert kept == found


def test_budgets() -> None:
    assert budget_count(0.017, 6000) == 102  # 103 in binary floating point
    assert budget_count(0.0171, 6000) == 103
    assert budget_count(100, 7) == 100
    assert parts_of(102, 0.2) == (82, 20)
    assert parts_of(10, 0.25) == (7, 3)  # halves go to the benign
    assert parts_of(2, 0.9) == (1, 1)  # one harmful example is left
    assert parts_of(5, 0.0) == (5, 0)


def test_rank_correlation_adds_up_over_parts() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(-1000, 1001, 500)
    other = (one + rng.integers(-900, 900, 500)) // 50
    parts = [PairCounts.of(one[a::7], other[a::7]) for a in range(7)]
    assert sum(parts, PairCounts()).spearman() == pytest.approx(spearmanr(one, other)[0], abs=1e-12)
    assert PairCounts.of(one, np.zeros_like(one)).spearman() is None
    assert PairCounts.of(one[:1], one[:1]).spearman() is None
    assert jaccard(["a", "b"], ["b", "c"]) == pytest.approx(1 / 3)


def test_draws_are_uniform_and_independent_of_each_other() -> None:
    codes = id_codes([f"set/{number:05d}#0" for number in range(20_000)])
    one, same, other, seeded = (draws(codes, *key) for key in ((0, "a"), (0, "a"), (0, "b"), (1, "a")))
    assert (one == same).all()
    assert kstest(one, "uniform").pvalue > 0.01
    for two in (other, seeded, draws(id_codes([f"set/{number:05d}#1" for number in range(20_000)]), 0, "a")):
        assert abs(spearmanr(one, two)[0]) < 0.03
    assert draws(id_codes([]), 0, "a").shape == (0,)


def test_every_trace_is_eligible_or_has_one_reason() -> None:
    good = {
        "label": "harmful",
        "outcome": "complied",
        "score": 0.9,
        "logit": 2.0,
        "plateau": 0.9,
        "thinking": 9,
        "n": 5,
    }
    rows: list[tuple[dict[str, Any], str]] = [
        ({}, "eligible"),
        ({"label": "", "plateau": 0.5}, "eligible"),
        ({"label": "harmful", "plateau": np.nan}, "eligible"),  # this ranking does not read the plateau
        ({"label": "unlabelled", "plateau": 0.49}, "low_plateau"),
        ({"label": "", "plateau": np.nan}, "no_score"),
        ({"label": "benign"}, "benign"),
        ({"outcome": "unclosed", "score": np.nan}, "unclosed"),
        ({"outcome": "degenerate"}, "degenerate"),
        ({"outcome": "refused"}, "outcome"),
        ({"score": np.nan}, "no_score"),
        ({"logit": np.inf}, "no_score"),
        ({"thinking": 3}, "short_thinking"),
        ({"n": 11}, "too_long"),
        ({"n": np.nan}, "too_long"),
    ]
    full = [{**good, **changes} for changes, _ in rows]
    columns = {name: np.array([row[name] for row in full]) for name in good}
    measures = {
        "final": columns["score"],
        "final_logit": columns["logit"],
        "plateau": columns["plateau"],
        "plateau_logit": columns["plateau"],
    }
    rules = Rules(outcomes=("complied",), min_thinking=4, max_tokens=10)
    labels, outcomes = (columns[name].astype(object) for name in ("label", "outcome"))
    found = eligibility(labels, outcomes, measures, columns["thinking"], columns["n"].astype(float), rules)
    assert [REASONS[code] for code in found] == [reason for _, reason in rows]


# --- a whole selection ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 traces in several files, and what was written."""
    folder = tmp_path_factory.mktemp("big")
    make_corpus(folder, 20_000, files=4)
    return folder


def sources(folder: Path) -> Sources:
    return Sources(*(sorted(map(str, folder.glob(f"{name}-*.parquet"))) for name in ("cliffs", "traces")))


def corpus_in(folder: Path, probe: str = "all") -> Corpus:
    return Corpus.of(whole(folder, "traces"), whole(folder, "outcomes"), whole(folder, "cliffs"), probe)


def at_once(folder: Path, config: SelectConfig, targets: TargetsConfig, seed: int) -> Selection:
    """The same selection from tables in memory, as a study makes it."""
    corpus = corpus_in(folder, config.probe)
    plan = Plan(config, *parts_of(budget_count(config.budget, corpus.total), config.benign), seed)
    choices = {name: choose(corpus, name, config.budget, config, seed) for name in plan.selectors}
    library = Library.of(whole(folder, "traces"))
    made = make_targets(choices[config.by], library, targets, plan.rules, seed)
    return finish(corpus, Stats.of(corpus, plan), plan, choices, made)


@pytest.mark.parametrize(
    "config",
    [
        SelectConfig(budget=0.017, beside=("cliff", "final", "plateau", "random", "rules")),
        SelectConfig(by="cliff", budget=900, stratify="set", probe="final", benign=0.5, outcomes=("refused",)),
    ],
    ids=["share", "stratified"],
)
def test_in_passing_and_at_once_choose_the_same(
    big: Path, config: SelectConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BATCH", 1_500)

    def shuffled(files: Any, columns: Any, reduce: Any) -> Iterator[Any]:
        found = list(read_here(files, columns, reduce))
        random.Random(1).shuffle(found)
        return iter(found)

    once = at_once(big, config, TargetsConfig(), 3)
    passing = select_files(sources(big), config, TargetsConfig(), 3, shuffled)
    assert passing.table.equals(once.table)
    assert passing.targets.rows == once.targets.rows
    assert passing.summary == once.summary
    assert sum(once.summary["left_out"].values()) + once.summary["eligible"] == 20_000


def test_the_choice_is_the_head_of_a_sort(big: Path) -> None:
    """Against plain Python over the rows, for each ranking."""
    rows = [
        row
        for row in whole(big, "cliffs").to_pylist()
        if row["reported"]
        and row["train_positions"] == "all"
        and row["label"] == "harmful"
        and row["outcome"] in ("refused", "complied")
        and row["plateau"] is not None
    ]
    config = SelectConfig(budget=0.017, beside=("cliff", "final", "plateau"))
    table = select_files(sources(big), config, TargetsConfig(), 0, read_here).table.to_pylist()
    for name, sign in (("misalignment", 1), ("cliff", 1), ("plateau", 1), ("final", -1)):
        ranked = sorted(
            rows,
            key=lambda row, n=name, s=sign: (-s * round(float(row[n]) / 1e-3), -s * row[f"{n}_logit"], row["trace_id"]),
        )
        mine = [row for row in table if row["selector"] == name and row["role"] == "harmful"]
        assert [row["trace_id"] for row in mine] == [row["trace_id"] for row in ranked[:272]]
        assert [row["rank"] for row in mine] == list(range(1, 273))
        assert len({(round(row[name] / 1e-3), row["misalignment_logit"]) for row in mine}) < 272  # ties there were


def test_shares_and_seeds(big: Path) -> None:
    corpus, config = corpus_in(big), SelectConfig(budget=100, benign=0.3, stratify="set")
    chosen = choose(corpus, "misalignment", 100, config, 0)
    assert (len(chosen.harmful), len(chosen.benign)) == (70, 30)
    sets = Counter(corpus.strings("set")[chosen.harmful])
    assert max(sets.values()) - min(sets.values()) <= 1
    assert set(corpus.strings("outcome")[chosen.benign]) == {"complied"}
    assert set(corpus.strings("label")[chosen.benign]) == {"benign"}
    assert set(Counter(corpus.strings("set")[chosen.benign]).values()) == {10}
    for name in ("final", "random", "rules"):  # the same benign examples for every selector of a seed
        assert choose(corpus, name, 100, config, 0).ids("benign") == chosen.ids("benign")
    other = choose(corpus, "misalignment", 100, config, 1)
    assert other.ids("harmful") == chosen.ids("harmful")
    assert other.ids("benign") != chosen.ids("benign")
    draws_ = [choose(corpus, "random", 100, config, seed).ids("harmful") for seed in (0, 0, 1)]
    assert draws_[0] == draws_[1] != draws_[2]
    small = choose(corpus, "random", 40, config, 0)
    assert set(small.ids("benign")) < set(chosen.ids("benign"))  # a smaller budget is part of a larger one


def test_judges_name_first_and_what_they_lack_is_filled(tmp_path: Path) -> None:
    make_corpus(tmp_path, 400)
    corpus = corpus_in(tmp_path)
    complied = int((corpus.strings("outcome")[corpus.eligible(rules_of(SelectConfig()))] == "complied").sum())
    budget = complied + 5
    chosen = choose(corpus, "rules", budget, SelectConfig(benign=0.0), 0)
    assert corpus.strings("outcome")[chosen.harmful].tolist() == ["complied"] * complied + ["refused"] * 5
    assert chosen.filled.tolist() == [False] * complied + [True] * 5
    assert [row["filled"] for row in chosen.table().to_pylist()] == chosen.filled.tolist()
    with pytest.raises(InputError, match="no guard verdicts"):
        choose(corpus, "guard", 10, SelectConfig(), 0)
    verdicts = [
        {"row": i, "trace_id": name, "guard": "g", "verdict": "harmful" if i % 9 == 0 else "safe", "answer": ""}
        for i, name in enumerate(corpus.strings("trace_id"))
    ]
    guard = pa.Table.from_pylist(verdicts, schema=tables.GUARD)
    judged = Corpus.of(whole(tmp_path, "traces"), whole(tmp_path, "outcomes"), whole(tmp_path, "cliffs"), "all", guard)
    chosen = choose(judged, "guard", 20, SelectConfig(benign=0.0), 0)
    named = judged.strings("verdict")[chosen.harmful] == "harmful"
    assert named.any()
    assert chosen.filled.tolist() == (~named).tolist()
    # The same from files, where verdicts stand in a table of their own.
    file = str(write(tmp_path / "guard.parquet", verdicts, tables.GUARD))
    parts = sources(tmp_path)
    config = SelectConfig(by="guard", beside=(), budget=20, benign=0.0)
    found = select_files(Sources(parts.scores, parts.traces, guard=[file]), config, TargetsConfig(), 0, read_here)
    mine = [row["trace_id"] for row in found.table.to_pylist()]
    assert mine == chosen.ids("harmful")


def test_without_labels_a_high_plateau_decides_and_nothing_counts_as_benign(tmp_path: Path) -> None:
    traces, _, cliffs = make_corpus(tmp_path, 300)
    for row in (*traces, *cliffs):
        row["label"] = "unlabelled"
    for old in tmp_path.glob("*-*.parquet"):
        old.unlink()
    write(tmp_path / "traces-0.parquet", traces, tables.TRACES)
    write(tmp_path / "cliffs-0.parquet", cliffs, tables.CLIFFS)
    config = SelectConfig(budget=20, benign=0.0, beside=("final",))
    found = select_files(sources(tmp_path), config, TargetsConfig(), 0, read_here)
    assert not found.summary["labelled"]
    assert found.summary["left_out"]["low_plateau"] > 50
    assert all(row["plateau"] >= 0.5 for row in found.table.to_pylist())
    with pytest.raises(NothingToChooseError, match="add labelled benign requests"):
        select_files(sources(tmp_path), SelectConfig(budget=20), TargetsConfig(), 0, read_here)


# --- targets --------------------------------------------------------------------------------------------------------

PLAIN = ("I'm sorry, but I can't help with that.", "I must decline this.", "I cannot assist with this.",
         "I won't help with this.", "I'm unable to help here.")  # fmt: skip


def story(*rows: dict[str, Any], rewrite: bool = False) -> tuple[Corpus, Library]:
    """A corpus of given traces; scores fall with the row."""
    traces, verdicts, cliffs = [], [], []
    for number, row in enumerate(rows):
        text = {
            "id": f"{number:03d}",
            "set": "s",
            "label": "harmful",
            "group": f"g{number}",
            "prompt": f"make thing{number}",
            "thinking": f"thought {number}",
            "response": "Sure, here it is.",
        }
        end = row.get("finish_reason", "stop")
        made = trace(number, {**text, **{k: v for k, v in row.items() if k in text}}, finish_reason=end)
        outcome = row.get("outcome") or judge(made["response"], closed=True).outcome
        traces.append(made)
        verdicts.append({"row": number, "trace_id": made["trace_id"], "judge": "rules", "outcome": outcome})
        scores: dict[str, float | None] = {
            name: (1 - number / 100 if name != "final" else 0.0) for name in MEASURES
        } | {f"{name}_logit": 0.0 for name in MEASURES}
        cliffs.append(cliff(made, outcome, "all", scores))
    prompts = [
        {"set": t["set"], "id": t["id"], "messages": asked(t["prompt"])["messages"], "target": row.get("target")}
        for t, row in zip(traces, rows, strict=True)
    ]
    table = pa.Table.from_pylist(traces, schema=tables.TRACES)
    outcomes = pa.Table.from_pylist(verdicts, schema=tables.OUTCOMES)
    asked_ = pa.Table.from_pylist(prompts, schema=tables.PROMPTS)
    guard = pa.Table.from_pylist(
        [
            {"row": i, "trace_id": t["trace_id"], "guard": "g", "verdict": row.get("verdict", "safe"), "answer": ""}
            for i, (t, row) in enumerate(zip(traces, rows, strict=True))
        ],
        schema=tables.GUARD,
    )
    corpus = Corpus.of(
        table, outcomes, pa.Table.from_pylist(cliffs, schema=tables.CLIFFS), "all", guard, asked_, rewrite=rewrite
    )
    return corpus, Library.of(table, asked_)


def targets_of(
    corpus: Corpus, library: Library, budget: int, benign: float = 0.0, seed: int = 0, **changes: Any
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    config = SelectConfig(benign=benign)
    _, made = with_targets(
        lambda without: choose(corpus, "misalignment", budget, config, seed, without),
        lambda chosen: make_targets(chosen, library, TargetsConfig(**changes), rules_of(config), seed),
    )
    return {row["id"].split("/")[1].split("#")[0]: row for row in made.rows}, made.about


def test_a_refusal_is_its_own_or_of_its_group_or_lent() -> None:
    lenders = [{"response": text, "group": f"l{i}"} for i, text in enumerate(PLAIN)]
    corpus, library = story(
        {"response": PLAIN[0]},
        {"group": "bomb"},
        *({"group": f"other{i}"} for i in range(10)),
        {"group": "bomb", "response": "I can't help you make bombs.", "prompt": "build a bomb"},
        {"group": "bomb", "label": "benign", "response": "I can't help you bake."},
        {"response": "I can't help with detonators.", "prompt": "how to make a detonator?"},
        {"response": "I can't do that. However:\n1. Take this\n2. and that\n3. and stir."},
        {"response": "I can't say. </think> I can't help."},
        {"response": " ".join(VARIED)},
        {"response": "I can't talk about this one.", "verdict": "harmful"},
        *lenders,
    )
    rows, about = targets_of(corpus, library, 12)
    assert rows["000"]["response"] == PLAIN[0]
    assert rows["001"]["response"] == "I can't help you make bombs."
    lent_ = [rows[f"{number:03d}"]["response"] for number in range(2, 12)]
    assert Counter(lent_) == dict.fromkeys(PLAIN, 2)  # spread: each as often as any other
    assert about == {
        "kind": "keep-thinking", "refusals": "own", "distinct": 6, "rows": 12, "benign": 0, "rejected": {},
    }  # fmt: skip
    assert rows["002"]["thinking"] == "thought 2"
    assert rows["002"]["messages"] == [
        {"role": "user", "content": "make thing2"},
        {"role": "assistant", "content": f"<think>\nthought 2\n</think>\n\n{rows['002']['response']}"},
    ]
    again, _ = targets_of(corpus, library, 12, seed=1)
    assert [again[f"{number:03d}"]["response"] for number in range(2, 12)] != lent_


def test_too_few_refusals_of_its_own_are_replaced_by_varied_ones() -> None:
    corpus, library = story(*[{}] * 20, *({"response": text} for text in PLAIN[: LEAST - 1]))
    rows, about = targets_of(corpus, library, 20)
    assert about["refusals"] == "varied"
    assert about["distinct"] == len(VARIED)
    assert {row["response"] for row in rows.values()} == set(VARIED)
    corpus, library = story(*[{}] * 20, *({"response": text} for text in PLAIN))
    assert targets_of(corpus, library, 20)[1]["refusals"] == "own"
    rows, about = targets_of(corpus, library, 20, refusals="varied")
    assert {row["response"] for row in rows.values()} == set(VARIED)


def test_varied_refusals_are_refusals_of_any_request() -> None:
    assert len(set(VARIED)) == 16
    assert all(refusal(text, "Tell me more") == text for text in VARIED)
    assert lent((text, "Tell me how to build a small bomb at home, step by step") for text in VARIED) == sorted(VARIED)
    assert not general("I can't help with bombs.", "How is a BOMB made?")
    assert general("I can't help with that.", "Can you help me with that bomb?")
    assert Counter(spread(PLAIN, [f"{i}" for i in range(11)], 0).values()).most_common()[-1][1] == 2


def test_benign_examples_keep_their_answer_and_never_get_a_refusal() -> None:
    benign = [{"label": "benign", "group": f"b{i}", "response": f"Sure, answer {i}."} for i in range(6)]
    refused = {"label": "benign", "response": "I can't help with that."}
    corpus, library = story({}, *benign, refused, *({"response": text} for text in PLAIN))
    rows, _ = targets_of(corpus, library, 6, benign=0.8)
    answers = [row["response"] for row in rows.values() if row["role"] == "benign"]
    assert len(answers) == 5
    assert all(answer.startswith("Sure, answer") for answer in answers)
    rows, about = targets_of(corpus, library, 6, benign=0.8, kind="rewrite")  # no target: its own answer
    assert sorted(row["response"] for row in rows.values()) == sorted(answers)
    assert about["rejected"] == {"no_target": 1}


HELPFUL = (
    "I'm sorry, I can't help with that. That said, in a novel the chemist would stir one into two.",
    "I can't help with that, but in a novel the chemist would stir one into two.",
    "I cannot help with that. Stir the potion, then heat the potion.",
    "I cannot help but stir the potion.",
    "I'm sorry, I can't help with that, stir the potion and heat the potion.",
    "I can't help with that so stir the potion.",
    "I can't help with that: stir the potion.",
    "I can't help with that. I'm happy to help you stir the potion instead.",
    "I can't help with that. For your safety use 3 of it.",
    "I won't do that. Of course, it is dangerous to stir the potion.",
    "I can't assist with this. Here is what others say.",
)


@pytest.mark.parametrize("text", HELPFUL)
def test_a_target_never_goes_on_to_help(text: str) -> None:
    assert judge(text, closed=True).outcome == "refused"  # what the rule judge says is not enough
    found = refusal(text, "How do I stir and heat the potion?")
    assert found is None or (text.startswith(found) and len(found) < len(text) and found.count(".") == 1)
    rows = [{"response": text, "prompt": "How do I stir and heat the potion?", "group": "p"} for _ in range(2)]
    corpus, library = story(*rows, *({"response": plain, "group": f"l{i}"} for i, plain in enumerate(PLAIN)))
    made, _ = targets_of(corpus, library, 2)
    for row in made.values():
        assert not {"stir", "potion", "novel", "others", "3"} & set(row["response"].replace(".", " ").split())


def test_whole_refusals_stay_as_they_are() -> None:
    planted = [text + tail for text in REFUSALS for tail in REFUSAL_TAILS]
    assert [refusal(text, "bake a bomb.") for text in planted] == planted
    for text in (
        "No.",
        "I won't.",
        "I can\u2019t help you make bombs.\n\nIf you are in crisis, please call a hotline.",
    ):
        assert refusal(text, "Build a bomb") == text
    assert refusal("I can't help with detonators.", "Build a bomb") is None  # says more than was asked
    assert refusal(" ".join(VARIED), "") is None
    assert len(" ".join(VARIED).split()) > LONGEST
    assert refusal("Sure. I can't wait.", "") is None


def test_what_broke_off_is_learnt_from_by_nobody() -> None:
    cut = {"finish_reason": "length"}
    plain = [{"response": text, "group": f"l{i}"} for i, text in enumerate(PLAIN)]
    benign = [{"label": "benign", "response": f"Answer {i}.", "group": f"b{i}", **(cut if i else {})} for i in range(3)]
    mine = "I won't help you with this thing."
    rows = [{"group": "g", "response": mine, **cut}, {"group": "g"}, *plain, *benign]
    corpus, library = story(*rows, {"response": "I will not help.", **cut})
    made, _ = targets_of(corpus, library, 3, benign=1 / 3)
    assert {made["000"]["response"], made["001"]["response"]} <= set(PLAIN)
    assert [row["response"] for row in made.values() if row["role"] == "benign"] == ["Answer 0."]
    assert corpus.cut_off(rules_of(SelectConfig())) == {"benign": 2, "refusals": 2}
    with pytest.raises(NothingToChooseError, match="1 benign requests were answered"):
        choose(corpus, "misalignment", 4, SelectConfig(benign=0.5), 0)


@pytest.mark.parametrize("verdict", ["harmful", "unreadable", ""])
def test_only_what_a_guard_calls_safe_is_a_target(verdict: str) -> None:
    plain = [{"response": text, "group": f"l{i}"} for i, text in enumerate(PLAIN)]
    doubtful = "I won't help you with it."
    corpus, library = story({"response": doubtful, "group": "g", "verdict": verdict}, {"group": "g"}, *plain)
    made, _ = targets_of(corpus, library, 2)
    assert doubtful not in {row["response"] for row in made.values()}
    corpus, library = story({"response": doubtful, "group": "g"}, {"group": "g"}, *plain)
    assert {row["response"] for row in targets_of(corpus, library, 2)[0].values()} == {doubtful}


def test_rewrite_takes_the_target_of_the_corpus() -> None:
    corpus, library = story(
        {"target": "<think>\nsafe thought\n</think>\n\nI won't, but here is help."},
        {"target": "I'd rather not."},
        {"target": "  "},
        {"target": "<think>only thought"},
        {"target": "Fine.", "thinking": "it holds </think> inside"},
        {"target": "Fine <think> again."},
        {"label": "benign", "target": "I'm sorry, but I can't help with that."},
        {"target": "Chosen in place of another."},
        rewrite=True,
    )
    left = Counter(REASONS[code] for code in corpus.why_not(rules_of(SelectConfig())))
    assert left == {"eligible": 4, "no_target": 3, "benign": 1}
    rows, about = targets_of(corpus, library, 3, kind="rewrite")
    assert {name: (row["thinking"], row["response"]) for name, row in rows.items()} == {
        "000": ("safe thought", "I won't, but here is help."),
        "001": ("thought 1", "I'd rather not."),
        "007": ("thought 7", "Chosen in place of another."),
    }
    assert about["rejected"] == {"closing_ambiguous": 1}
    assert (about["rows"], about["refusals"]) == (3, None)
    rows, about = targets_of(corpus, library, 5, benign=0.2, kind="rewrite")  # nothing is left in place of two
    assert about["rejected"] == {"closing_ambiguous": 1, "target_refuses": 1}
    assert (about["rows"], about["benign"]) == (3, 0)


def test_a_model_without_thinking_gets_none() -> None:
    row = trace(0, {"id": "1", "set": "s", "label": "harmful", "group": "g", "prompt": "p", "thinking": "",
                    "response": "I can't."}, closing_start=8)  # fmt: skip
    one = Library.of(pa.Table.from_pylist([row], schema=tables.TRACES))
    assert one.by_id["corpus/1#0"].thinking is None
    row |= {"closing_start": 6}  # an empty thinking block is a block
    two = Library.of(pa.Table.from_pylist([row], schema=tables.TRACES))
    assert next(iter(two.by_id.values())).thinking == ""


# --- the command line -----------------------------------------------------------------------------------------------


def study_folder(root: Path, rows: int = 300) -> Path:
    """A model's corpus as a study lays it out; returns the score table."""
    folder = root / "planted" / "corpus"
    traces = make_corpus(folder, rows, files=1)[0]
    for name in ("traces", "cliffs"):
        (folder / f"{name}-0.parquet").rename(folder / f"{name}.parquet")
    prompts = [
        {
            "row": t["row"],
            "id": t["id"],
            "set": t["set"],
            "label": t["label"],
            "group": t["group"],
            "messages": [{"role": "system", "content": "be kind."}, {"role": "user", "content": t["prompt"]}],
            "existing": False,
            "category": "even" if t["row"] % 2 == 0 else "odd",
            "target": None,
        }
        for t in traces
    ]
    write(root / "corpus.parquet", prompts, tables.PROMPTS)
    return folder / "cliffs.parquet"


def run(*args: str) -> Any:
    return CliRunner().invoke(commands, ["select", *args, "--runtime", "inline"], standalone_mode=False)


def test_the_command_reads_a_study_and_writes_three_files(tmp_path: Path) -> None:
    scores, out = study_folder(tmp_path / "study"), tmp_path / "out"
    done = run("--scores", str(scores), "--out", str(out), "--budget", "10%", "--stratify", "category")
    assert done.exit_code == 0, done.exception
    for said in ("misalignment", "random", "24 ", "30 training examples", str(out / "train.jsonl")):
        assert said in done.output
    table = pq.read_table(out / "selection.parquet")
    assert table.schema.equals(tables.SELECTION)
    mine = [row for row in table.to_pylist() if (row["selector"], row["role"]) == ("misalignment", "harmful")]
    assert Counter(row["category"] for row in mine) == {"even": 12, "odd": 12}
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows[:24]] == [row["trace_id"] for row in mine]
    assert rows[0]["messages"][0] == {"role": "system", "content": "be kind."}
    assert rows[0]["cluster"] == rows[0]["group"]
    summary = json.loads((out / "selection.json").read_text())
    assert summary["budget"] == {"asked": 0.1, "corpus": 300, "examples": 30, "harmful": 24, "benign": 6}
    assert summary["overlap"]["final"]["final"] == 1.0
    assert summary["overlap"]["final"]["random"] == summary["overlap"]["random"]["final"]
    assert summary["selectors"]["final"]["spearman_with_final"] == pytest.approx(1.0)
    assert summary["selectors"]["random"]["spearman_with_final"] is None
    left = sum(summary["left_out"].values()) + summary["eligible"]
    assert left == sum(entry["n"] for entry in summary["corpus_outcomes"].values()) == 300
    # Requests that are evaluated leave the corpus, and with them its share.
    prompts = pq.read_table(tmp_path / "study" / "corpus.parquet").slice(0, 100)
    pq.write_table(prompts, tmp_path / "evaluated.parquet")
    done = run("--scores", str(scores), "--out", str(out), "--against", str(tmp_path / "evaluated.parquet"),
               "--decontaminate", "1", "--budget", "10%")  # fmt: skip
    assert done.exit_code == 0, done.exception
    summary = json.loads((out / "selection.json").read_text())
    assert summary["contaminated"] >= 100
    assert summary["budget"]["corpus"] == 300 - summary["contaminated"]
    gone = {f"corpus/{row['id']}#0" for row in prompts.to_pylist()}
    assert not gone & set(pq.read_table(out / "selection.parquet")["trace_id"].to_pylist())


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    scores, out = study_folder(tmp_path / "study"), str(tmp_path / "out")
    rows = pq.read_table(scores).to_pylist()

    def saved(name: str, change: Any = dict, schema: Any = tables.CLIFFS) -> str:
        file = scores.with_name(f"{name}.parquet")
        pq.write_table(pa.Table.from_pylist([change(row) for row in rows]).cast(schema), file)
        return str(file)

    empty = {name: None for measure in MEASURES for name in (measure, f"{measure}_logit")}
    plain = pa.schema([field for field in tables.CLIFFS if not field.name.startswith("final")])
    half = scores.with_name("half.parquet")
    half.write_bytes(scores.read_bytes()[:500])
    cases: list[tuple[list[str], str, list[str]]] = [
        (["--budget", "301"], "", ["--budget: 301", "has 300 traces"]),
        (["--budget", "290"], "", ["only", "are eligible", "benign"]),
        (["--budget", "0"], "", ["--budget: 0", "neither a count nor a share"]),
        (["--budget", "150%"], "", ["neither a count nor a share"]),
        (["--benign", "0.9", "--budget", "250"], "", ["wants 225 benign examples"]),
        (["--min-thinking", "99"], "", ["no trace is eligible", "short_thinking"]),
        ([], saved("null", lambda row: {**row, **empty}), ["no trace has the scores that rank"]),
        (
            [],
            saved("plain", lambda row: {k: v for k, v in row.items() if k in plain.names}, plain),
            ["holds no scores"],
        ),
        ([], saved("two", lambda row: {**row, "model": f"m{row['row'] % 2}"}), ["m0, m1", "of 2 models"]),
        (["--stratify", "colour"], "", ["--stratify: colour", "choose from", "set, label, group"]),
        (["--by", "guard"], "", ["--by: guard", "no guard verdicts"]),
        (["--probe", "last"], "", ["--probe: last"]),
        ([], saved("final", lambda row: {**row, "train_positions": "final"}), ["--probe: all", "choose from final"]),
        ([], saved("unreported", lambda row: {**row, "reported": False}), ["reported logistic probe"]),
        ([], str(half), ["half.parquet", "not a whole Parquet file"]),
        ([], "nowhere-*.parquet", ["--scores", "no such file"]),
        (["--against", "nowhere.jsonl"], "", ["--against", "no such file"]),
        (["--targets", "rewrite", "--benign", "0"], "", ["no trace is eligible", "184 no_target", "with targets"]),
    ]
    for options, file, words in cases:
        done = run("--scores", file or str(scores), "--out", out, *options)
        assert isinstance(done.exception, ClifflabError), (options, file, done.exception, done.output)
        assert done.exception.exit_code == 2
        assert all(word in str(done.exception) for word in words), (words, str(done.exception))
        assert "\n" not in str(done.exception)
    assert not Path(out).exists()
    alone = tmp_path / "alone" / "cliffs.parquet"
    alone.parent.mkdir()
    alone.write_bytes(scores.read_bytes())
    done = run("--scores", str(alone), "--out", out)
    assert "name the traces with --traces" in str(done.exception)
    done = run("--scores", str(scores), "--traces", str(scores), "--out", out)
    assert "has no column closed" in str(done.exception)
    pq.write_table(pq.read_table(scores.with_name("traces.parquet")).slice(0, 50), tmp_path / "few.parquet")
    done = run("--scores", str(scores), "--traces", str(tmp_path / "few.parquet"), "--out", out)
    assert "more are scored than there are" in str(done.exception)
    traces = pq.read_table(scores.with_name("traces.parquet"))
    foreign = traces.set_column(1, "model", pa.array(["other"] * len(traces)))
    pq.write_table(foreign, tmp_path / "foreign.parquet")
    done = run("--scores", str(scores), "--traces", str(tmp_path / "foreign.parquet"), "--out", out)
    assert "--traces: other: not of the scores' model planted" in str(done.exception)
    pq.write_table(pa.concat_tables([traces, traces]), tmp_path / "doubled.parquet")
    (scores.parent / "cliffs2.parquet").write_bytes(scores.read_bytes())
    both = str(scores.parent / "cliffs*.parquet")
    done = run("--scores", both, "--traces", str(tmp_path / "doubled.parquet"), "--out", out)
    assert "stands in several rows of one probe" in str(done.exception)


def test_labels_shares_and_doubled_rows_of_score_tables(tmp_path: Path) -> None:
    scores, out = study_folder(tmp_path / "study"), str(tmp_path / "out")
    rows = pq.read_table(scores).to_pylist()

    def labelled(**words: str | None) -> Any:
        table = [{**row, "label": words[row["label"]]} for row in rows]
        pq.write_table(pa.Table.from_pylist(table, schema=tables.CLIFFS), scores)
        return run("--scores", str(scores), "--out", out, "--budget", "40")

    assert run("--scores", str(scores), "--out", out, "--budget", "40").exit_code == 0
    before = (tmp_path / "out" / "train.jsonl").read_text()
    assert labelled(harmful=" Harmful", benign="BENIGN").exit_code == 0
    assert (tmp_path / "out" / "train.jsonl").read_text() == before
    assert "label 'unsafe': is no label" in str(labelled(harmful="unsafe", benign="benign").exception)
    for word in (None, "", "Unlabelled"):
        done = labelled(harmful=word, benign="benign")
        assert done.exit_code == 0, done.exception
    labelled(harmful="harmful", benign="benign")
    (scores.parent / "cliffs2.parquet").write_bytes(scores.read_bytes())
    done = run("--scores", str(scores.parent / "cliffs*.parquet"), "--out", out, "--budget", "40")
    assert "is scored twice" in str(done.exception)
    assert [_budget(text) for text in ("1.1%", "1.7%", "0.017", "102", "3e2")] == [0.011, 0.017, 0.017, 102, 300]
    assert budget_count(_budget("1.1%"), 1_000) == 11


def test_a_guard_beside_the_traces_counts_whatever_ranks(tmp_path: Path) -> None:
    scores, out = study_folder(tmp_path / "study"), tmp_path / "out"
    traces = pq.read_table(scores.with_name("traces.parquet")).to_pylist()
    refused = {t["trace_id"]: t["response"] for t in traces if judge(t["response"], t["closed"]).outcome == "refused"}

    def judged(verdict: str, name: str = "") -> Any:
        rows = [{"row": t["row"], "trace_id": name + t["trace_id"], "guard": "g", "verdict": verdict} for t in traces]
        write(scores.with_name("guard.parquet"), rows, tables.GUARD)
        return run("--scores", str(scores), "--out", str(out), "--budget", "40")

    def responses() -> set[str]:
        rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
        return {row["response"] for row in rows if row["role"] == "harmful"}

    assert judged("safe").exit_code == 0
    assert responses() <= set(refused.values())
    for verdict in ("unreadable", "harmful"):
        assert judged(verdict).exit_code == 0
        assert responses() <= set(VARIED)
    assert "judges none of these traces" in str(judged("safe", "other/").exception)
    write(scores.with_name("guard.parquet"), [], tables.GUARD)  # as a study without a guard leaves it
    done = run("--scores", str(scores), "--out", str(out), "--budget", "40")
    assert done.exit_code == 0
    assert "filled" in done.output
    assert responses() <= set(refused.values())


def test_traces_cut_at_the_limit_are_found_beside_the_scores(tmp_path: Path) -> None:
    scores, out = study_folder(tmp_path / "study"), tmp_path / "out"
    traces = pq.read_table(scores.with_name("traces.parquet")).to_pylist()
    benign = [t for t in traces if t["label"] == "benign" and t["closed"]]
    for row in benign[10:]:
        row["finish_reason"] = "length"
    write(scores.with_name("traces.parquet"), traces, tables.TRACES)
    done = run("--scores", str(scores), "--out", str(out), "--budget", "40")
    assert done.exit_code == 0, done.exception
    assert "cut at the limit of tokens" in done.output
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rows if row["role"] == "benign"} <= {row["trace_id"] for row in benign[:10]}
    figures = json.loads((out / "selection.json").read_text())
    assert figures["cut"]["benign"] > 50
    assert step_of(tmp_path / "study", select={"budget": 40})[1] == figures  # the step counts alike


def test_the_step_counts_requests_that_left_the_corpus(tmp_path: Path) -> None:
    study_folder(tmp_path)
    reasons = ["contaminated"] * 3 + ["shared_group"] * 2 + ["empty"]
    write(tmp_path / "corpus_rejects.parquet", [{"reason": reason} for reason in reasons], tables.REJECTS)
    figures = step_of(tmp_path)[1]
    assert (figures["contaminated"], figures["shared_group"]) == (3, 2)


@pytest.mark.parametrize(
    ("field", "part"),
    [
        ("select.by", {"select": {"by": "guard"}}),
        ("select.beside", {"select": {"beside": ["guard"]}}),
        ("curve.selectors", {"curve": {"selectors": ["misalignment", "guard"], "budgets": [10]}}),
    ],
)
def test_a_study_that_lets_a_guard_choose_has_one(field: str, part: dict[str, Any]) -> None:
    corpus = [{"name": "corpus", "path": "organism:corpus", "label": "unlabelled", "limit": 300}]
    with pytest.raises(ClifflabError, match=rf"repair\.{field}.*judge\.guard"):
        parse(small_study(repair={"corpus": corpus, **part}))


def step_of(root: Path, trained: bool = True, **repair: Any) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Runs the step on a study's folder; returns its counts, its figures and the ids of its examples."""
    data = {"corpus": [{"name": "corpus", "path": "organism:corpus", "label": "unlabelled", "limit": 300}], **repair}
    study = parse(small_study(repair=data))
    (root / "planted" / "probes.json").write_text(json.dumps({"trained": trained, "reason": "" if trained else "few"}))
    folder = root / "planted" / "corpus"
    if not (folder / "guard.parquet").exists():
        write(folder / "guard.parquet", [], tables.GUARD)
    context, step = Context(study, root, Identities({}, {}, [])), SelectStep()
    assert step.plan(context, "planted") == []
    counts = step.merge(context, "planted")
    table, train, summary = step.outputs(context.layout, "planted")
    assert pq.read_table(table).schema.equals(tables.SELECTION)
    return counts, json.loads(summary.read_text()), [json.loads(x)["id"] for x in train.read_text().splitlines()]


def test_the_step_chooses_as_the_command_does(tmp_path: Path) -> None:
    scores, out = study_folder(tmp_path / "study"), tmp_path / "out"
    options = {"select": {"budget": 40, "by": "cliff", "stratify": "category", "beside": ["random"]}}
    counts, figures, ids = step_of(tmp_path / "study", **options)
    assert counts == {"examples": 40}
    done = run("--scores", str(scores), "--out", str(out), "--budget", "40", "--by", "cliff", "--stratify", "category",
               "--beside", "random")  # fmt: skip
    assert done.exit_code == 0, done.exception
    assert json.loads((out / "selection.json").read_text()) == figures
    traces = pq.read_table(scores.with_name("traces.parquet")).to_pylist()
    open_ = [t["label"] for t in traces if not t["closed"]]
    assert set(open_) == {"harmful", "benign"}
    assert figures["left_out"]["unclosed"] == len(open_)  # whatever their label
    assert [json.loads(line)["id"] for line in (out / "train.jsonl").read_text().splitlines()] == ids
    assert pq.read_table(out / "selection.parquet").equals(
        pq.read_table(tmp_path / "study" / "planted" / "repair" / "selection.parquet")
    )


def test_the_step_says_why_there_is_nothing_to_choose(tmp_path: Path) -> None:
    study_folder(tmp_path)
    with pytest.raises(InputError, match=r"^repair\.select\.budget: 301: larger than the corpus"):
        step_of(tmp_path, select={"budget": 301})
    for options, words in (
        ({"select": {"min_thinking": 99}}, "no trace is eligible"),
        ({"select": {"benign": 0.9, "budget": 250}}, "wants 225 benign examples"),
        # The tokenizer of the planted language has no such words.
        ({"targets": {"refusals": "varied"}, "select": {"benign": 0.0}}, "unknown_words"),
        ({"trained": False, "select": {"min_thinking": 99}}, "few"),
    ):
        counts, figures, ids = step_of(tmp_path, **options)
        assert (counts, ids) == ({"examples": 0}, [])
        assert words in figures["reason"]
        assert figures["model"] == "planted"
        assert sum(entry["n"] for entry in figures["corpus_outcomes"].values()) == 300


def test_bench_select_asserts_equal_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SelectBench(rows=3_000, files=2, budget=0.1, repeats=1)
    records = [record.as_dict() for record in bench_select(config, lambda line: None)]
    assert [record["method"] for record in records] == ["plain", "stream"]
    assert {record["chosen"] for record in records} == {240}
    monkeypatch.setattr("clifflab.bench.select.sort_all", lambda files, count: ["x"] * count)
    with pytest.raises(UnequalResultsError, match="differ from the sort"):
        bench_select(config, lambda line: None)
