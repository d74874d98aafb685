"""The search for heads over four simulated GPUs and two models, with actors killed: the same table as one worker's."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

import clifflab
from clifflab.organism import planted_path
from clifflab.runtime.audit import audit
from clifflab.runtime.progress import Silent
from tests.studies import FEW, events, parse, small_study

GPUS = 4
MODELS = ("planted", "none")


@pytest.fixture
def simulated_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a study's own Ray would find on a machine with four GPUs."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is first imported
    import ray

    assert not ray.is_initialized()
    monkeypatch.setattr(ray, "init", partial(ray.init, num_gpus=GPUS))


class Killer(Silent):
    """Kills the actor that did the last unit of ``heads``, twice."""

    def __init__(self, root: Path) -> None:
        self.root, self.killed, self.done = root, list[int](), 0

    def advance(self, title: str) -> None:
        if title != "heads planted":
            return
        self.done += 1
        if self.done in (1, 4):
            pid = [e["pid"] for e in events(self.root) if e["event"] == "unit" and e["step"] == "heads"][-1]
            assert pid != os.getpid()
            os.kill(pid, signal.SIGKILL)
            self.killed.append(pid)


def without_planted_heads(folder: Path) -> Path:
    """The shipped model as it was before its heads were planted."""
    shutil.copytree(planted_path(), folder)
    tensors = load_file(folder / "model.safetensors")
    for layer, head in json.loads((folder / "ground_truth.json").read_text())["planted_heads"]:
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"][:, head * 32 : (head + 1) * 32] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_four_gpus_two_models_two_kills(simulated_gpus: None, tmp_path: Path) -> None:
    import torch

    study = small_study(
        models=[
            {"name": "planted", "path": "organism:planted"},
            {"name": "none", "path": str(without_planted_heads(tmp_path / "model"))},
        ],
        probe={"min_examples": 8, **FEW},
        truncation={"traces": 0},
        heads={"traces": 4, "controls": 2, "batch_size": 2, "layer_block": 4, "positions": ["closing"], "candidates": 2,
               "random_directions": 2},
        ablation={"traces": 0, "fractions": [0.0, 0.03]},
        runtime={"workers": GPUS},
    )  # fmt: skip
    for prompt_set in study["prompts"]:
        prompt_set["limit"] = 32
    one = clifflab.run(parse(study), tmp_path / "one", runtime="inline").root
    many = shutil.copytree(one, tmp_path / "many" / "small")  # what comes before the search is shared
    for path in (many / "events.jsonl", *many.glob(".steps/*/head*.json"), *many.glob("*/head*.*")):
        path.unlink()
    killer = Killer(many)
    many = clifflab.run(parse(study), tmp_path / "many", runtime="ray", reporter=killer).root
    assert len(set(killer.killed)) == 2
    for model in MODELS:
        for name in ("head_estimates.safetensors", "heads.parquet", "heads.json", "head_sets.json"):
            assert (many / model / name).read_bytes() == (one / model / name).read_bytes(), (model, name)

    log = events(many)
    assert len([e for e in log if e["event"] == "worker_lost"]) == 2
    assert audit(log).problems() == [], "each on a GPU of its own, each model loaded once by an actor"
    started = [e for e in log if e["event"] == "worker_start"]
    assert {gpu for e in started for gpu in e["gpu_ids"]} == {str(gpu) for gpu in range(GPUS)}
    assert all(len(e["gpu_ids"]) == 1 for e in started)
    assert {e["model"] for e in log if e["event"] == "model_load"} == set(MODELS)
    if not torch.cuda.is_available():  # a simulated GPU is no device
        assert all(pq.read_table(many / model / "heads.parquet").num_rows for model in MODELS)

    # What was planted is found, and where nothing was planted nothing is.
    found = {model: json.loads((one / model / "heads.json").read_text()) for model in MODELS}
    top = [entry["head"] for entry in found["planted"]["found"]["closing"]["top"][:2]]
    assert sorted(top) == ["4.2", "6.2"]
    assert found["none"]["found"]["closing"]["suppression"] == []
