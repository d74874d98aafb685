"""Where a page's numbers come from: everything that decides them, and nothing of the machine or the hour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from clifflab.artifacts import code_version, package_versions
from clifflab.config import Study
from clifflab.stages.base import Identities


def provenance(study: Study, identities: Identities, templates: dict[str, str]) -> dict[str, Any]:
    """Plain data for the page.

    Args:
        study: The study, resolved.
        identities: Its fingerprints, models and sources.
        templates: Hash of each model's chat template and thinking format; a model that failed may have none.
    """
    settings = study.model_dump(mode="json", exclude={"runtime"}, exclude_none=True)
    judge, repair = settings["judge"], settings["repair"]
    repair["tune"] = {key: value for key, value in repair["tune"].items() if key not in ("workers", "max_failures")}
    files = [*settings["models"], *settings["prompts"], *repair["corpus"], *repair["evaluate"]["choices"]]
    for entry in (*files, *([judge["guard"]] if "guard" in judge else [])):
        entry["path"] = _short_path(entry["path"])
    adapters = [(model, "adapter") for model in settings["models"]]
    for holder, key in ((judge, "labels"), (judge.get("guard", {}), "template"), *adapters):
        if holder.get(key):
            holder[key] = _short_path(holder[key])
    if not study.repair.corpus and not any(model.before for model in study.models):
        del settings["repair"]  # nothing of it was done
    reads = dict(identities.reads)
    if "corpus" in reads:  # a hash a set, in the study's order
        reads["corpus"] = {p.name: digest for p, digest in zip(study.repair.corpus, reads["corpus"], strict=True)}
    models = []
    for name, identity in identities.models.items():
        facts = {k: v for k, v in identity.items() if k != "name" and v not in (None, False)}
        template = {"chat template": templates[name]} if name in templates else {}
        models.append({"name": name, "facts": {**facts, **template}})
    return {
        "version": code_version(),
        "seed": study.seed,
        "packages": package_versions(every=True),
        "reads": {f"{step} {what}": found for step, read in reads.items() for what, found in _flat(read)},
        "models": models,
        "sources": {p.name: digest for p, digest in zip(study.prompts, identities.sources, strict=True)},
        "settings": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
    }


def _flat(read: Any, name: str = "") -> list[tuple[str, str]]:
    """Names and values of what a step reads by content."""
    if isinstance(read, dict):
        return [pair for key, value in read.items() for pair in _flat(value, f"{name} {key}".strip())]
    return [] if read in (None, False) else [(name, str(read))]


def _short_path(path: str) -> str:
    """A path without the folders of the machine that it lies on."""
    return f"\u2026/{Path(path).name}" if Path(path).is_absolute() else path
