"""A finished run, opened again for what is made of its results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clifflab.artifacts import HashCache, read_json
from clifflab.config import ModelSpec, Study
from clifflab.errors import InputError
from clifflab.models.heads import Head
from clifflab.models.loading import model_identity
from clifflab.science.effects import top_count
from clifflab.stages.base import Context, Identities
from clifflab.stages.head_ranks import ranked_heads
from clifflab.studyfile import load_study

_STEPS = ("heads", "ablation")


@dataclass(frozen=True)
class FinishedRun:
    """One model of a finished run.

    Attributes:
        study: The run's study.
        spec: The model.
        folder: The model's results.
        manifest: The run's manifest.
        context: For readers of its tables.
    """

    study: Study
    spec: ModelSpec
    folder: Path
    manifest: Mapping[str, Any]
    context: Context

    @classmethod
    def open(cls, root: Path, model: str | None) -> FinishedRun:
        """Open a run's folder.

        Args:
            root: Folder of the study's results.
            model: Name of one of its models; not needed where there is one that no repair made.

        Raises:
            InputError: It is no finished run, has no such model, or the model's files are not what they were.
        """
        manifest = read_json(root / "manifest.json")
        if not manifest or not (root / "study.yaml").is_file():
            raise InputError("RUN", root, "is no finished run", "give the folder of a study's results, e.g. runs/NAME")
        study = load_study(root / "study.yaml")
        names = [spec.name for spec in study.models]
        given = [spec.name for spec in study.models if spec.repairs is None]
        if model is None and len(given) > 1:
            raise InputError("--model", "(absent)", f"the run has {len(names)}", f"choose from {', '.join(names)}")
        if model is not None and model not in names:
            raise InputError("--model", model, "the run has no such model", f"choose from {', '.join(names)}")
        spec = study.model(model or given[0])
        now = {"name": spec.name, **model_identity(spec, HashCache(root / ".steps" / "hashes.json"))}
        measured = manifest["models"].get(spec.name, {})
        if spec.repairs:  # the adapter is a result of the run itself
            now["adapter"] = measured.get("adapter")
        if now != measured:
            remedy = "restore it, or run the study again"
            raise InputError("models.path", spec.path, "is no longer the checkpoint that the run measured", remedy)
        context = Context(study, root, Identities({}, {}, []))
        return cls(study, context.spec(spec.name), context.layout.folder(spec.name), manifest, context)

    def top(self, fraction: float) -> list[Head]:
        """The top suppression heads, a fraction of all.

        Raises:
            InputError: The run has no ranking of heads.
        """
        if not (self.folder / "heads.json").is_file():
            raise InputError("RUN", self.folder, "has no ranking of heads", "run the study again, or give --heads")
        ranked = ranked_heads(self.context, self.spec.name)
        if ranked.reason:
            raise InputError("RUN", self.folder, f"has no ranking of heads: {ranked.reason}", "give --heads")
        return sorted(ranked.suppression[: top_count(fraction, ranked.total)])

    def provenance(self) -> dict[str, Any]:
        """Which run this is: study, seed, model, its dtype, and fingerprints of the steps that chose and measured."""
        steps = {name: self.manifest["steps"].get(f"{self.spec.name}/{name}") for name in _STEPS}
        return {
            "study": self.study.name,
            "seed": self.study.seed,
            "model": self.spec.name,
            "dtype": self.spec.dtype,
            "fingerprints": {name: step["fingerprint"] for name, step in steps.items() if step},
            "clifflab": {name: step["clifflab"] for name, step in steps.items() if step},
        }

    def measured(self, heads: list[Head], gamma: float) -> dict[str, Any] | None:
        """What the run measured of exactly these heads, before and after; ``None`` where it did not.

        Returns:
            ``judged_by, fraction, kind, sets`` (of each set and treatment of the thinking ``before``, ``after`` and
            ``change``) and ``perplexity``.
        """
        found = read_json(self.folder / "ablation.json") or {"reason": "there is none"}
        settings = self.study.ablation
        if found["reason"] or settings.renormalise or settings.gamma != gamma:
            return None
        names = {f"{layer}.{head}" for layer, head in heads}
        same = [c for c in found["conditions"] if c["heads"] and set(c["heads"]) == names]
        if not same:
            return None
        fraction, kind = same[0]["fraction"], same[0]["kind"]
        sets = {}
        for name, entry in found["sets"].items():
            results = {(r["thinking"], r["fraction"], r["kind"]): r for r in entry["results"]}
            sets[name] = [
                {"thinking": key[0], "label": entry["label"], "before": results[key[0], 0.0, "none"], "after": result}
                for key, result in results.items()
                if key[1:] == (fraction, kind)
            ]
        read = {(r["fraction"], r["kind"]): r for r in found["perplexity"]["results"]}
        perplexity = None if not read else {"before": read[0.0, "none"], "after": read[fraction, kind]}
        about = {"judged_by": found["judged_by"], "fraction": fraction, "kind": kind}
        return {**about, "sets": sets, "perplexity": perplexity}
