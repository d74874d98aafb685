"""The search for heads as a study does it, on the planted model: what it finds, and how the work may be cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clifflab.errors import ConfigError, InputError, TraceError
from clifflab.models import heads as geometry
from clifflab.organism import planted_path
from clifflab.runtime.study import identify, prepare, run
from clifflab.stages import Context, head_units
from clifflab.stages.duplicates import group_clusters
from clifflab.stages.head_ranks import cluster_halves, ranked_heads
from clifflab.stages.head_units import chosen_traces, sweep_tools
from clifflab.stages.readout import kept_readers
from clifflab.sweep import SweepTrace
from clifflab.text.spans import Spans
from tests.studies import assert_same_tables, parse, small_study

FEW_HEADS: dict[str, Any] = {"traces": 6, "controls": 3, "random_directions": 4, "candidates": 3, "batch_size": 4}


def study_of(**heads: Any) -> Any:
    ablation = {"traces": 0, "fractions": [0.0, 0.03]}
    return parse(small_study(truncation={"traces": 0}, heads={**FEW_HEADS, **heads}, ablation=ablation))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def found(out: Path) -> dict[str, Any]:
    """Tables and figures of the whole search."""
    return searched(out)


def searched(out: Path, **heads: Any) -> dict[str, Any]:
    """Run the study with these settings; what is whole of an earlier one is kept."""
    folder = run(study_of(**heads), out, runtime="inline").root / "planted"
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("heads", "head_sets")}
    return {"table": pq.read_table(folder / "heads.parquet"), **read}


@pytest.fixture
def context(out: Path, found: dict[str, Any]) -> Context:
    return context_of(out)


def context_of(out: Path, **heads: Any) -> Context:
    return identify(prepare(study_of(**heads)), out / "small")


def planted_heads() -> list[str]:
    truth = json.loads((planted_path() / "ground_truth.json").read_text())
    return sorted(f"{layer}.{head}" for layer, head in truth["planted_heads"])


def test_the_planted_heads_come_first(found: dict[str, Any], context: Context) -> None:
    about = found["heads"]
    assert about["reason"] == ""
    assert about["gap"]["low"] > 0
    assert about["threshold"]["effect"] == pytest.approx(0.05 * about["gap"]["mean"])
    assert about["traces"]["attacked_are"] == "complied"
    for positions in ("closing", "all"):
        top = about["found"][positions]["top"]
        assert sorted(entry["head"] for entry in top[:2]) == planted_heads()
        assert set(planted_heads()) <= set(about["found"][positions]["suppression"])
        for entry in top[:2]:
            assert entry["low"] < entry["effect"] < entry["high"]
            assert entry["share_of_gap"] > 0.3
            assert entry["random_directions"] > 0.9
            assert abs(entry["benign"]) < 0.1 * entry["effect"]
        assert about["correlations"][positions]["attribution_log_odds"]["rho"] > 0.5
    assert not {t["id"] for t in about["openings"]["refusal"]} & {t["id"] for t in about["openings"]["compliance"]}
    ranked = ranked_heads(context, "planted")
    assert sorted(f"{layer}.{head}" for layer, head in ranked.suppression[:2]) == planted_heads()
    assert ranked.promoting == ranked.suppression[::-1]
    assert (ranked.total, ranked.reason) == (64, "")


def test_table(found: dict[str, Any]) -> None:
    rows = found["table"].to_pylist()
    keys = [(row["method"], row["positions"]) for row in rows]
    each = {("direct", "final"), *((m, p) for m in ("attribution", "exact") for p in ("closing", "all"))}
    assert {key: keys.count(key) for key in each} == dict.fromkeys(each, 64)
    for row in rows:
        assert (row["suppression"] is None) == (row["method"] != "exact")
        assert (row["effect_log_odds"] is None) == (row["method"] == "direct")
        if row["low"] is not None:
            mid = row["effect_logit"] if row["method"] == "direct" else row["effect_log_odds"]
            assert row["low"] <= mid <= row["high"]
    exact = sorted((r for r in rows if (r["method"], r["positions"]) == ("exact", "all")), key=lambda r: r["rank"])
    effects = [row["ranking_log_odds"] for row in exact]
    assert effects == sorted(effects, reverse=True)


def test_halves_share_no_cluster(context: Context) -> None:
    chosen, half_of = chosen_traces(context, "planted"), cluster_halves(context)
    assert set(half_of) == set(group_clusters(context).values())
    for (_, half), clusters in chosen.clusters.items():
        assert clusters
        assert {half_of[cluster] for cluster in clusters} == {half}
    rows = pq.read_table(context.layout.folder("planted") / "outcomes.parquet")["outcome"].to_pylist()
    expected = {"attacked": "complied", "plain": "refused", "benign": "complied"}
    for (role, _), indices in chosen.rows.items():
        assert {rows[index] for index in indices} == {expected[role]}


def test_heads_removed_together(found: dict[str, Any]) -> None:
    joint = found["head_sets"]
    doses = {(dose["kind"], dose["fraction"]): dose for dose in joint["doses"]}
    top = doses["suppression", 0.03]
    assert (top["count"], sorted(top["heads"])) == (2, planted_heads())
    assert doses.keys() == {(kind, 0.03) for kind in ("suppression", "promoting")}
    for effects in top["effects"].values():
        assert effects["random"]["n"] == 20
        assert effects["log_odds"]["low"] > effects["random"]["max"]
        assert effects["above_random"] == 1.0
        assert abs(effects["benign"]["mean"]) < 1.0
    assert doses["promoting", 0.03]["effects"]["closing"]["log_odds"]["mean"] < 0
    best = joint["pairs"]["closing"]["top"][0]
    assert joint["pairs"]["closing"]["tested"] == 3
    assert sorted(best["heads"]) == planted_heads()
    assert best["log_odds"]["mean"] == pytest.approx(top["effects"]["closing"]["log_odds"]["mean"], abs=1e-4)
    assert sorted(joint["greedy"]["steps"][1]["heads"]) == planted_heads()


def test_results_do_not_depend_on_the_cut(out: Path, found: dict[str, Any], tmp_path: Path) -> None:
    other = searched(out, batch_size=3, layer_block=3, budget_mb=16)
    one, two = found["table"], other["table"]
    assert assert_same_tables({"t": one.drop(["q"])}, {"t": two.drop(["q"])}, 1e-5) <= 1e-5
    # Where traces agree to a thousandth, rounding in the sixth digit moves q in the third.
    for a, b in zip(one["q"].to_pylist(), two["q"].to_pylist(), strict=True):
        assert (a is None) == (b is None)
        assert a is None or a == pytest.approx(b, abs=1e-2)
    same(found["heads"], other["heads"])
    same(found["head_sets"], other["head_sets"])


def same(one: Any, other: Any) -> None:
    """Equal plain data, floats to 1e-5."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = ([value for key, value in part.items() if key != "q"] for part in (one, other))
    if isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one == (pytest.approx(other, abs=1e-5) if isinstance(other, float) else other)


