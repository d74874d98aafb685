"""The report on heads and on what removing them does: what it says, what it draws, and that nothing breaks it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from clifflab.artifacts import write_json
from clifflab.config import ModelSpec, Study
from clifflab.report import blocks, export, figures, heads_short, page, short
from clifflab.report.ablation import ablation_section
from clifflab.report.blocks import Drawing, Note, Section, Table
from clifflab.report.head_results import GroundTruth, ground_truth
from clifflab.report.heads import heads_section
from clifflab.report.numbers import cell
from clifflab.report.results import ModelResults
from clifflab.stages import STEPS
from clifflab.stages.base import Layout
from tests.browser import Elements
from tests.head_files import ablation_about, head_rows, heads_about, sets_about, write_heads
from tests.studies import parse, small_study

PLANTED = [(4, 2), (6, 2)]
HOSTILE = "<script>alert(1)</script>"
SETS = {"benign": "benign", "harmful": "harmful", "wrapped_strong": "harmful"}


def results_in(root: Path, path: str = "organism:planted") -> ModelResults:
    """A model whose folder in the study holds just what a test puts there."""
    study = parse(small_study(models=[{"name": "m", "path": path}]))
    return ModelResults(study, "m", Layout(root), None)  # type: ignore[arg-type]  # no section of these needs a renderer


def planted_results(root: Path, path: str = "organism:planted") -> ModelResults:
    rows = head_rows(8, 8, PLANTED)
    write_heads(root / "m", rows, heads_about(rows, 8, 8), sets_about(PLANTED))
    write_json(root / "m" / "ablation.json", ablation_about(SETS))
    return results_in(root, path)


def shown(section: Section | None) -> str:
    """A section as the page shows it, without its figures: writing their files takes seconds."""
    assert section is not None
    packed = blocks.pack([section], "f", "m0", figures=False)
    json.dumps(packed.sections, allow_nan=False)
    source = '{% import "blocks.html.j2" as b with context %}{% for x in section.blocks %}{{ b.block(x) }}{% endfor %}'
    return page.environment().from_string(source).render(section=packed.sections[0], levels=2)


def panels(section: Section | None) -> dict[str, Figure]:
    """All panels of a section by drawing and name."""
    assert section is not None
    drawings = [block for block in section.blocks if isinstance(block, Drawing)]
    assert all(drawing.see for drawing in drawings)
    return {f"{drawing.name}: {name}": figure for drawing in drawings for name, figure in drawing.panels.items()}


def tables(section: Section | None) -> list[Table]:
    assert section is not None
    return [block for block in section.blocks if isinstance(block, Table)]


def test_which_heads_and_which_are_planted(tmp_path: Path) -> None:
    section = heads_section(planted_results(tmp_path))
    text = shown(section)
    ranked = tables(section)[0]
    planted = ranked.head.index("planted")
    assert [row[0] for row in ranked.rows[:2]] == ["4.2", "6.2"]
    assert len(ranked.rows) == 15
    assert [row[planted] for row in ranked.rows] == ["yes", "yes", *["no"] * 13]
    assert cell(ranked.rows[0][2]) == "4.00 [3.80, 4.20]"
    assert "at the closing tokens 2 of 64 heads pass: 4.2, 6.2" in text.lower()
    assert "Green frame: a planted head" in text
    names = panels(section)
    assert {"heads: closing tokens", "heads: all tokens", "joint: closing tokens"} <= names.keys()
    assert {"ranks: direct, closing tokens", "heads-methods: direct, final position"} <= names.keys()
    assert len(names) == 2 + 2 + 5 + 3
    assert "redundant, hidden" in text


def test_a_planted_head_far_down_is_in_the_table(tmp_path: Path) -> None:
    """The ground truth is not flattered: a planted head that the study ranks low is shown where it stands."""
    rows = head_rows(8, 8, [(0, 0)])
    write_heads(tmp_path / "m", rows, heads_about(rows, 8, 8))
    ranked = tables(heads_section(results_in(tmp_path)))[0]
    ranks = {row[0]: row[1] for row in ranked.rows}
    truth = {(r["layer"], r["head"]): r["rank"] for r in rows if (r["method"], r["positions"]) == ("exact", "closing")}
    assert {"4.2", "6.2"} <= ranks.keys()
    assert all(ranks[f"{layer}.{head}"] == truth[layer, head] for layer, head in PLANTED)


@pytest.mark.parametrize("content", [None, "{", '{"planted_heads": [["a", 1]]}', '{"planted_heads": []}', "[]"])
def test_without_a_ground_truth_nothing_is_called_planted(tmp_path: Path, content: str | None) -> None:
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    if content is not None:
        (checkpoint / "ground_truth.json").write_text(content)
    section = heads_section(planted_results(tmp_path, str(checkpoint)))
    text = shown(section)
    assert ("planted" in tables(section)[0].head) == (content == '{"planted_heads": []}')
    assert "Green frame" not in text
    truth = ground_truth(ModelSpec(name="m", path=str(checkpoint)))
    assert (truth is None) == (content is None)
    assert ground_truth(ModelSpec(name="m", path="organism:planted")) == GroundTruth(frozenset(PLANTED))


def test_only_the_report_depends_on_the_ground_truth(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    for name in ("config.json", "ground_truth.json"):
        (checkpoint / name).write_text("{}")
    study = Study.model_validate(small_study(models=[{"name": "m", "path": str(checkpoint)}]))
    digests = [STEPS["report"].reads(study, lambda path: path.read_text())]
    (checkpoint / "ground_truth.json").write_text('{"planted_heads": []}')
    digests.append(STEPS["report"].reads(study, lambda path: path.read_text()))
    assert digests[0] != digests[1], "the page is drawn anew"
    (checkpoint / "ground_truth.json").unlink()
    assert STEPS["report"].reads(study, lambda path: path.read_text()) is None


def test_token_texts_are_text(tmp_path: Path) -> None:
    rows = head_rows(8, 8, PLANTED)
    texts = [HOSTILE, '"><img src=x onerror=alert(1)>', "\u202e", "\x07", "{{7*7}}"]
    tokens = [{"id": 0, "text": text} for text in texts]
    about = heads_about(rows, 8, 8, openings={"refusal": tokens, "compliance": tokens})
    write_heads(tmp_path / "m", rows, about)
    write_json(tmp_path / "m" / "ablation.json", ablation_about({HOSTILE: "harmful", "$x_{": "benign"}))
    results = results_in(tmp_path)
    text = shown(heads_section(results)) + shown(ablation_section(results))
    text += export.svg(next(iter(panels(ablation_section(results)).values())), "x", HOSTILE)
    assert "&lt;script&gt;" in text
    tags = {tag for tag, _ in Elements(text).found}
    assert not tags & {"script", "img"}
    assert "\u202e" not in text
    assert "\x07" not in text
    assert "{{7*7}}" in text


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (1, 12), (64, 64)])
def test_any_size(tmp_path: Path, layers: int, heads: int) -> None:
    strong = [(0, 0)] if layers == 1 else [(3, 60), (63, 63)]
    rows = head_rows(layers, heads, strong, probe_layer=0)
    write_heads(tmp_path / "m", rows, heads_about(rows, layers, heads), sets_about(strong))
    section = heads_section(results_in(tmp_path))
    assert len(shown(section)) < 60_000
    figures_of = panels(section)
    for name in ("heads: closing tokens", "ranks: first order, closing tokens"):
        if name in figures_of:
            assert len(export.svg(figures_of[name], "x")) < 400_000
    assert ("ranks: first order, closing tokens" in figures_of) == (layers * heads > 1)


def test_nothing_but_nulls(tmp_path: Path) -> None:
    """Every number missing: one group of attacked prompts, no controls, nothing defined."""
    rows = head_rows(2, 2, [(0, 0)], effects=False)
    nothing = {"mean": None, "low": None, "high": None, "n": 0, "groups": 0, "reason": "no plain refused trace"}
    about = heads_about(rows, 2, 2, gap=nothing, threshold={"share": 0.05, "effect": None, "q": 0.05})
    about["log_odds"] = dict.fromkeys(about["log_odds"], nothing)
    about["correlations"] = {p: {"direct_logit": {"rho": None, "n": 0}} for p in ("closing", "all")}
    for found in about["found"].values():
        found["reason"] = "no plain refused trace"
    write_heads(tmp_path / "m", rows, about, sets_about([(0, 0)], effect=None))
    write_json(tmp_path / "m" / "ablation.json", ablation_about(SETS, asr=None))
    results = results_in(tmp_path)
    text = shown(heads_section(results))
    assert "none can pass: no plain refused trace" in text
    assert panels(heads_section(results)) == {}, "nothing to draw"
    assert "Attack success" in shown(ablation_section(results))
    summary = {"heads": about, "ablation": results.ablation.about if results.ablation else None}
    assert heads_short.heads_sentences(summary).startswith(
        "Whether a head holds the refusal back was not judged: no plain refused trace."
    )


def test_a_reason_takes_the_place_of_the_sections(tmp_path: Path) -> None:
    reason = "the ranking half of the groups has no attacked trace"
    write_heads(tmp_path / "m", [], {"reason": reason, "total": 64})
    write_json(tmp_path / "m" / "ablation.json", {"reason": f"there is no ranking of heads: {reason}"})
    results = results_in(tmp_path)
    assert heads_section(results) is ablation_section(results) is None
    summary = {"heads": {"reason": reason}, "ablation": {"reason": reason}}
    assert reason in heads_short.heads_sentences(summary)
    assert reason in heads_short.heads_line(summary)
    assert heads_short.comparison_row(summary, 0.03) == [None] * 8
    assert results_in(tmp_path / "elsewhere").heads is None
    assert heads_short.heads_sentences({}) == heads_short.heads_line({}) == ""
    open_questions = short.unchecked(())
    assert any(item.startswith("cause: a probe reads") for item in open_questions)
    assert not any(item.startswith("cause: a probe reads") for item in short.unchecked(("heads", "ablation")))


def test_attack_success_never_stands_alone(tmp_path: Path) -> None:
    section = ablation_section(planted_results(tmp_path))
    attack = [table for table in tables(section) if table.caption.startswith("Attack success")]
    assert len(attack) == 2
    for table, thinking in zip(attack, ("thinking anew", "thinking as it was"), strict=True):
        assert thinking in table.caption
        for word in ("attack success", "change, paired", "over-refusal", "degenerate", "unclosed", "perplexity"):
            assert any(word in title for title in table.head), word
        at = {name: i for i, name in enumerate(table.head)}
        rows = {(row[0], row[1]): row for row in table.rows}
        top = rows["wrapped_strong", "3% suppression"]
        assert cell(top[at["attack success [95%]"]]) == "0.30 [0.20, 0.40]"
        assert cell(top[at["change, paired [95%]"]]) == "-0.60 [-0.70, -0.50]"
        assert all(value is not None for value in top[:8])
        assert rows["wrapped_strong", "3% random"][at["random draws"]] == "0.80 to 1.00 (20)"
        assert ("benign", "nothing") not in rows
    names = panels(section)
    assert {"ablation-asr: wrapped_strong, regenerated", "ablation-over-refusal: benign, fixed"} <= names.keys()
    assert "64 of 64 answers are those of the study" in shown(section)


def test_a_study_without_harmful_prompts(tmp_path: Path) -> None:
    write_json(tmp_path / "m" / "ablation.json", ablation_about({"benign": "benign"}))
    section = ablation_section(results_in(tmp_path))
    assert "Over-refusal" in shown(section)
    assert all(name.startswith("ablation-over-refusal") for name in panels(section))
    assert heads_short.strongest(results_in(tmp_path).ablation) is None


def test_the_short_version(tmp_path: Path) -> None:
    results = planted_results(tmp_path)
    assert results.heads is not None
    assert results.ablation is not None
    summary = {"heads": results.heads.about, "ablation": results.ablation.about}
    said = heads_short.heads_sentences(summary)
    assert "2 of 64 heads (4.2, 6.2) raise refusal" in said
    assert "from 0.90 [0.80, 1.00] to 0.30 [0.20, 0.40]" in said
    for word in ("over-refusal", "degenerate", "perplexity", "random heads"):
        assert word in said, word
    line = heads_short.heads_line(summary)
    assert "4.2, 6.2" in line
    assert "90% [80, 100] -> 30% [20, 40]" in line
    for word in ("over-refusal", "degenerate", "perplexity"):
        assert word in line, word
    row = heads_short.comparison_row(summary, 0.03)
    assert [cell(value) for value in row[:4]] == [
        "2 of 64 heads (4.2, 6.2)", "harmful", "0.90 [0.80, 1.00]", "0.30 [0.20, 0.40]",
    ]  # fmt: skip


def test_maps_are_white_at_zero_and_grey_where_nothing_is() -> None:
    grid = np.array([[0.5, math.nan], [-2.0, 0.0]])
    figure = figures.head_map(grid, "effect", "t", [(0, 0)], [(1, 0)])
    image = figure.axes[0].images[0]
    assert image.get_clim() == (-2.0, 2.0)
    red, white = (image.cmap(image.norm(value))[:3] for value in (2.0, 0.0))
    assert red[0] > red[2]
    assert min(white) > 0.95
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["suppression head", "planted head", "not defined"]
    assert "NaN" not in export.svg(figure, "x")


def test_the_band_starts_at_the_unchanged_model(tmp_path: Path) -> None:
    axes = panels(ablation_section(planted_results(tmp_path)))["ablation-asr: wrapped_strong, regenerated"].axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0% (0)", "1% (1)", "3% (2)", "10% (7)"]
    mean = next(line for line in axes.lines if line.get_label() == "random heads: mean")
    assert [float(x) for x in np.asarray(mean.get_xdata())] == [0, 1, 2, 3]


def test_notes_name_what_was_used(tmp_path: Path) -> None:
    section = heads_section(planted_results(tmp_path))
    assert section is not None
    told = " ".join(item for block in section.blocks if isinstance(block, Note) for item in block.items)
    assert "'sorry', 'i'" in told
    assert "32 traces of 20 groups rank the heads" in told
