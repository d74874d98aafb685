"""A scoring job: what decides its results, and whether a folder's results are this job's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clifflab.artifacts import code_hash, file_hash, fingerprint, locked, read_json, remove, write_json
from clifflab.config import ModelSpec, PromptSet, ScoreConfig, TracesConfig
from clifflab.config.base import Section
from clifflab.errors import OutputError
from clifflab.scoring.types import Source

CODE = ("data", "models", "science", "scoring", "text", "tables.py")
JOB, MANIFEST, BLOCKS, PARTS, EVENTS = "job.json", "manifest.json", "blocks.parquet", "parts.parquet", "events.jsonl"
SCORES, REJECTS, TRACES, RECEIPTS, WORK = "scores", "rejects", "traces", "receipts", ".work"
DUPLICATES = "duplicates.npy"  # rows whose id came before
# In the folder .work: of sources, how often each block was begun, hashes of checkpoints.
INDEX, ATTEMPTS, HASHES = "index", "attempts", "hashes.json"
_OURS = (MANIFEST, PARTS, SCORES, REJECTS, TRACES, RECEIPTS, WORK, BLOCKS, DUPLICATES, EVENTS, JOB)
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

    def identity(self, model: Mapping[str, Any], template: str, sources: Sequence[Source]) -> dict[str, Any]:
        """What makes the results what they are, by part.

        Args:
            model: From :func:`clifflab.models.loading.model_identity`.
            template: Hash of the chat template.
            sources: The files of the input.
        """
        return {
            "model": {"name": self.model.name, **model},
            "probes": [file_hash(Path(path)) for path in self.probes],
            "template": template,
            "input": [[s.name, s.kind, s.compression, s.size, s.changed] for s in sources],
            "rows": self.rows.model_dump(mode="json", exclude={"path"}),
            # The budget of a forward pass moves no score beyond rounding.
            "settings": self.settings.model_dump(mode="json", exclude={"token_budget"}),
            "window": list(self.window),
            "generate": self.generate.model_dump(mode="json") if self.generate else None,
            "max_rows": self.max_rows,
            "sample": self.sample,
            "seed": self.seed,
            "code": code_hash(CODE),
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

    def claim(self, job: Job, identity: Mapping[str, Any], *, overwrite: bool) -> str:
        """Make the folder this job's; returns the fingerprint. Call it inside :meth:`lock`.

        Raises:
            OutputError: It holds something else, or the results of another job.
        """
        name = fingerprint(identity)
        about = self.about()
        if about is not None and about.get("fingerprint") == name:
            return name
        others = [path for path in self.root.iterdir() if path.name not in (*_OURS, ".lock")]
        strange = sorted(path.name for path in others if not path.match(".*.tmp"))  # those are a killed run's
        if strange and about is None:
            problem = f"holds other files ({strange[0]})"
            raise OutputError("--output", self.root, problem, "choose an empty or new folder")
        begun = about is not None or any((self.root / ours).exists() for ours in _OURS if ours != WORK)
        if begun and not overwrite:
            old = about.get("identity", {}) if about else {}
            found = [words for part, words in _WORDS.items() if part in old and old[part] != identity[part]]
            what = ", ".join(found) or "another job"
            problem = f"holds scores of another job ({what})"
            raise OutputError("--output", self.root, problem, "choose another folder, or give --overwrite")
        for ours in _OURS:  # the manifest first: what has none is not whole
            remove(self.root / ours)
        write_json(
            self.root / JOB,
            {"fingerprint": name, "identity": dict(identity), "job": job.model_dump(mode="json")},
        )
        return name

    def lock(self) -> Any:
        """Hold the folder for one run."""
        return locked(self.root)
