"""Studies over many models: their checkpoints, sweeps, resources, damage, and names that mean harm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clifflab.config import ModelSpec
from clifflab.errors import InputError
from clifflab.models.loading import load
from tests.strengths import STRENGTHS, broken, checkpoints, nan


def test_strengths_are_the_planted_model_with_quieter_heads(tmp_path: Path) -> None:
    folders = checkpoints(tmp_path)
    assert list(folders) == list(STRENGTHS)
    assert len(folders) == 6
    weights = {}
    for name in ("full", "weak", "none"):
        found = load(ModelSpec(name=name, path=str(folders[name])))
        weights[name] = found.model.state_dict()
    own = load(ModelSpec(name="planted", path="organism:planted")).model.state_dict()
    assert all(torch.equal(tensor, weights["full"][key]) for key, tensor in own.items())
    changed = [key for key, tensor in own.items() if not torch.equal(tensor, weights["none"][key])]
    assert changed == [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (4, 6)]
    for key in changed:
        columns = (own[key] != weights["none"][key]).any(0).nonzero().flatten()
        assert torch.equal(weights["weak"][key][:, columns], own[key][:, columns] * 0.5)
        assert not weights["none"][key][:, columns].any()


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        load(ModelSpec(name="broken", path=str(broken(tmp_path / "broken"))))
    with pytest.raises(InputError, match="not finite"):
        load(ModelSpec(name="nan", path=str(nan(tmp_path / "nan"))))
