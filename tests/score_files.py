"""Probes and corpora for tests of scoring: random directions in the format of a study, practice traces."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from clifflab.artifacts import file_hash
from clifflab.cli import cli as commands
from clifflab.cli import main
from clifflab.config import ModelSpec
from clifflab.models.loading import load_renderer, model_identity, resolve_spec
from clifflab.models.sizes import model_sizes
from clifflab.organism.corpus import corpus_rows
from clifflab.stages.probe import PROBES

PLANTED = ModelSpec(name="model", path="organism:planted")


def write_probes(folder: Path, spec: ModelSpec = PLANTED, seed: int = 0, layer: int | None = None) -> Path:
    """Random probes of a model, as a study leaves them in its folder."""
    spec = resolve_spec(spec)
    sizes = model_sizes(spec)
    make = torch.Generator().manual_seed(seed)
    tensors, about = {}, {}
    for positions, estimator in PROBES:
        name = f"{positions}.{estimator}"
        tensors[f"{name}.w"] = torch.randn(sizes.layers, sizes.width, generator=make) / sizes.width**0.5
        tensors[f"{name}.b"] = torch.randn(sizes.layers, generator=make)
        about[name] = {"reported_layer": sizes.layers // 2 if layer is None else layer}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "probes.safetensors")
    known = {
        "trained": True,
        "reason": None,
        "model": {"name": spec.name, **model_identity(spec, file_hash)},
        "template_hash": load_renderer(spec).template_hash,
        "probes": about,
    }
    (folder / "probes.json").write_text(json.dumps(known))
    return folder


def practice(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Traces of the planted language."""
    return list(corpus_rows(rows, seed))


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """One JSON value a line; text stands as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


Score = Callable[..., Result]


def score(*args: object) -> Result:
    """``clifflab score ARGS`` in this process; errors as their one line."""
    from clifflab.errors import ClifflabError

    result = CliRunner().invoke(commands, ["score", *map(str, args)])
    if isinstance(result.exception, ClifflabError):
        result.output_bytes = f"clifflab: {result.exception}\n".encode()
        result.exit_code = result.exception.exit_code
    elif result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


__all__ = ["PLANTED", "Score", "main", "practice", "score", "write_jsonl", "write_probes"]