def test_screen_then_exact(out: Path, found: dict[str, Any]) -> None:
    screened = searched(out, method="screen-then-exact", screen=0.05)
    rows = screened["table"].to_pylist()
    swept = [row for row in rows if (row["method"], row["positions"]) == ("exact", "closing")]
    assert len(swept) == screened["heads"]["swept"] == 4
    before = {(r["layer"], r["head"], r["positions"]): r for r in found["table"].to_pylist() if r["method"] == "exact"}
    for row in swept:
        assert row["effect_log_odds"] == pytest.approx(
            before[row["layer"], row["head"], "closing"]["effect_log_odds"], abs=1e-5
        )
    assert sorted(entry["head"] for entry in screened["heads"]["found"]["all"]["top"][:2]) == planted_heads()
    ranked = ranked_heads(context_of(out, method="screen-then-exact", screen=0.05), "planted")
    assert len(ranked.suppression) == len(set(ranked.suppression)) == 64


def test_estimates_alone_make_no_suppression_head(out: Path, found: dict[str, Any]) -> None:
    for method in ("attribution", "direct"):
        estimated = searched(out, method=method)
        assert {row["method"] for row in estimated["table"].to_pylist()} == {"direct", "attribution"}
        for positions in ("closing", "all"):
            entry = estimated["heads"]["found"][positions]
            assert (entry["suppression"], entry["top"]) == ([], [])
            assert f"heads.method is {method}" in entry["reason"]
        assert f"heads.method is {method}" in estimated["head_sets"]["reason"]
        ranked = ranked_heads(context_of(out, method=method), "planted")
        assert sorted(f"{layer}.{head}" for layer, head in ranked.suppression[:2]) == planted_heads()
        assert len(ranked.promoting) == 64


