"""The command line over Ray, in an interpreter of its own."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import Cli
from tests.studies import small_study
from tests.test_bad_input import one_line, prompt_set, save
from tests.test_doctor import rows


def test_errors_of_workers_come_back_as_one_line(cli: Cli, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole.parquet", tmp_path / "half.parquet"
    pq.write_table(pa.table({"prompt": [f"p {i}" for i in range(500)]}), whole)
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    study = save(tmp_path, small_study(prompts=prompt_set("half.parquet")))
    one_line(cli("run", study, "--runtime", "ray", fresh=True), "half.parquet", "not a whole Parquet file")


def test_ray_really_starts(cli: Cli) -> None:
    done = cli("doctor", "--start-ray", "--json")
    found = rows(done)["ray"]
    assert found["status"] == "ok", found
    assert "ran a task" in found["detail"]
    broken = cli("doctor", "--start-ray", "--json", RAY_TMPDIR="/proc/none", TMPDIR="/tmp")
    assert broken.returncode == 2
    assert "use --runtime inline" in rows(broken)["ray"]["remedy"]
