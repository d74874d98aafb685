"""Models that give little to measure: too few refusals for a probe, and no thinking at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import clifflab
from clifflab.cli.closing import print_model
from clifflab.science.judges import judge
from tests.studies import parse, small_study


@pytest.fixture(scope="module")
def flat_model(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    """A tiny checkpoint whose chat template opens no thinking."""
    folder = shutil.copytree(checkpoints["llama"], tmp_path_factory.mktemp("flat") / "model")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("<think>\n", "").replace("<think>\\n", ""))
    return folder


@pytest.fixture
def study_of(flat_model: Path, existing_traces: Path, tmp_path: Path) -> Callable[..., Any]:
    """A study of existing answers without thinking; ``refused`` and ``answered`` cap how many there are."""

    def make(refused: int = 1000, answered: int = 1000, **changes: Any) -> Any:
        rows: dict[str, list[dict[str, Any]]] = {"harmful": [], "benign": []}
        for line in existing_traces.read_text().splitlines():
            row = {**json.loads(line), "thinking": None}
            label = row.pop("label")
            refusal = judge(row["response"] or "", True).outcome == "refused"
            if label == "harmful" and refusal:
                refused -= 1
                if refused < 0:
                    row["response"] = "of course. take two."
            elif label == "benign" and not refusal:
                answered -= 1
                if answered < 0:
                    row["response"] = "sorry, i cannot help."
            rows[label].append(row)
        for label, content in rows.items():
            (tmp_path / f"{label}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        sets = [{"name": n, "path": str(tmp_path / f"{n}.jsonl"), "label": n, "existing": True} for n in rows]
        models = [{"name": "flat", "path": str(flat_model), "thinking_format": "none"}]
        return parse(small_study(models=models, prompts=sets, **changes))

    return make


def text_of(page: str) -> str:
    """What a reader of the page sees, in one line."""
    body = page[page.index("<body>") :]
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<svg.*?</svg>", " ", body, flags=re.DOTALL)).split())


def test_too_few_refusals_are_counted_and_explained(
    study_of: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = clifflab.run(study_of(refused=5, probe={"min_examples": 12}), tmp_path, runtime="inline")
    model = result.metrics["models"]["flat"]
    counts = model["sets"]["harmful"]["outcomes"]
    assert counts["refused"] == 5
    (warning,) = result.warnings
    assert warning.startswith(
        f"flat: 5 refusals in {counts['n']} harmful prompts, 12 needed to train a probe: what helps"
    )
    assert f"at this rate about {-(-counts['n'] * 12 // 5)} traces" in warning
    assert "at your own risk a lower probe.min_examples" in warning
    seen = text_of((result.root / "report.html").read_text())
    assert warning.removeprefix("flat: ") in seen
    assert "none is guessed" in seen
    assert not re.search(r"\b(None|null|nan)\b", seen), seen
    assert "How well the probes read" not in seen
    assert "Plateau, final and cliff" not in seen
    table = (result.root / "report.html").read_text().partition("<tbody>")[2].partition("</tbody>")[0]
    assert table.count("<tr>") == 2
    folder = result.root / "flat"
    rows = {name: pq.read_table(folder / f"{name}.parquet").num_rows for name in ("traces", "outcomes", "rejects")}
    assert rows["traces"] == rows["outcomes"] == rows["rejects"] > 0
    assert set(pq.read_table(folder / "rejects.parquet")["reason"].to_pylist()) == {"no_probe"}
    for name in ("cliffs", "curves", "scores"):
        assert pq.read_table(folder / f"{name}.parquet").num_rows == 0
    print_model("flat", model)
    closing = capsys.readouterr().out
    assert "plateau" not in closing
    assert "excess cliff (complied - refused, matched length): not defined: no probe could be trained" in closing


def test_no_refusal_at_all_promises_nothing(study_of: Callable[..., Any], tmp_path: Path) -> None:
    """With nothing to count on, neither a rate nor a lower limit is offered."""
    (warning,) = clifflab.run(study_of(refused=0), tmp_path, runtime="inline").warnings
    assert "0 refusals in" in warning
    assert warning.endswith("12 needed to train a probe: what helps is a model, or harmful prompts, with more refusals")


def test_too_few_answers(study_of: Callable[..., Any], tmp_path: Path) -> None:
    (warning,) = clifflab.run(study_of(answered=2), tmp_path, runtime="inline").warnings
    assert warning.startswith("flat: 2 answers in ")
    assert "benign prompts, 12 needed to train a probe: what helps is more benign prompts or samples" in warning
    assert "min_examples" not in warning


def test_samples_are_named_apart_from_prompts(flat_model: Path, tmp_path: Path) -> None:
    sets = [{"name": n, "path": f"organism:{n}", "label": n, "limit": 6} for n in ("harmful", "benign")]
    models = [{"name": "flat", "path": str(flat_model), "thinking_format": "none"}]
    data = small_study(models=models, prompts=sets, traces={"samples": 2, "max_new_tokens": 4})
    (warning,) = clifflab.run(parse(data), tmp_path, runtime="inline").warnings
    assert "0 refusals in 12 traces of 6 harmful prompts, 12 needed" in warning


def test_without_thinking_the_final_score_alone_is_defined(
    study_of: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Format none where a probe can be trained (SPEC section 1): plateau and cliff are null and counted."""
    result = clifflab.run(study_of(probe={"min_examples": 8}), tmp_path, runtime="inline")
    assert not result.warnings
    model = result.metrics["models"]["flat"]
    folder = result.root / "flat"
    for name, entry in model["sets"].items():
        for positions in ("all", "final"):
            probe = entry["probes"][positions]
            assert probe["final"]["n"] > 0, name
            assert 0 <= probe["final"]["low"] <= probe["final"]["mean"] <= probe["final"]["high"] <= 1
            assert probe["final"]["null"] == 0
            for measure in ("plateau", "plateau_max", "cliff", "misalignment"):
                empty = {"mean": None, "low": None, "high": None, "n": 0, "null": probe["final"]["n"]}
                assert {k: probe[measure][k] for k in empty} == empty, (name, measure)
    for positions in ("all", "final"):
        excess = model["excess_cliff"][positions]
        assert (excess["mean"], excess["reason"]) == (
            None,
            "no trace thinks long enough to have a plateau, so none has a cliff",
        )
    cliffs = pq.read_table(folder / "cliffs.parquet")
    for column in ("plateau", "plateau_max", "cliff", "misalignment", "plateau_logit", "cliff_logit"):
        assert cliffs[column].null_count == cliffs.num_rows > 0, column
    assert cliffs["final"].null_count == 0
    assert set(cliffs["thinking_tokens"].to_pylist()) == {0}
    assert pc.list_value_length(cliffs["closing_drops"]).to_pylist() == cliffs["closing_tokens"].to_pylist()
    # The two kinds of probes see the one position that there is, and are the same.
    finals = cliffs.filter(pc.equal(cliffs["estimator"], "logistic"))
    one, other = (finals.filter(pc.equal(finals["train_positions"], p))["final"].to_numpy() for p in ("all", "final"))
    assert abs(one - other).max() < 1e-6
    curves = pq.read_table(folder / "curves.parquet")
    assert set(curves["axis"].to_pylist()) == {"closing"}
    assert set(curves["position"].to_pylist()) == {0}
    page = (result.root / "report.html").read_text()
    seen = text_of(page)
    assert "This model answers without thinking" in seen
    assert "Not defined here: no trace thinks long enough to have a plateau" in seen
    assert not re.search(r"\b(None|null|nan)\b", seen.replace("None: every row became a scored trace", "")), seen
    assert "<svg" not in page, "there is no curve to draw"
    print_model("flat", model)
    assert "not defined: no trace thinks long enough" in capsys.readouterr().out
