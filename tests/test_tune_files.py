"""What a killed or failing training leaves on the disk, and what the next one makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from clifflab.artifacts import remove
from clifflab.config import TuneConfig
from clifflab.errors import ClifflabError, ConfigError, InputError, OutputError
from clifflab.models.loading import load
from clifflab.runtime.study import run
from clifflab.studyfile import parse_section
from clifflab.tuning.group import Alone, FirstWorkerError, together, write_folder
from clifflab.tuning.loop import Data, train
from clifflab.tuning.run import FIGURES, check_finished
from tests.studies import parse, small_study


def fill(folder: Path) -> None:
    (folder / "weights").write_text("whole")


def test_a_folder_of_a_killed_process_is_in_nobodys_way(tmp_path: Path) -> None:
    import os

    scratch = tmp_path / f".adapter.{os.getpid()}.tmp"
    scratch.mkdir()
    (scratch / "half").write_text("")
    write_folder(tmp_path / "adapter", fill)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["adapter", "weights"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    write_folder(tmp_path / "adapter", fill)
    with pytest.raises(OutputError, match="no space left on the disk; make space and run again"):
        write_folder(tmp_path / "adapter", full)
    assert (tmp_path / "adapter" / "weights").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_others_do_not_speak_for_the_first_worker() -> None:
    class Second(Alone):
        rank, size = 1, 2

        def total(self, values: torch.Tensor) -> torch.Tensor:
            return values + 1  # the first one failed

    def fails() -> None:
        raise OSError("of any kind")

    with pytest.raises(OSError, match="of any kind"):
        together(Alone(), fails, torch.device("cpu"))
    with pytest.raises(FirstWorkerError):
        together(Second(), fails, torch.device("cpu"))


def test_a_finished_tuning_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / ".adapter.77.tmp").mkdir()
    assert check_finished(tmp_path, "f") is None  # of a killed process: goes on
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "w").write_text("12345")
    about = {"fingerprint": "f", "files": ["adapter/w"], "sizes": {"adapter/w": 5}}
    (tmp_path / FIGURES).write_text(json.dumps(about))
    assert check_finished(tmp_path, "f") == about
    (tmp_path / "adapter" / "w").write_text("")
    assert check_finished(tmp_path, "f") is None
    with pytest.raises(OutputError, match="another model, with other data"):
        check_finished(tmp_path, "g")


def test_workers_are_positive() -> None:
    with pytest.raises(ConfigError, match=r"workers.*at least 1, or auto"):
        parse_section(TuneConfig, ("workers=0",))


def test_no_activation_checkpointing(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = parse(small_study(models=[{"name": "m", "path": str(checkpoints["llama"])}])).models[0]
    loaded = load(spec)
    monkeypatch.setattr(type(loaded.model), "supports_gradient_checkpointing", False)
    settings = TuneConfig(checkpointing="on")
    with pytest.raises(InputError, match=r"tune.checkpointing: on: the architecture cannot"):
        train(loaded.model, Data([_example()], [], 0), settings, 0, Alone())


def _example() -> Any:
    from clifflab.tuning.examples import Example

    return Example("a", "a", (1, 5, 6, 2), 2)


def test_a_study_sweeps_folders_too(tmp_path: Path) -> None:
    study = parse(small_study(prompts=[{"name": "benign", "path": "organism:benign", "label": "benign", "limit": 2}]))
    left = tmp_path / "small" / ".work" / "planted" / "tune" / "x" / ".checkpoint-00000003.99.tmp"
    left.mkdir(parents=True)
    beside = tmp_path / "small" / "planted" / "repair" / ".adapter.99.tmp"
    beside.mkdir(parents=True)
    run(study, tmp_path, runtime="inline")
    assert not left.exists()
    assert not beside.exists()


def test_remove_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove(tmp_path / "link")
    remove(tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_errors_are_of_one_tree() -> None:
    assert issubclass(FirstWorkerError, ClifflabError)
