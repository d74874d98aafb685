"""Checks of a finished job: its files are whole, its rows are all there once, its scores are those of the plain way.

The checks build on each other, from the checksums to the model: the first that fails is the last.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from clifflab.artifacts import code_hash, fingerprint
from clifflab.errors import InputError
from clifflab.scoring.job import CODE, JOB, MANIFEST, Folder, Job
from clifflab.scoring.probes import ProbeSet
from clifflab.scoring.verify_again import check_rejects, check_scores, check_sources
from clifflab.scoring.verify_files import REMEDY, VerifyError, check_files
from clifflab.scoring.verify_rows import check_ids, check_rows

_COUNTS = ("read", "scored", "tokens", "padding", "cut", "rejected", "blocks", "probes")
_ENTRIES = {"fingerprint": str, "reasons": dict, "parts": dict, "sides": dict, "ways": dict, "identity": dict}
# Parts of the identity that the job itself tells; the others are hashes.
_TOLD = ("rows", "settings", "window", "generate", "max_rows", "sample", "seed")


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: Which check.
        passed: Whether all is as it should be.
        detail: A sentence.
    """

    name: str
    passed: bool
    detail: str


def verify(root: Path, rows: int, note: Callable[[str], None], seed: int | None = None) -> list[Check]:
    """Check a finished job.

    Args:
        root: Its folder.
        rows: About how many rows are scored anew.
        note: Told of what takes time.
        seed: Of the sample; drawn anew each time by default.

    Returns:
        The checks in their order, up to the first that fails.

    Raises:
        InputError: There is no finished job.
    """
    folder = Folder(root)
    about, manifest = folder.about(), folder.manifest()
    if about is None or manifest is None:
        problem = "holds no finished job" if about is None else "holds a job that is not finished"
        raise InputError("--verify", root, problem, "give the --output of a finished clifflab score")
    checks = list[Check]()
    steps = _steps(folder, about, manifest, rows, note, random.Random(seed))
    name = "identity"
    try:
        for name, detail in steps:
            if detail is not None:
                checks.append(Check(name, True, detail))
    except VerifyError as fault:
        checks.append(Check(name, False, str(fault)))
    return checks


def _steps(
    folder: Folder, about: dict[str, Any], manifest: dict[str, Any], rows: int, note: Callable[[str], None],
    rng: random.Random,
) -> Iterator[tuple[str, str | None]]:  # fmt: skip
    """Each check twice: its name as it begins, and again with what it found."""
    job, other = _identity(about, manifest)
    yield "identity", f"fingerprint {manifest['fingerprint'][:12]}{other}"
    yield "files", None
    note("checksums")
    parts, detail = check_files(folder, manifest, job)
    yield "files", detail
    yield "counts", None
    note("counts and ids")
    tally = check_rows(folder, manifest, job, parts)
    yield "counts", tally.detail
    yield "ids", None
    yield "ids", check_ids(tally, about["identity"], job)
    yield "inputs", None
    sources = check_sources(folder, job, about["identity"])
    yield "inputs", "model, probes and input are those that were scored"
    yield "rejects", None
    note("preparing blocks anew")
    drawn, detail = check_rejects(folder, job, sources, manifest, tally, rows, rng)
    yield "rejects", detail
    yield "scores", None
    if job.generate is not None:
        yield "scores", "NOT scored anew: the model wrote the traces, and would have to write them again"
    elif not tally.scored:
        yield "scores", "there are none"
    else:
        note("scoring rows the plain way")
        yield "scores", check_scores(job, drawn, other)


def _identity(about: dict[str, Any], manifest: dict[str, Any]) -> tuple[Job, str]:
    """The job, and what to say where other versions wrote its results: rounding apart, they should be the same.

    Raises:
        VerifyError: An entry is missing, or job.json and manifest.json do not belong together.
    """
    for name in _COUNTS:
        found = manifest.get(name)
        if not isinstance(found, int) or isinstance(found, bool) or found < 0:
            raise VerifyError(f"{MANIFEST} has no count {name!r}; {REMEDY}")
    for name, kind in _ENTRIES.items():
        if not isinstance(manifest.get(name), kind):
            raise VerifyError(f"{MANIFEST} has no entry {name!r}; {REMEDY}")
    if manifest.get("status") != "complete":
        raise VerifyError(f"{MANIFEST} has the status {manifest.get('status')!r}, not 'complete'; {REMEDY}")
    identity, named = about.get("identity"), about.get("fingerprint")
    if not isinstance(identity, dict) or not (
        named == fingerprint(identity) == manifest["fingerprint"] == fingerprint(manifest["identity"])
    ):
        raise VerifyError(f"{JOB} and {MANIFEST} do not belong together, or were changed; {REMEDY}")
    others = ["another version of clifflab"] if identity.get("code") != code_hash(CODE) else []
    try:
        job = Job.model_validate(about.get("job"))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "job"
        raise VerifyError(f"{JOB}: {where} is nothing that this version of clifflab knows; {REMEDY}") from None
    told = job.identity({}, ProbeSet((), ()), "", [])
    differs = [part for part in _TOLD if told[part] != identity.get(part)]
    if differs and not others:
        raise VerifyError(f"{JOB}: its job and its identity differ in {', '.join(differs)}; {REMEDY}")
    if len(identity.get("probes", [])) != manifest["probes"]:
        raise VerifyError(
            f"{MANIFEST}: its identity has other probes than the {manifest['probes']} it counts; {REMEDY}"
        )
    now, then = told["packages"], identity.get("packages", {})
    others += [f"{name} {then[name]}" for name in sorted(then) if then[name] != now.get(name)]
    return job, f"; written by {', '.join(others)}, compared all the same" if others else ""
