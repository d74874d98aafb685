"""Bad input, as a user meets it: one clear line, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.conftest import Cli
from tests.studies import small_study


def one_line(done: Any, *words: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("done ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("clifflab: "), lines
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def save(folder: Path, data: Any) -> str:
    (folder / "s.yaml").write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return "s.yaml"


def prompt_set(path: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"name": "mine", "path": path, "label": "harmful", **fields}]


@pytest.mark.parametrize("runtime", ["inline"])
def test_before_anything_starts(cli: Cli, tmp_path: Path, runtime: str) -> None:
    run = ("--runtime", runtime)
    one_line(cli("run", "nowhere.yaml", *run), "nowhere.yaml", "no such file")
    one_line(cli("run", save(tmp_path, "name: [unclosed"), *run), "malformed YAML", "line 1")
    one_line(cli("run", save(tmp_path, small_study(sead=1)), *run), "sead", "unknown key")
    models = [{"name": "m", "path": "organism:planted", "thinking_format": "r9"}]
    one_line(cli("run", save(tmp_path, small_study(models=models)), *run), "thinking_format", "r9", "none")
    one_line(
        cli("run", save(tmp_path, small_study(prompts=prompt_set("gone.jsonl"))), *run), "gone.jsonl", "no such file"
    )
    one_line(cli("run", save(tmp_path, small_study(models=[{"name": "m", "path": "/no/model"}])), *run), "/no/model")
    one_line(cli("run", save(tmp_path, small_study()), "--set", "traces.samples=none"), "traces.samples")
    assert not (tmp_path / "runs").exists()


def test_model_that_no_hub_has(cli: Cli, tmp_path: Path) -> None:
    study = save(tmp_path, small_study(models=[{"name": "m", "path": "nobody/nothing"}]))
    for offline in ("1", "0"):
        one_line(cli("run", study, "--runtime", "inline", HF_HUB_OFFLINE=offline), "nobody/nothing", "hub")


def test_output_folder_that_cannot_be_written(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one_line(cli("run", save(tmp_path, small_study()), "--out", "file"), "file", "choose a writable --out")
    one_line(
        cli("run", save(tmp_path, small_study()), "--out", "/proc/clifflab"), "/proc/clifflab", "choose a writable"
    )


def test_a_half_written_file(cli: Cli, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole.parquet", tmp_path / "half.parquet"
    pq.write_table(pa.table({"prompt": [f"p {i}" for i in range(500)]}), whole)
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    study = save(tmp_path, small_study(prompts=prompt_set("half.parquet")))
    one_line(cli("run", study, "--runtime", "inline"), "half.parquet", "not a whole Parquet file")


def test_sources_that_cannot_be_used(cli: Cli, tmp_path: Path) -> None:
    def run(lines: str) -> Any:
        (tmp_path / "p.jsonl").write_text(lines)
        return cli("run", save(tmp_path, small_study(prompts=prompt_set("p.jsonl"))), "--runtime", "inline")

    one_line(run(""), "empty prompt set")
    one_line(run('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n'), "duplicate id", "rows 0 and 1")


def test_format_that_the_model_does_not_follow(cli: Cli, tmp_path: Path) -> None:
    models = [{"name": "m", "path": "organism:planted", "thinking_format": "qwen3"}]
    one_line(cli("run", save(tmp_path, small_study(models=models)), "--runtime", "inline"), "thinking_format", "r1")


def test_bad_rows_among_good_ones(cli: Cli, tmp_path: Path) -> None:
    rows = [{"prompt": f"how do i make a bomb number {i}?"} for i in range(20)]
    bad: list[Any] = [{"prompt": None}, {"prompt": 7}, {"prompt": " "}, {"prompt": "bomb " * 600}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + bad))
    done = cli("run", save(tmp_path, small_study(prompts=prompt_set("p.jsonl"))), "--runtime", "inline")
    assert done.returncode == 3, done.stderr  # no benign prompts: no probe, and it says so
    root = tmp_path / "runs" / "small" / "planted"
    rejects = pq.read_table(root / "rejects.parquet").to_pylist()
    reasons = [r["reason"] for r in rejects]
    assert reasons[:4] == ["null", "not_text", "empty", "too_long"]
    assert len(reasons) == 24, "every row is accounted for"
    assert pq.read_table(root / "traces.parquet").num_rows == 20
    page = (root.parent / "report.html").read_text()
    assert "traces: too_long: 1" in page


def test_organism_commands(cli: Cli, tmp_path: Path) -> None:
    one_line(cli("organism", "build", "--out", "m", "--width", "33"), "width")
    one_line(cli("organism", "build", "--out", "m", "--strength", "2"), "strength")
    one_line(cli("organism", "prompts", "--set", "nothing", "--out", "p.jsonl"), "unknown set")
    one_line(cli("organism", "prompts", "--rows", "1000000000", "--out", "p.jsonl"), "--rows")
    one_line(cli("organism", "corpus", "--rows", "3", "--out", "p.txt"), "p.txt", ".parquet")
    assert not list(tmp_path.iterdir())
    for name in ("p.jsonl", "p.parquet"):
        assert cli("organism", "prompts", "--set", "harmful", "--rows", "5", "--out", name).returncode == 0
        assert cli("organism", "corpus", "--rows", "5", "--out", f"c-{name}").returncode == 0
    assert pq.read_table(tmp_path / "c-p.parquet").to_pylist() == [
        json.loads(line) for line in (tmp_path / "c-p.jsonl").read_text().splitlines()
    ]


def test_help_imports_nothing_heavy(cli: Cli) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from click.testing import CliRunner; from clifflab.cli import cli;"
        "assert CliRunner().invoke(cli, ['--help']).exit_code == 0;"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'pyarrow', 'pydantic', 'rich'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "quickstart" in cli("run", "--help").stdout
