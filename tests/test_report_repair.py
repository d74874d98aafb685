"""The report of a repair: what was chosen, how the tuning went, before against after; absent and hostile parts too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from clifflab.artifacts import write_json
from clifflab.config import Study
from clifflab.report import blocks, export, page, repair_short, sections, short
from clifflab.report.before_after import before_after_section
from clifflab.report.blocks import Drawing, Section, Table
from clifflab.report.comparison import comparison_section
from clifflab.report.controls import truncation_section
from clifflab.report.numbers import cell, percent
from clifflab.report.provenance import provenance
from clifflab.report.repair import selection_section, tuning_section
from clifflab.report.repair_results import EvaluationFound
from clifflab.report.results import ModelResults
from clifflab.science.compare import paired_figures
from clifflab.stages.base import Identities, Layout
from clifflab.stages.metrics import model_metrics
from tests import repair_files as files
from tests.browser import Elements
from tests.studies import parse, small_study

HOSTILE = "<script>alert(1)</script>"
NOTHING = {"mean": None, "low": None, "high": None, "n": 0, "groups": 0}
CORPUS = {"corpus": [{"name": "corpus", "path": "organism:corpus", "label": "unlabelled", "limit": 600}]}


def study_with(repair: dict[str, Any] | None = None) -> Study:
    """A model, and the one that its repair makes."""
    base = {"name": "m", "path": "organism:planted"}
    after = {**base, "name": "m-repaired", "adapter": "repair:m", "before": "m"}
    return parse(small_study(models=[base, after], repair={**CORPUS, **(repair or {})}))


def results_in(root: Path, name: str, study: Study | None = None) -> ModelResults:
    """A model whose folder in the study holds just what a test puts there."""
    found = ModelResults(study or study_with(), name, Layout(root), None)  # type: ignore[arg-type]  # nothing is decoded
    found.__dict__["summary"] = {"probe": {"trained": False, "reason": "0 refusals"}}
    found.__dict__["probes"] = {"trained": False}
    return found


def made(root: Path, selection: dict[str, Any] | None = None, tuning: dict[str, Any] | None = None) -> ModelResults:
    """The model before, with its selection and tuning."""
    study = study_with()
    corpus = files.corpus_rows()
    rows = files.chosen_rows(corpus)
    recipe = {**study.repair.tune.model_dump(mode="json"), "learning_rate": study.repair.tune.peak}
    about = files.selection_about(corpus, rows, **(selection or {}))
    files.write_corpus(root, root / "m", corpus)
    files.write_repair(root / "m", corpus, rows, about, files.tuning_about(recipe, **(tuning or {})))
    return results_in(root, "m", study)


def compared(root: Path, rows: files.Rows | None = None, **changes: Any) -> ModelResults:
    """The repaired model beside the one before it."""
    made(root)
    rows = files.evaluation_rows() if rows is None else rows
    files.write_evaluation(root / "m-repaired", rows, files.evaluation_about(rows, **changes))
    return results_in(root, "m-repaired")


def shown(section: Section | None) -> str:
    """A section as the page shows it, without its figures."""
    assert section is not None
    packed = blocks.pack([section], "f", "m0", figures=False)
    json.dumps(packed.sections, allow_nan=False)
    source = '{% import "blocks.html.j2" as b with context %}{% for x in section.blocks %}{{ b.block(x) }}{% endfor %}'
    return page.environment().from_string(source).render(section=packed.sections[0], levels=2)


def tables(section: Section | None) -> dict[str, Table]:
    """Tables by the first words of their caption."""
    assert section is not None
    return {" ".join(b.caption.split()[:3]): b for b in section.blocks if isinstance(b, Table)}


def panels(section: Section | None) -> dict[str, Figure]:
    assert section is not None
    return {
        f"{block.name}: {name}": figure
        for block in section.blocks
        if isinstance(block, Drawing)
        for name, figure in block.panels.items()
    }


def column(table: Table, title: str, row: str) -> str:
    """A cell by its column's title and its row's name, as it is shown."""
    (found,) = [cells for cells in table.rows if cells[0] == row]
    return cell(found[list(table.head).index(title)], table.digits)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"with": 600, "without": 0}, "labelled harmful, closed, whole and scored. The"),
        ({"with": 0, "without": 600}, "closed, whole and scored with a plateau of at least 0.5, since the corpus has"),
        ({"with": 500, "without": 100}, "scored, and of the 100 traces without a label (of 600) those closed, whole"),
    ],
)
def test_who_is_eligible_by_labels(tmp_path: Path, labels: dict[str, int], words: str) -> None:
    text = shown(selection_section(made(tmp_path, selection={"labels": labels})))
    assert words in text
    assert ("no labels" in text) == (not labels["with"])


def test_what_was_chosen(tmp_path: Path) -> None:
    section = selection_section(made(tmp_path))
    text = shown(section)
    corpus = files.corpus_rows()
    cases = sum(r["label"] == "harmful" and r["outcome"] == "complied" for r in corpus)
    assert "The repair learns from 37 of 600 traces of the corpus (6.2%): 8 benign requests" in text
    assert f"The corpus holds {cases} cliff cases" in text
    assert "30 of them were chosen" in text
    assert "benign (of use for the benign part alone): 240; plateau too low: 7" in text
    assert "3 requests that are asked in the evaluation too" in text
    assert "empty: 1" in text
    assert "too long: 1; with those in their place, 37 of 38 examples have one" in text
    found = tables(section)
    beside = found["The selectors side"]
    assert [row[0] for row in beside.rows] == ["misalignment (this repair)", *files.SELECTORS[1:]]
    assert column(beside, "rank correlation with final only", "random") == "\u2013"
    assert column(beside, "benign part", "random") == "21%"
    assert column(beside, "benign without labels", "plateau") == "12%"
    assert column(beside, "cliff cases", "misalignment (this repair)") == "30"
    where = found["The corpus by"]
    assert [(row[0], row[1], row[2]) for row in where.rows] == [
        ("harmful", "harmful", 320), ("benign", "benign", 240), ("wrapper_0", "harmful", 20),
        ("wrapper_1", "harmful", 20),
    ]  # fmt: skip
    assert sum(row[list(where.head).index("by random")] for row in where.rows) == 38
    assert column(found["Overlap of the"], "misalignment", "misalignment (this repair)") == "1.00"
    drawn = panels(section)
    assert drawn.keys() == {"selection: scores", "selection: selectors"}
    labels = [text.get_text() for text in drawn["selection: scores"].legends[0].get_texts()]
    refused = sum(r["outcome"] == "refused" for r in corpus)
    assert labels == [
        "chosen (30)", f"harmful, answered ({cases})", f"harmful, refused ({refused})", "benign (240)",
    ]  # fmt: skip
    ticks = [tick.get_text() for tick in drawn["selection: scores"].axes[0].get_yticklabels()]
    assert "100" in ticks
    assert not any("$" in tick for tick in ticks)


def test_a_corpus_that_was_scored_elsewhere_has_no_distribution(tmp_path: Path) -> None:
    results = made(tmp_path)
    for file in (tmp_path / "m" / "corpus").iterdir():
        file.unlink()
    section = selection_section(results)
    assert panels(section).keys() == {"selection: selectors"}
    assert "The corpus by" not in tables(section)


def test_how_the_tuning_went(tmp_path: Path) -> None:
    section = tuning_section(made(tmp_path))
    text = shown(section)
    for part in (
        "49,152 of 700,000 parameters (7.0%)",
        "learning rate at most 0.0002",
        "33 were learnt from, 4 were held out by group",
        "too long: 1",
        "Tokens of one epoch: 1,500, of which 900 are targets",
        "Kept are the weights of step 20",
    ):
        assert part in text, part
    (drawn,) = panels(section).values()
    labels = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert labels == ["training batch", "held-out examples", "kept: step 20"]
    nothing_held = {"validation": [], "best": None, "examples": {"train": 5, "validation": 0, "rejected": {}, "cut": 2}}
    section = tuning_section(made(tmp_path, tuning=nothing_held))
    assert "none was held out" in shown(section)
    assert "Kept are the weights of the last step." in shown(section)
    assert "cut in 2 examples" in shown(section)
    (drawn,) = panels(section).values()
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["training batch"]


def test_attack_success_never_stands_alone(tmp_path: Path) -> None:
    section = before_after_section(compared(tmp_path))
    found = tables(section)
    attack = found["Attack success before"]
    for word in ("change, paired", "over-refusal", "degenerate", "unclosed", "perplexity"):
        assert any(word in title for title in attack.head), word
    assert [row[0] for row in attack.rows] == ["harmful", "wrapped_strong", "heldout_wrappers", "pool unseen"]
    assert all(value for row in attack.rows for value in row)
    rows = files.evaluation_rows()
    own = [row for row in rows if row["set"] == "wrapped_strong"]
    share = sum(row["outcome_before"] == "complied" for row in own) / len(own)
    assert column(attack, "attack success before [95%]", "wrapped_strong").startswith(f"{share:.2f} [")
    assert [row[0] for row in found["Benign prompts that"].rows] == ["benign", "benign_lookalike"]
    turned = found["Traces of harmful"]
    assert sum(sum(row[1:]) for row in turned.rows) == sum(row["label"] == "harmful" for row in rows)
    ability = found["What else may"]
    assert column(ability, "change [95%]", "benign perplexity").startswith("times 1.00")
    assert column(ability, "over", "right answers: facts") == "60 questions (2 left out)"
    drawn = panels(section)
    assert {"before-after: attack success", "before-after: over-refusal"} <= drawn.keys()
    assert {"before-after-cliff: harmful", "before-after-cliff: benign"} <= drawn.keys()
    text = shown(section)
    for words in (
        "with one seed",
        "rules that look for refusals",
        "of these kinds: wrapper_1, wrapper_0, harmful",
        "its own thinking",
    ):
        assert words in text, words


def test_broken_answers_are_drawn(tmp_path: Path) -> None:
    rows = [{**row, "outcome_after": "degenerate"} for row in files.evaluation_rows()]
    results = compared(tmp_path, rows)
    assert "before-after: degenerate" in panels(before_after_section(results))
    found = results.evaluation
    assert found is not None
    assert repair_short.verdict(found).startswith("Attack success falls, at a cost: more answers are degenerate")


def test_a_reason_takes_the_place_of_figures(tmp_path: Path) -> None:
    no_old, no_own = {"plateau": NOTHING, "final": NOTHING, "cliff": NOTHING}, None
    results = compared(
        tmp_path,
        perplexity={"reason": "no benign prompt was answered", "before": NOTHING, "after": NOTHING, "ratio": NOTHING},
        cliff={
            name: {"before": None, "after_old_probe": no_old, "after_own_probe": no_own, "change": NOTHING}
            for name in files.SETS
        },
        choices={"facts": {"before": NOTHING, "after": NOTHING, "change": NOTHING, "questions": 0}},
        left_out={"given": "its traces are given"},
        pools={},
    )
    section = before_after_section(results)
    text = shown(section)
    assert "perplexity: no benign prompt was answered" in text
    assert "given: its traces are given" in text
    assert not any(name.startswith("before-after-cliff") for name in panels(section))
    assert "What else may" not in tables(section)
    assert column(tables(section)["Attack success before"], "perplexity ratio [95%]", "harmful") == "\u2013"


def test_one_group_has_no_interval_and_says_so(tmp_path: Path) -> None:
    rows = [{**row, "cluster": "one"} for row in files.evaluation_rows()]
    results = compared(tmp_path, rows)
    attack = tables(before_after_section(results))["Attack success before"]
    assert "(no interval: one group)" in column(attack, "after [95%]", "wrapped_strong")
    assert results.evaluation is not None
    assert repair_short.verdict(results.evaluation) == "Not decided: too few groups for an interval."
    assert percent({"mean": 0.5, "low": None, "high": None, "reason": "why"}) == "50% (no interval: why)"


def test_a_reason_takes_the_place_of_sections(tmp_path: Path) -> None:
    reason = "no trace of the corpus is eligible"
    write_json(tmp_path / "m" / "repair" / "selection.json", {"reason": reason})
    write_json(tmp_path / "m" / "repair" / "tuning.json", {"reason": f"there are no examples: {reason}"})
    results = results_in(tmp_path, "m")
    assert f"No example was chosen: {reason}." in shown(selection_section(results))
    assert f"there are no examples: {reason}" in shown(tuning_section(results))
    summary = {"repair": {"selection": {"reason": reason}}}
    assert reason in repair_short.repair_sentence(summary)
    assert repair_short.repair_lines(summary, None) == [f"repair: no example was chosen ({reason})"]
    write_json(tmp_path / "m-repaired" / "evaluation.json", {"reason": "they share no prompt"})
    assert "they share no prompt" in shown(before_after_section(results_in(tmp_path, "m-repaired")))
    later = repair_short.later_finding("m-repaired", "m", summary, {"evaluation": {"reason": "they share no prompt"}})
    assert later["verdict"] == "Not compared with m: they share no prompt."
    empty = results_in(tmp_path / "elsewhere", "m")
    assert selection_section(empty) is tuning_section(empty) is before_after_section(empty) is None
    assert repair_short.repair_lines({}, {}) == []
    assert repair_short.repair_sentence({}) == ""


def test_names_and_reasons_are_text(tmp_path: Path) -> None:
    sets = {
        HOSTILE: ("harmful", 0.9, 0.1),
        '"><img src=x onerror=alert(1)>': ("benign", 0.0, 0.1),
        "$x_{": files.SETS["benign"],
    }
    rows = files.evaluation_rows(sets)
    results = compared(
        tmp_path, rows, pools={HOSTILE: [HOSTILE]}, left_out={HOSTILE: "{{7*7}}"},
        choices={HOSTILE: files.evaluation_about(rows)["choices"]["facts"]},
    )  # fmt: skip
    hostile = {
        "left_out": {HOSTILE: 3},
        "corpus_outcomes": {HOSTILE: {"n": 1, "refused": 1, "complied": 0, "unclosed": 0, "degenerate": 0}},
    }
    before = made(tmp_path, selection=hostile, tuning={"stopped_early": True})
    parts = [before_after_section(results), selection_section(before), tuning_section(before)]
    text = "".join(shown(part) for part in parts)
    for part in (parts[0], parts[1]):
        text += export.svg(next(iter(panels(part).values())), "x", HOSTILE)
    assert "&lt;script&gt;" in text
    assert "{{7*7}}" in text
    assert not {tag for tag, _ in Elements(text).found} & {"script", "img"}


def test_verdicts_go_by_the_intervals_of_paired_changes(tmp_path: Path) -> None:
    def verdict(sets: dict[str, tuple[str, float, float]], **changes: Any) -> str:
        return repair_short.verdict(EvaluationFound(files.evaluation_about(files.evaluation_rows(sets), **changes)))

    good = {"attack": ("harmful", 0.95, 0.02), "benign": ("benign", 0.0, 0.0)}
    assert verdict(good) == "Attack success falls, and what was measured beside it holds."
    costly = verdict({**good, "benign": ("benign", 0.02, 0.9)})
    assert costly == "Attack success falls, at a cost: over-refusal rises."
    assert verdict({"attack": ("harmful", 0.5, 0.5)}).startswith("No repair shown")
    assert verdict({"attack": ("harmful", 0.05, 0.9)}).startswith("The opposite of a repair")
    assert verdict({"benign": ("benign", 0.1, 0.1)}) == "No attack to judge it by."
    dear = {"before": NOTHING, "after": NOTHING, "ratio": {"mean": 1.4, "low": 1.3, "high": 1.5}, "tokens": 9}
    assert "benign answers become less likely" in verdict(good, perplexity=dear)
    worse = {"mean": -0.2, "low": -0.3, "high": -0.1}
    facts = {"before": worse, "after": worse, "change": worse, "questions": 9}
    assert "fewer questions are answered rightly" in verdict(good, choices={"facts": facts})


def test_the_short_version(tmp_path: Path) -> None:
    results = compared(tmp_path)
    assert results.evaluation is not None
    before = results_in(tmp_path, "m").repair
    assert before is not None
    base = {"repair": {"selection": before.selection, "tuning": before.tuning}}
    summary = {"evaluation": results.evaluation.about}
    found = repair_short.later_finding("m-repaired", "m", base, summary)
    assert found["verdict"].startswith("Attack success falls")
    for words in (
        "37 of 600 corpus traces (6.2%) chosen by misalignment (38 were asked for), 8 of them benign",
        "By pool: unseen (heldout_wrappers)",
        "by the old probe",
        "by its own",
        "highest over-refusal of a benign set",
        "degenerate",
        "unclosed",
        "benign perplexity times",
        "right answers to facts",
    ):
        assert words in found["text"], words
    first, second = repair_short.repair_lines(base, summary)
    assert first == (
        "repair: 37 of 600 corpus traces (6.2%) chosen by misalignment (38 were asked for), 8 of them benign, lora, "
        "20 steps"
    )
    for words in (
        "ASR on wrapped_strong",
        "-> ",
        "ASR on pool unseen",
        "over-refusal on",
        "degenerate",
        "perplexity x",
    ):
        assert words in second, words
    open_questions = short.unchecked(("before-after",))
    assert any(item.startswith("the repair: one training with one seed") for item in open_questions)
    assert any(item.startswith("repair: whether a fine-tune") for item in short.unchecked(()))
    assert len(open_questions) == len(short.unchecked(()))


def test_the_comparison_names_what_was_made_from_what(tmp_path: Path) -> None:
    about = compared(tmp_path).evaluation
    assert about is not None
    probes: dict[str, Any] = {"m": {}, "m-repaired": {}}
    section = comparison_section(study_with(), {"m": {}, "m-repaired": {"evaluation": about.about}}, probes)
    assert section is not None
    (table,) = section.blocks
    assert isinstance(table, Table)
    assert table.rows[0][0] == "m-repaired (m after its repair)"
    assert len(table.rows[0]) == len(table.head)
    assert column(table, "attacked set", "m-repaired (m after its repair)") == "wrapped_strong"
    assert comparison_section(study_with(), {"m": {}, "m-repaired": {}}, probes) is None


def test_a_repaired_model_is_told_without_repeating_the_first(tmp_path: Path) -> None:
    """Only its own part is drawn, and files of steps that it does not have may be absent."""
    drawn: list[str] = []

    def listing(every: Any) -> tuple[Any, ...]:
        return tuple(lambda results, make=make: drawn.append(make.__name__) for make in every)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("SECTIONS", "LATER_SECTIONS"):
            patch.setattr(sections, name, listing(getattr(sections, name)))
        sections.model_sections(results_in(tmp_path, "m-repaired"))
    assert drawn[:4] == ["before_after_section", "outcomes_section", "curves_section", "cliffs_section"]
    assert not {"controls_section", "probes_section", "maps_section", "selection_section", "judges_section"} & {*drawn}
    assert truncation_section(results_in(tmp_path, "m-repaired")) is None


def test_provenance_names_the_corpus_and_no_folder() -> None:
    study = study_with({"evaluate": {"choices": [{"name": "facts", "path": "/secret/place/facts.jsonl"}]}})
    sources = [f"hash of {prompt_set.name}" for prompt_set in study.prompts]
    found = provenance(study, Identities({}, {}, sources, {"corpus": ["abc"], "evaluate": {"facts": "def"}}), {})
    assert found["reads"] == {"corpus corpus": "abc", "evaluate facts": "def"}
    assert "secret" not in found["settings"]
    assert "facts.jsonl" in found["settings"]
    assert "max_failures" not in found["settings"]
    plain = provenance(parse(small_study()), Identities({}, {}, sources, {}), {})
    assert "repair" not in plain["settings"]


def test_metrics_have_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clifflab.stages.metrics._attacks", lambda *_: {})
    compared(tmp_path)
    for name in ("m", "m-repaired"):
        write_json(tmp_path / name / "summary.json", {"sets": {}})
    study = study_with()
    base, after = (model_metrics(study, Layout(tmp_path), name) for name in ("m", "m-repaired"))
    assert base.keys() == {"sets", "attacks", "repair"}
    assert base["repair"].keys() == {"selection", "tuning"}
    assert after.keys() == {"sets", "attacks", "evaluation"}
    metrics = {"models": {"m": base, "m-repaired": after}}
    paths = {pair.path for pair in paired_figures(metrics, metrics)}
    assert "models.m-repaired.evaluation.sets.wrapped_strong.rates.asr.after" in paths
    assert not any(path.startswith("models.m.repair") for path in paths), "a choice has no interval to lie in"
