"""A scoring job: what decides its results, and whether a folder's results are this job's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clifflab.artifacts import (
    code_hash,
    fingerprint,
    locked,
    package_versions,
    read_json,
    read_parquet,
    remove,
    write_json,
)
from clifflab.config import ModelSpec, PromptSet, ScoreConfig, TracesConfig
from clifflab.config.base import Section
from clifflab.errors import OutputError
from clifflab.scoring.probes import ProbeSet
from clifflab.scoring.types import Source

CODE = ("data", "engines", "models", "science", "scoring", "stages", "text", "tuning", "tables.py")
JOB, MANIFEST, BLOCKS, PARTS, EVENTS = "job.json", "manifest.json", "blocks.parquet", "parts.parquet", "events.jsonl"
SCORES, REJECTS, TRACES, RECEIPTS, WORK = "scores", "rejects", "traces", "receipts", ".work"
DUPLICATES = "duplicates.npy"  # rows whose id came before
# In the folder .work: of sources, how often each block was begun, hashes of checkpoints.
INDEX, ATTEMPTS, HASHES = "index", "attempts", "hashes.json"
LOCK, STATUS = ".lock", "status.json"
_OURS = (MANIFEST, PARTS, SCORES, REJECTS, TRACES, RECEIPTS, WORK, BLOCKS, DUPLICATES, EVENTS, STATUS, JOB, LOCK)
# What a part of the identity is called in the refusal of a folder.
_WORDS = {
    "model": "another model",
    "probes": "other probes",
    "template": "another chat template or thinking format",
    "input": "other input files, or files that were changed since",
    "rows": "other columns, set or label",
    "settings": "other settings of the scores",
    "window": "another window of the plateau",
    "generate": "other settings of generation",
    "max_rows": "another --max-rows",
    "sample": "another --sample",
    "seed": "another seed",
    "code": "another version of clifflab",
    "packages": "other versions of torch, transformers or what they stand on",
}


class Job(Section):
    """Everything that decides the results.

    Attributes:
        model: The model, resolved.
        probes: Files of probes.
        input: Path or pattern of the corpus.
        rows: Columns, set and label of its rows.
        settings: How it is scored.
        window: The plateau's part of the thinking.
        generate: How the model writes traces to bare prompts; ``None`` where the rows hold traces.
        max_rows: The first rows alone.
        sample: A share of the rows, drawn by the seed.
        seed: Of the sample and of generation.
    """

    model: ModelSpec
    probes: tuple[str, ...]
    input: str
    rows: PromptSet
    settings: ScoreConfig = ScoreConfig()
    window: tuple[float, float] = (0.5, 0.9)
    generate: TracesConfig | None = None
    max_rows: int | None = None
    sample: float | None = None
    seed: int = 0

    def identity(
        self, model: Mapping[str, Any], probes: ProbeSet, template: str, sources: Sequence[Source]
    ) -> dict[str, Any]:
        """What makes the results what they are, by part.

        Args:
            model: From :func:`clifflab.models.loading.model_identity`.
            probes: The probes, read from their files.
            template: Hash of the chat template.
            sources: The files of the input.
        """
        # One trace a prompt is written, whatever samples says; without chance the seed decides nothing.
        generate = self.generate.model_dump(mode="json", exclude={"samples"}) if self.generate else None
        return {
            "model": {"name": self.model.name, **model},
            "probes": probes.identity(),
            "template": template,
            "input": input_identity(sources),
            "rows": self.rows.model_dump(mode="json", exclude={"path"}),
            # The budget of a forward pass moves no score beyond rounding.
            "settings": self.settings.model_dump(mode="json", exclude={"token_budget"}),
            "window": list(self.window),
            "generate": generate,
            "max_rows": self.max_rows,
            "sample": self.sample,
            "seed": self.seed if generate or self.sample is not None else None,
            "code": code_hash(CODE),
            "packages": package_versions(),
        }


class Folder:
    """The output folder of one job.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def part(self, kind: str, block: int) -> Path:
        """A block's file of one kind."""
        return self.root / kind / f"part-{block:08d}.parquet"

    def receipt(self, block: int) -> Path:
        """The file that commits a block."""
        return self.root / RECEIPTS / f"{block:08d}.json"

    def work(self, name: str) -> Path:
        """A file of the unfinished job."""
        return self.root / WORK / name

    def manifest(self) -> dict[str, Any] | None:
        """The manifest; ``None`` where the job is not finished."""
        found = read_json(self.root / MANIFEST)
        return found if isinstance(found, dict) else None

    def about(self) -> dict[str, Any] | None:
        """``job.json``: job, identity and fingerprint."""
        found = read_json(self.root / JOB)
        return found if isinstance(found, dict) else None

    def holds(self, identity: Mapping[str, Any], *, overwrite: bool) -> bool:
        """Whether the folder holds this job already, finished or begun. Call it inside :meth:`lock`.

        Raises:
            OutputError: It holds something else, or results of another job that are not to be overwritten, or finished
                results of this job of which a part is missing.
        """
        about = self.about()
        if about is not None and about.get("fingerprint") == fingerprint(identity):
            lost = self._lost()
            if lost and not overwrite:
                problem = f"is finished, and {lost} is missing or cut short"
                raise OutputError("--output", self.root, problem, "put it back, or give --overwrite to score anew")
            return not lost
        strange = sorted(p.name for p in self.root.iterdir() if p.name not in _OURS and not _scratch(p))
        if strange and about is None:
            problem = f"holds other files ({strange[0]})"
            raise OutputError("--output", self.root, problem, "choose an empty or new folder")
        done = [self.root / MANIFEST, *(self.root / kind for kind in (SCORES, REJECTS, RECEIPTS))]
        if any(place.exists() for place in done) and not overwrite:
            old = about.get("identity", {}) if about else {}
            found = [words for part, words in _WORDS.items() if part in old and old[part] != identity[part]]
            problem = f"holds scores of another job ({', '.join(found) or 'of another kind'})"
            raise OutputError("--output", self.root, problem, "choose another folder, or give --overwrite")
        return False

    def take(self, job: Job, identity: Mapping[str, Any], *, anew: bool) -> str:
        """Make the folder this job's; returns the fingerprint.

        Args:
            job: The job.
            identity: Its identity.
            anew: Throw away what is there. The manifest goes first: what has none is not whole.
        """
        for place in [self.root / ours for ours in _OURS if ours != LOCK] if anew else []:
            remove(place)
        for place in self.root.iterdir():
            if _scratch(place):  # of a run that was killed while it wrote
                remove(place)
        name = fingerprint(identity)
        about = {"fingerprint": name, "identity": dict(identity), "job": job.model_dump(mode="json")}
        if self.about() != about:  # files may have moved and be the same
            write_json(self.root / JOB, about)
        return name

    def _lost(self) -> str:
        """A file of the finished results that is not there in its length; empty where all are, or none is finished."""
        if self.manifest() is None:
            return ""
        parts = self.root / PARTS
        if not parts.is_file():
            return PARTS
        for part in read_parquet(parts).select(["file", "bytes"]).to_pylist():
            if not has_size(self.root / part["file"], part["bytes"]):
                return str(part["file"])
        return ""

    def lock(self) -> Any:
        """Hold the folder for one run."""
        return locked(self.root)


def input_identity(sources: Sequence[Source]) -> list[list[Any]]:
    """What the files of the input are known by."""
    return [[s.name, s.kind, s.compression, s.size, s.changed] for s in sources]


def has_size(path: Path, size: int) -> bool:
    """Whether a file is there and has this many bytes."""
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _scratch(path: Path) -> bool:
    """Whether a name is that of a file which was being written."""
    return path.name.startswith(".") and path.name.endswith(".tmp")
