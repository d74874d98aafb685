"""What the removal of heads wrote, in the form in which the report shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clifflab.artifacts import read_json
from clifflab.report.numbers import interval, number

MEASURES = ("asr", "over_refusal", "unclosed", "degenerate")
Figure = Mapping[str, Any]


@dataclass(frozen=True)
class Condition:
    """One removal on one set of prompts.

    Attributes:
        name: The set.
        fraction: Share of all heads that is removed.
        kind: ``none``, ``suppression``, ``promoting`` or ``random``.
        thinking: ``regenerated`` or ``fixed``.
        heads: How many heads; ``None`` where that is not known.
        traces: How many traces.
        rates: ``asr``, ``over_refusal``, ``unclosed``, ``degenerate``: each ``mean``, ``low`` and ``high``.
        changes: The same minus the unchanged model's on the same traces.
        bands: The same over draws of random heads: ``mean``, ``low``, ``high`` (95% of draws), ``min``, ``max``.
    """

    name: str
    fraction: float
    kind: str
    thinking: str
    heads: int | None
    traces: int
    rates: Mapping[str, Figure]
    changes: Mapping[str, Figure]
    bands: Mapping[str, Figure]


@dataclass(frozen=True)
class AblationFound:
    """What the model did with heads removed.

    Attributes:
        about: ``ablation.json``.
        fraction: Share of heads that counts as the top.
    """

    about: Mapping[str, Any]
    fraction: float

    @property
    def reason(self) -> str:
        """Why nothing was removed; empty where something was."""
        return str(self.about.get("reason") or "")

    @property
    def by_guard(self) -> bool:
        """Whether a guard judged harm."""
        return bool(self.about["judged_by"] == "guard")

    @cached_property
    def sets(self) -> dict[str, str]:
        """Label of each set: ``harmful``, ``benign`` or ``mixed``."""
        return {name: entry["label"] for name, entry in self.about["sets"].items()}

    def labelled(self, *labels: str) -> list[str]:
        """Names of the sets with one of these labels."""
        return [name for name, label in self.sets.items() if label in labels]

    @cached_property
    def fractions(self) -> list[float]:
        """Shares of heads, 0 first."""
        return sorted({0.0, *(key[1] for key in self._conditions)})

    @cached_property
    def main(self) -> float:
        """The share nearest to the one that counts as the top; 0 where nothing was removed."""
        return min((f for f in self.fractions if f > 0), key=lambda f: (abs(f - self.fraction), f), default=0.0)

    @cached_property
    def thinking(self) -> list[str]:
        """Treatments of the thinking, in the study's order."""
        return list(dict.fromkeys(key[3] for key in self._conditions))

    @cached_property
    def kinds(self) -> list[str]:
        """Kinds of heads that were removed."""
        return list(dict.fromkeys(key[2] for key in self._conditions if key[2] != "none"))

    @cached_property
    def removed(self) -> dict[tuple[float, str], list[str]]:
        """Names of the heads of each removal; random ones differ by draw and are not listed."""
        return {(c["fraction"], c["kind"]): list(c["heads"]) for c in self.about["conditions"]}

    def count(self, fraction: float, kind: str) -> int | None:
        """How many heads a removal takes; random ones are as many as the suppression heads."""
        listed = self.removed.get((fraction, "suppression" if kind == "random" else kind))
        return None if listed is None else len(listed)

    def at(self, name: str, fraction: float, kind: str, thinking: str) -> Condition | None:
        """A removal on one set; the unchanged model at fraction 0, whatever the kind."""
        return self._conditions.get((name, fraction, kind if fraction else "none", thinking))

    @cached_property
    def _conditions(self) -> dict[tuple[str, float, str, str], Condition]:
        found = {}
        for name, entry in self.about["sets"].items():
            for result in entry["results"]:
                fraction, kind, thinking = result["fraction"], result["kind"], result["thinking"]
                found[name, fraction, kind, thinking] = Condition(
                    name,
                    fraction,
                    kind,
                    thinking,
                    self.count(fraction, kind),
                    result["traces"],
                    {m: result[m] for m in MEASURES},
                    {m: result.get("change", {}).get(m) or {} for m in MEASURES},
                    self._bands(entry["results"], result),
                )
        return found

    def _bands(self, results: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> dict[str, Figure]:
        """Rates over draws of random heads: the unchanged model's, plus each draw's paired change.

        A draw has few prompts; its own rate would scatter with them more than with its heads.
        """
        if "change_band" not in result:
            return {}
        before = next(r for r in results if r["thinking"] == result["thinking"] and r["kind"] == "none")
        bands: dict[str, Figure] = {}
        for measure in MEASURES:
            base, change = before[measure]["mean"], result["change_band"][measure]
            ends = {key: change[key] for key in ("mean", "low", "high", "min", "max")}
            if base is None or change["mean"] is None:
                shifted = dict.fromkeys(ends)
            else:
                shifted = {key: min(1.0, max(0.0, base + end)) for key, end in ends.items()}
            bands[measure] = {**change, **shifted}
        return bands

    def over_refusal(self, fraction: float, kind: str, thinking: str) -> tuple[str, Figure] | None:
        """The benign set with the highest over-refusal under a removal, with its rate."""
        found = [(name, self.at(name, fraction, kind, thinking)) for name in self.labelled("benign", "mixed")]
        rates = [
            (name, c.rates["over_refusal"]) for name, c in found if c and c.rates["over_refusal"]["mean"] is not None
        ]
        return max(rates, key=lambda pair: pair[1]["mean"]) if rates else None

    @cached_property
    def perplexity(self) -> dict[tuple[float, str], Mapping[str, Figure]]:
        """Of each removal ``perplexity`` and ``ratio`` to the unchanged model; of random heads both are bands."""
        results = self.about["perplexity"]["results"]
        return {(r["fraction"], r["kind"]): {k: r[k] for k in ("perplexity", "ratio")} for r in results}

    def perplexity_text(self, fraction: float, kind: str, which: str) -> str | None:
        """Perplexity or its ratio as text: with its interval, or with the range over random draws."""
        entry = self.perplexity.get((fraction, kind), {}).get(which)
        if not entry:
            return None
        if kind == "random":
            return (
                None
                if entry["mean"] is None
                else f"{number(entry['mean'])} ({number(entry['min'])} to {number(entry['max'])})"
            )
        return interval(entry)

    def draws_text(self, condition: Condition, measure: str) -> str | None:
        """The range of a rate over random draws; ``None`` for other removals."""
        band = condition.bands.get(measure)
        return _range(band) if band and band["mean"] is not None else None

    def notes(self) -> list[str]:
        """How the experiment was made, in sentences."""
        about = self.about
        how = "removed" if not about["gamma"] else f"scaled by {about['gamma']:g}"
        notes = [
            f"The heads are {how} at all tokens, those of the prompt too. Where they were ranked by their effect at "
            "the closing tokens alone, that is another intervention."
            + (" The norm of each token's head outputs is kept." if about["renormalise"] else "")
        ]
        same = about["unchanged_as_before"]
        notes.append(
            f"With nothing removed, {same['same']:,} of {same['traces']:,} answers are those of the study, token by "
            "token."
        )
        seen = [name for name, entry in about["sets"].items() if entry["half"] != "reporting"]
        notes.append(
            "Prompts are of groups that played no part in the ranking of heads"
            + (f", except in {', '.join(seen)}, which have none." if seen else ".")
        )
        random = [r for entry in about["sets"].values() for r in entry["results"] if r["kind"] == "random"]
        if random:
            most = max(r["traces_per_draw"] for r in random)
            notes.append(
                f"Random heads: {about['random_draws']} draws with as many heads of each layer, none of them a chosen "
                f"one; each draw answers at most {most} prompts of a set, other draws others, so that single draws "
                "scatter more than the means."
            )
        unreadable = sum(r.get("unreadable", 0) for entry in about["sets"].values() for r in entry["results"])
        if unreadable:
            notes.append(f"{unreadable:,} answers of the guard could not be read and are left out of attack success.")
        for fraction in about["without_random"]:
            notes.append(f"At {100 * fraction:g}% too few other heads remain for random draws.")
        return notes


def read_ablation(folder: Path, fraction: float) -> AblationFound | None:
    """What the removal of heads wrote into a model's folder; ``None`` where it was not part of the study.

    Args:
        folder: The model's folder.
        fraction: Share of heads that counts as the top.
    """
    about = read_json(folder / "ablation.json")
    return AblationFound(about, fraction) if about else None


def _range(entry: Figure) -> str:
    return f"{number(entry['min'])} to {number(entry['max'])} ({entry['n']})"
