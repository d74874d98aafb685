"""An installed wheel works outside the repository, with the model and the studies that it ships."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_wheel(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 12e6
    place = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    code = "import clifflab, clifflab.cli; print(clifflab.__file__); clifflab.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "quickstart", "--dry-run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(place))
    assert "would run  traces (planted)" in done.stdout
    shipped = place / "clifflab" / "organism" / "data" / "planted"
    assert sum(f.stat().st_size for f in shipped.iterdir()) <= 10e6
    assert not list(tmp_path.glob("runs*")), "a dry run writes nothing"


def test_the_project_speaks_of_itself_alone() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        import pytest

        pytest.skip("not a git checkout")
    foreign = ("/" + "work/", "/" + "root/")
    for name in tracked.stdout.splitlines():
        if name.endswith((".py", ".md", ".yaml", ".toml", ".txt")) or name.startswith(".ci/"):
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not any(path in text for path in foreign), name
