"""The sections of one model, in the order of the page.

Each is a function of :class:`~clifflab.report.results.ModelResults` that returns a section, or ``None`` where the study
has nothing for it. :data:`SECTIONS` lists them; :data:`UNCHECKED` says what a study leaves open where one is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.compute as pc

from clifflab.report.ablation import ablation_section
from clifflab.report.before_after import before_after_section
from clifflab.report.blocks import Drawing, Note, Section, Table
from clifflab.report.controls import controls_section, cross_section, judges_section, truncation_section
from clifflab.report.curve import curve_section
from clifflab.report.figures import cliff_histograms, closing_drops, curves, outcome_bars
from clifflab.report.heads import heads_section
from clifflab.report.layers import maps_section, probes_section
from clifflab.report.repair import selection_section, tuning_section
from clifflab.report.results import ModelResults
from clifflab.report.tokens import views
from clifflab.science.judges import OUTCOMES
from clifflab.science.probe import TRAIN_POSITIONS
from clifflab.science.stats import GroupBootstrap

_NO_THINKING = (
    "This model answers without thinking. It has a score at its final position, the last token before the answer, and "
    "no plateau, no cliff and no curve along a trace."
)
_LABELS = ("harmful", "benign", "mixed")
_CLOSING = 12  # closing tokens drawn, counted back from the final position
_WHERE = {"all": "all thinking and closing positions", "final": "the final position only"}
_SEE = {
    "all": "A refusal cliff is a harmful set that stays high through the thinking and falls inside the shaded closing "
    "tokens; benign sets should stay low throughout.",
    "final": "The same traces read with the original paper's probe, which never saw a thinking token in training: "
    "where harmful sets sink or benign sets rise during the thinking, against the figure above, it misreads them.",
}
_TEST = "Traces of unseen groups alone: no probe was trained on their prompts, a paraphrase or a wrapped version."


def outcomes_section(results: ModelResults) -> Section:
    """What the model did."""
    sets = results.summary["sets"]
    panels = {
        label: outcome_bars({name: sets[name]["outcomes"] for name in results.sets(label)}, f"{label} requests")
        for label in _LABELS
        if results.sets(label)
    }
    rows = [
        [name, results.labels[name], entry["outcomes"]["n"], *(entry["outcomes"][o] for o in OUTCOMES)]
        + [entry["outcomes"]["shares"][o] for o in ("refused", "complied")]
        for name, entry in sets.items()
    ]
    see = (
        "Of harmful requests, the dark part was refused and the rest got through; of benign ones, the dark part is "
        "over-refusal. The whisker is the 95% interval of the share refused."
    )
    caption = (
        "Outcomes of all traces, decided by rules on the response alone. Unclosed: the thinking never ended; counted "
        "here, never judged or scored. Degenerate: an empty or looping response."
    )
    head = ["set", "label", "n", *OUTCOMES, "share refused [95%]", "share complied [95%]"]
    return Section(
        "outcomes",
        "What the model did",
        [Drawing("outcomes", "Outcomes by set", see, panels), Table(caption, head, rows)],
    )


def curves_section(results: ModelResults) -> Section | None:
    """Scores along the trace, by the probe of each kind."""
    if not results.trained:
        return None
    title = "Where refusal is held, and where it is lost"
    if "thinking" not in results.curves["axis"].to_pylist():
        return Section("curves", title, [Note(_NO_THINKING)])
    blocks: list[Any] = []
    for positions in TRAIN_POSITIONS:
        rows = results.curves
        rows = rows.filter(pc.and_(pc.equal(rows["train_positions"], positions), rows["reported"]))
        panels = {
            label: curves(rows, results.sets(label), results.closing, f"{label} requests")
            for label in _LABELS
            if results.sets(label)
        }
        what = f"Refusal score along the trace: probe trained at {_WHERE[positions]}, layer {results.layer(positions)}"
        blocks.append(Drawing(f"curves-{positions}", what, f"{_SEE[positions]} Bands are 95% intervals.", panels))
    blocks.append(Note(f"{_TEST} {_closing_sentence(results)}"))
    return Section("curves", title, blocks)


def cliffs_section(results: ModelResults) -> Section | None:
    """The cliff of every trace, and the means by set."""
    if not results.trained:
        return None
    table = results.cliffs.filter(pc.is_valid(results.cliffs["cliff"]))
    blocks: list[Any] = []
    if table.num_rows:
        panels = {}
        for label in _LABELS:
            cliffs = {
                name: {
                    outcome: np.asarray(
                        table.filter(pc.and_(pc.equal(table["set"], name), pc.equal(table["outcome"], outcome)))[
                            "cliff"
                        ]
                    )
                    for outcome in ("complied", "refused")
                }
                for name in results.sets(label)
            }
            means = {name: results.summary["sets"][name]["probes"]["all"]["cliff"] for name in cliffs}
            if cliffs:
                panels[label] = cliff_histograms(cliffs, means, f"{label} requests")
        see = (
            "Traces at 0 kept their refusal score to the end, traces on the right lost it: a cliff that belongs to "
            "complying shows as light humps on the right and dark ones at 0. Each set has its own vertical scale."
        )
        blocks.append(Drawing("cliffs", "Cliff of every trace", see, panels))
    measures = ("plateau", "final", "cliff", "misalignment")
    for positions in TRAIN_POSITIONS:
        rows = [
            [name, entry["probes"][positions]["final"]["n"], *(entry["probes"][positions][m] for m in measures)]
            for name, entry in results.summary["sets"].items()
        ]
        caption = f"Probe trained at {_WHERE[positions]}, layer {results.layer(positions)}. {_TEST}"
        blocks.append(Table(caption, ["set", "n", *(f"{m} [95%]" for m in measures)], rows))
    return Section("cliffs", "Plateau, final and cliff", blocks)


def drops_section(results: ModelResults) -> Section | None:
    """Which closing token loses how much."""
    closing = results.closing[-_CLOSING:]
    if not results.trained or not closing:
        return None
    table = results.cliffs.filter(pc.equal(results.cliffs["closing_tokens"], len(results.closing)))
    rows = table.select(["label", "outcome", "cluster", "closing_drops"]).to_pylist()
    kinds = {"harmful, complied": ("harmful", "complied"), "harmful, refused": ("harmful", "refused")}
    kinds["benign, complied"] = ("benign", "complied")
    drops: dict[str, list[dict[str, Any]]] = {}
    for kind, (label, outcome) in kinds.items():
        own = [row for row in rows if (row["label"], row["outcome"]) == (label, outcome)]
        if own:
            values = np.array([row["closing_drops"] for row in own], dtype=np.float64)[:, -len(closing) :]
            bootstrap = GroupBootstrap(
                [row["cluster"] for row in own], results.study.cliff.bootstrap, results.study.seed
            )
            found = [bootstrap.mean(values[:, token]).as_dict() for token in range(len(closing))]
            drops[f"{kind} (n = {len(own):,})"] = found
    if not drops:
        return None
    see = (
        "A point on the right of 0 is refusal score lost at just this token against the token before it, one on the "
        "left is score gained. Compare complied with refused at the same token: a loss that both share comes from the "
        "position alone. Bars are 95% intervals."
    )
    title = f"Score lost at each closing token: all-position probe, layer {results.layer('all')}"
    drawing = Drawing("drops", title, see, {"": closing_drops(drops, closing)})
    caption = f"The same as numbers. {_TEST} Only traces with as many closing tokens as most have."
    shown = [[repr(text)[1:-1], *(entries[i] for entries in drops.values())] for i, text in enumerate(closing)]
    return Section("drops", "Which token loses it", [drawing, Table(caption, ["closing token", *drops], shown)])


def tokens_section(results: ModelResults) -> Section | None:
    """Single traces."""
    if not results.trained or not results.cliffs.num_rows:
        return None
    return Section("tokens", "Single traces, token by token", [views(results)])


def rejects_section(results: ModelResults) -> Section:
    """What has no score."""
    if not results.rejects:
        return Section("rejects", "Rows without a score", [Note("None: every row became a scored trace.")])
    items = [f"{reason}: {count}" for reason, count in results.rejects.items()]
    return Section(
        "rejects",
        "Rows without a score",
        [Note("By stage and reason (counts); the rows are in rejects.parquet.", items)],
    )


SECTIONS: tuple[Callable[[ModelResults], Section | None], ...] = (
    outcomes_section,
    judges_section,
    curves_section,
    cross_section,
    cliffs_section,
    drops_section,
    truncation_section,
    heads_section,
    ablation_section,
    selection_section,
    tuning_section,
    curve_section,
    maps_section,
    probes_section,
    controls_section,
    tokens_section,
    rejects_section,
)

# Of a repaired model: what the model before has not told already.
LATER_SECTIONS: tuple[Callable[[ModelResults], Section | None], ...] = (
    before_after_section,
    outcomes_section,
    curves_section,
    cliffs_section,
    truncation_section,
    heads_section,
    ablation_section,
    tokens_section,
    rejects_section,
)

# What the page must own up to where a model has no section of that key.
UNCHECKED: dict[str, str] = {
    "cross": "how each probe reads positions that it was not trained at",
    "controls": "whether the probes beat shuffled labels, a bag of words and the logit lens, also on other sources",
    "heads": "cause: a probe reads what the model's states say about refusing; nothing here changes them to see what "
    "follows",
    "ablation": "what the model writes when the heads that hold refusal back are removed",
    "truncation": "what the model does when its thinking is cut short",
    "before-after": "repair: whether a fine-tune on the right examples would mend the model, and at what cost",
}


def model_sections(results: ModelResults) -> list[Section]:
    """All sections of one model."""
    every = SECTIONS
    if results.spec.repairs:
        every = LATER_SECTIONS
    elif results.spec.before:
        every = (before_after_section, *SECTIONS)
    return [section for make in every if (section := make(results))]


def _closing_sentence(results: ModelResults) -> str:
    tokens, share = results.closing, results.summary["closing"]["share"]
    if not tokens:
        return ""
    closed = int(pc.sum(results.traces["closed"]).as_py())
    shown = " ".join(repr(text) for text in tokens)
    return f"The closing tokens drawn are {shown}: those of {round(share * closed):,} of {closed:,} closed traces."