def test_left_out(out: Path, found: dict[str, Any]) -> None:
    none = searched(out, traces=0)
    assert none["table"].num_rows == 0
    assert none["heads"]["reason"] == none["head_sets"]["reason"] == "heads.traces is 0"


def test_some_heads_by_their_means(out: Path, found: dict[str, Any]) -> None:
    some = searched(out, only=["4.2", "0.0"], replace="mean", positions=["closing"])
    rows = [row for row in some["table"].to_pylist() if row["method"] == "exact"]
    assert [(row["layer"], row["head"]) for row in rows] == [(0, 0), (4, 2)]
    zero = {(r["layer"], r["head"]): r for r in found["table"].to_pylist() if r["method"] == "exact"}
    assert rows[1]["effect_log_odds"] != pytest.approx(zero[4, 2]["effect_log_odds"], abs=1e-3)
    assert some["heads"]["looked_at"] == 2
    assert some["heads"]["total"] == 64


# ---- wrong inputs


def test_wrong_settings_are_known_at_once() -> None:
    for key in ("attacked", "plain"):
        with pytest.raises(ConfigError, match=f"heads.{key}: no set is called 'nothing'; give some of benign"):
            study_of(**{key: ["nothing"]})
    with pytest.raises(ConfigError, match=r"'4-2' is no head: write layer\.head"):
        study_of(only=["4-2"])


def test_a_head_that_the_model_lacks(out: Path, found: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"heads.only: 4.99: layer 4 has no such head; give heads 0 to 7"):
        searched(out, only=["4.99"])


def test_a_probe_of_another_model(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = kept_readers(context, "planted")
    short = replace(readers, weights=readers.weights[..., :100])
    monkeypatch.setattr(head_units, "kept_readers", lambda *_: short)
    with pytest.raises(InputError, match="reads 100 numbers where the model has 128"):
        sweep_tools(context, "planted")
    deep = replace(readers, reported=[9, 9, 9, 9], weights=readers.weights.repeat(1, 2, 1),
                   biases=readers.biases.repeat(1, 2))  # fmt: skip
    monkeypatch.setattr(head_units, "kept_readers", lambda *_: deep)
    with pytest.raises(InputError, match="reads layer 9 where the model has 8"):
        sweep_tools(context, "planted")


def test_attention_without_an_output_projection(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "PROJECTIONS", ("nothing",))
    with pytest.raises(InputError, match=r"block 0 has 0 attention output projections.*or set heads.traces to 0"):
        sweep_tools(context, "planted")


def test_traces_without_closing_tokens(out: Path, found: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no closing tokens"):
        SweepTrace.of([1, 2, 3], Spans(1, 1, 2, 2, 3, True))
    context = context_of(out)
    path = context.layout.folder("planted") / "traces.parquet"
    whole = path.read_bytes()
    table = pq.read_table(path)
    at = table.schema.get_field_index("closing_start")
    try:
        pq.write_table(table.set_column(at, table.schema.field(at), table["response_start"]), path)
        assert (
            chosen_traces(context, "planted").reason == "no trace of this model has closing tokens to change a head at"
        )
    finally:
        path.write_bytes(whole)


def test_too_few_complied(out: Path, found: dict[str, Any]) -> None:
    """Where the model hardly ever complies, other harmful traces stand in, and the result says so."""
    context = context_of(out)
    path = context.layout.folder("planted") / "outcomes.parquet"
    whole, table = path.read_bytes(), pq.read_table(path)
    traces = pq.read_table(context.layout.folder("planted") / "traces.parquet", columns=["label"])
    changed = [
        "degenerate" if label == "harmful" and outcome == "complied" and index % 12 else outcome
        for index, (label, outcome) in enumerate(
            zip(traces["label"].to_pylist(), table["outcome"].to_pylist(), strict=True)
        )
    ]
    at = table.schema.get_field_index("outcome")
    try:
        pq.write_table(table.set_column(at, table.schema.field(at), pa.array(changed)), path)
        chosen = chosen_traces(context, "planted")
    finally:
        path.write_bytes(whole)
    assert chosen.attacked == "harmful"
    for half in ("ranking", "reporting"):
        assert len(chosen.rows["attacked", half]) == 6, "as many as asked for"
        complied = sum(changed[index] == "complied" for index in chosen.rows["attacked", half])
        assert 0 < complied == chosen.complied[half] < 6
