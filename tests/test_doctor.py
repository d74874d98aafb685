"""``clifflab doctor`` as users run it: on machines without a GPU, with full disks, without models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from tests.families import CHATML_TOKENS, PLAIN, build
from tests.studies import small_study
from tests.test_bad_input import one_line, save
from tests.test_model_check import family_checkpoint, inside

# A disk of 64 KiB in a mount namespace of its own, filled to the last byte before the command that follows.
FULL_DISK = (
    "mkdir disk && mount -t tmpfs -o size=64k tmpfs disk && { dd if=/dev/zero of=disk/fill bs=4k 2>/dev/null; %s; }"
)


def rows(done: Any) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(done.stdout)["findings"]}


def on_full_disk(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    script = FULL_DISK % command
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system allows no mount namespace, so no disk of 64 KiB can be made")
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=folder, capture_output=True, text=True, timeout=300
    )


def test_a_machine_that_is_well(cli: Cli, tmp_path: Path) -> None:
    done = cli("doctor", "--json", "--model", "organism:planted", fresh=True)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    found = {row["name"]: row for row in answer["findings"]}
    assert answer["ok"] is True
    assert {"python", "torch", "packages", "ray", "network", "results", "model cache", "hub token", "hub"} <= set(found)
    assert found["python"]["data"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["status"] == "ok"
    assert "thinking format r1" in found["model"]["detail"]
    assert not (tmp_path / "runs").exists(), "looking leaves nothing behind"


def test_without_a_gpu(cli: Cli) -> None:
    done = cli("doctor", CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout
    line = next(line for line in done.stdout.splitlines() if " gpus " in line)
    assert "none" in line
    assert "->" in line, "and what to do"


def test_a_full_disk(tmp_path: Path) -> None:
    done = on_full_disk(tmp_path, f"{sys.executable} -m clifflab doctor --out disk/runs")
    assert done.returncode == 2, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if " results " in line)
    assert line.startswith("problem ")
    assert "0 MiB free" in line
    assert "-> make space, or choose a folder on another disk" in line


@pytest.mark.parametrize("left", ["nothing", "a little"])
def test_a_study_on_a_full_disk_is_one_line(tmp_path: Path, left: str) -> None:
    """Full from the start, and full in the middle of a step; nothing half-written is taken for whole."""
    save(tmp_path, small_study())
    run = f"{sys.executable} -m clifflab run s.yaml --out disk --runtime inline"
    rest = f"{run}; code=$?; find disk -name manifest.json -o -name '*.parquet' -o -name '*.tmp'; exit $code"
    done = on_full_disk(tmp_path, rest if left == "nothing" else f"rm disk/fill; {rest}")
    one_line(done, "no space left on the disk", "make space and run again: it continues")
    assert done.stdout == ""


def test_models_that_are_not_what_they_should_be(cli: Cli, tmp_path: Path) -> None:
    family_checkpoint(tmp_path / "unknown", build(PLAIN, CHATML_TOKENS, "pieces", 400))
    bare = family_checkpoint(tmp_path / "bare", build(None, CHATML_TOKENS, "pieces", 400))
    shutil.copytree(bare, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    shutil.copytree(bare, tmp_path / "torn")
    (tmp_path / "torn" / "tokenizer.json").write_text("{")
    for model, problem, remedy in (
        ("/no/model", "no such folder", "give a checkpoint folder or a hub id"),
        ("nobody/nothing", "not to be had from the hub", "check the hub id, the network and the login"),
        ("unknown", "no thinking marker", "set the model's thinking_format: none if it answers without thinking"),
        ("bare", "no chat template", "use a chat or reasoning checkpoint"),
        ("pickled", "no .safetensors file", "convert it"),
        ("torn", "tokenizer cannot be loaded", "check the checkpoint's tokenizer files"),
    ):
        done = inside("doctor", "--json", "--model", str(tmp_path / model) if model in os.listdir(tmp_path) else model)
        assert done.exit_code == 2, (model, done.output)
        found = rows(done)["model"]
        assert found["status"] == "problem"
        assert problem in found["detail"]
        assert remedy in found["remedy"]
    assert cli("doctor", "--model", "unknown", "--format", "none").returncode == 0
    assert (
        "set it to r1"
        in rows(cli("doctor", "--json", "--model", "organism:planted", "--format", "s1"))["model"]["remedy"]
    )
    one_line(cli("doctor", "--format", "r9"), "--format: r9", "choose auto")
    one_line(cli("doctor", "--model", ""), "--model", "is empty")


def test_secrets_are_never_printed(cli: Cli, tmp_path: Path) -> None:
    secret = "hf_" + "Zq9" * 11
    for args in (
        ("doctor",),
        ("doctor", "--json"),
        ("doctor", "--model", "nobody/nothing"),
        ("doctor", "--model", "/no"),
    ):
        done = cli(*args, HF_TOKEN=secret, RAY_AUTH_TOKEN=secret[::-1])
        assert secret not in done.stdout + done.stderr
        assert secret[::-1] not in done.stdout + done.stderr
        assert "present (not shown)" in done.stdout
    none = cli("doctor", HF_TOKEN="", HF_HOME=str(tmp_path / "empty"))
    assert "none: public models only -> for gated models: hf auth login" in none.stdout


def test_folders_that_cannot_be_written(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = cli("doctor", "--json", "--out", "file/runs")
    assert done.returncode == 2
    assert rows(done)["results"]["remedy"] == "choose a writable folder"


def test_packages_outside_of_their_ranges(cli: Cli, tmp_path: Path) -> None:
    """A folder before the installed packages with an old scipy, and a clifflab that needs what is not there."""
    for name, meta in (
        ("scipy-0.1.dist-info", "Name: scipy\nVersion: 0.1\n"),
        (
            "clifflab-0.1.0.dist-info",
            "Name: clifflab\nVersion: 0.1.0\nRequires-Python: >=3.99\nRequires-Dist: scipy<2,>=1.14\n"
            "Requires-Dist: nosuchpackage>=1\nRequires-Dist: absent; extra == 'gguf'\n",
        ),
    ):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "METADATA").write_text(f"Metadata-Version: 2.1\n{meta}")
    import clifflab

    path = f"{tmp_path / 'site'}:{Path(clifflab.__file__).parents[1]}"
    done = cli("doctor", "--json", PYTHONPATH=path)
    assert done.returncode == 2
    found = rows(done)
    assert found["python"]["status"] == "problem"
    assert found["scipy"]["detail"] == "scipy 0.1 is outside of <2,>=1.14"
    assert "pip install -c constraints.txt 'scipy" in found["scipy"]["remedy"]
    assert "is not installed" in found["nosuchpackage"]["detail"]
    assert found["extra gguf"]["status"] == "info"


def test_offline_mode_is_named(cli: Cli) -> None:
    assert "offline mode" in cli("doctor", HF_HUB_OFFLINE="1").stdout
    assert "online mode" in cli("doctor", HF_HUB_OFFLINE="0").stdout
