"""Checkpoints for studies of many models: the planted cliff at several strengths, none, and two that are damaged.

A strength scales what the two planted heads write, by their columns of the output projections, as an exported ablation
does; at 0 the heads are silent and the cliff is gone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from clifflab.organism import planted_path

STRENGTHS = {"full": 1.0, "strong": 0.9, "medium": 0.8, "weak": 0.7, "faint": 0.6, "none": 0.0}
_WEIGHTS = "model.safetensors"


def checkpoint(folder: Path, strength: float) -> Path:
    """A copy of the planted model whose planted heads write ``strength`` times what they wrote."""
    tensors = load_file(planted_path() / _WEIGHTS)
    config = json.loads((planted_path() / "config.json").read_text())
    size = config["head_dim"]
    for layer, head in json.loads((planted_path() / "ground_truth.json").read_text())["planted_heads"]:
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"][:, head * size : (head + 1) * size] *= strength
    return _write(folder, tensors)


def checkpoints(root: Path, strengths: Mapping[str, float] = STRENGTHS) -> dict[str, Path]:
    """One folder a strength: ``root/NAME``."""
    return {name: checkpoint(root / name, strength) for name, strength in strengths.items()}


def broken(folder: Path) -> Path:
    """A checkpoint that cannot be loaded: its weights end in the middle."""
    _copy(folder)
    data = (planted_path() / _WEIGHTS).read_bytes()
    (folder / _WEIGHTS).write_bytes(data[: len(data) // 2])
    return folder


def nan(folder: Path) -> Path:
    """A checkpoint that loads, and yields numbers that are none: one weight of its first block."""
    tensors = load_file(planted_path() / _WEIGHTS)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    return _write(folder, tensors)


def entries(folders: Mapping[str, Path], **settings: Any) -> list[dict[str, Any]]:
    """``models:`` of a study over these checkpoints."""
    return [{"name": name, "path": str(folder), **settings} for name, folder in folders.items()]


def _copy(folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in planted_path().iterdir():
        if file.name not in (_WEIGHTS, "ground_truth.json"):
            shutil.copyfile(file, folder / file.name)


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    _copy(folder)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    return folder
