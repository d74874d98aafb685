"""The whole of ``clifflab score`` as one of the ways of ``clifflab bench score``."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from clifflab.artifacts import file_hash
from clifflab.bench.processes import Family, can_measure
from clifflab.bench.records import Timing, UnequalResultsError
from clifflab.bench.score import PLANTED, WINDOW, PipelineRun, ScoreBench
from clifflab.config import ModelSpec, PromptSet, RuntimeConfig, ScoreConfig
from clifflab.models.loading import load, load_renderer, model_identity, resolve_spec
from clifflab.organism.corpus import corpus_rows
from clifflab.runtime.progress import SilentCount
from clifflab.runtime.score import score
from clifflab.runtime.score_pool import RayPool
from clifflab.scoring.job import SCORES, Job
from clifflab.scoring.plain import score_plain
from clifflab.scoring.probes import ProbeSet

_COMPARED = 64  # rows that are scored the plain way too
_STEP = 10_000  # rows that are written at once


class CorpusPipeline:
    """Scores a practice corpus through Ray Data, from its file to the manifest, Ray's start included.

    Args:
        rows: Rows of the corpus.
        workers: Scoring workers; one a core by default.
    """

    def __init__(self, rows: int, workers: int | None = None) -> None:
        self._rows, self._workers = rows, workers

    def __call__(
        self, model: str, settings: ScoreBench, probes: ProbeSet, note: Callable[[str], None]
    ) -> PipelineRun | None:
        """Run it; ``None`` for a model that does not speak the corpus's language."""
        if model != PLANTED:
            return None
        with TemporaryDirectory(prefix="clifflab-bench-") as place:
            folder = Path(place)
            note(f"pipeline: writing {self._rows:,} rows")
            corpus = _write_corpus(folder / "corpus.jsonl", self._rows, settings.seed)
            spec = resolve_spec(ModelSpec(name="bench", path=model, dtype=settings.dtype))  # type: ignore[arg-type]
            probe = probes.probes[0]
            job = Job(
                model=spec,
                probes=(str(_write_probes(folder / "probes", spec, probes)),),
                input=str(corpus),
                rows=PromptSet(name="corpus", path=str(corpus), label="unlabelled", existing=True),
                settings=ScoreConfig(
                    probes=(f"{probe.train_positions}:{probe.estimator}:{probe.layer}",),
                    token_budget=settings.token_budget,
                ),
                window=WINDOW,
            )
            note("pipeline: scoring")
            runtime = RuntimeConfig(workers=self._workers or "auto", object_store_mb=512)
            with _Peak() as memory:
                start = time.perf_counter()
                with RayPool(runtime) as pool:
                    manifest = score(job, folder / "out", pool.start, SilentCount()).manifest
                seconds = time.perf_counter() - start
            note(f"pipeline: {self._rows / seconds:,.0f} rows/s")
            if (manifest["read"], manifest["scored"]) != (self._rows, self._rows):
                raise UnequalResultsError(f"bench score: the pipeline scored {manifest['scored']} of {self._rows} rows")
            return PipelineRun(
                timing=Timing((seconds,), memory.bytes),
                traces=self._rows,
                tokens=manifest["tokens"],
                padding_share=manifest["padding"] / max(manifest["padding"] + manifest["tokens"], 1),
                max_abs_diff=_difference(folder / "out", spec, settings.seed, probes),
            )


class _Peak:
    """Most memory of this process and all that it started, looked at every second; 0 where that cannot be told."""

    def __init__(self) -> None:
        self.bytes = 0
        self._family, self._end = Family(os.getpid()), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if can_measure():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(1.0):
            self.bytes = max(self.bytes, self._family.memory().total)


def _write_corpus(path: Path, rows: int, seed: int) -> Path:
    with path.open("w", encoding="utf-8") as handle:
        for row in corpus_rows(rows, seed):
            handle.write(json.dumps(row) + "\n")
    return path


def _write_probes(folder: Path, spec: ModelSpec, probes: ProbeSet) -> Path:
    """The probe in the format of a study's folder."""
    probe, layers = probes.probes[0], probes.files[0].layers
    weights, biases = torch.zeros(layers, len(probe.weight)), torch.zeros(layers)
    weights[probe.layer], biases[probe.layer] = torch.from_numpy(probe.weight), probe.bias
    name = f"{probe.train_positions}.{probe.estimator}"
    folder.mkdir()
    save_file({f"{name}.w": weights, f"{name}.b": biases}, folder / "probes.safetensors")
    about = {
        "trained": True,
        "model": {"name": spec.name, **model_identity(spec, file_hash)},
        "template_hash": load_renderer(spec).template_hash,
        "probes": {name: {"reported_layer": probe.layer}},
    }
    (folder / "probes.json").write_text(json.dumps(about), encoding="utf-8")
    return folder / "probes.safetensors"


def _difference(out: Path, spec: ModelSpec, seed: int, probes: ProbeSet) -> float:
    """Largest difference of a score of the first rows from the plain way's."""
    loaded = load(spec)
    rendered = [
        loaded.renderer.render([{"role": "user", "content": row["prompt"]}], row["thinking"], row["response"])
        for row in corpus_rows(_COMPARED, seed)
    ]
    plain = score_plain(loaded, probes, WINDOW, [ids for ids, _ in rendered], [spans for _, spans in rendered])
    table = pq.read_table(sorted((out / SCORES).glob("*.parquet"))[0]).slice(0, _COMPARED)
    names = ("plateau", "plateau_max", "final", "cliff", "misalignment")
    mine = np.stack([table[name].to_numpy() for name in names], -1)
    return float(np.nanmax(np.abs(mine - plain.measures[: len(mine), 0, : len(names)])))
