"""Where the Ray that clifflab starts keeps its files."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from clifflab.errors import ClusterError
from clifflab.runtime import local

SOCKET = "session_2026-01-01_00-00-00_123456_4194304/sockets/plasma_store"


@pytest.mark.parametrize(("deep", "name"), [("", "clifflab-ray-"), ("d" * 12, "r-"), ("d" * 40, "clifflab-ray-")])
def test_the_paths_of_sockets_stay_short(
    deep: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(local, "_folders", [])
    monkeypatch.setattr("atexit.register", lambda *_: None)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    parent = Path("/tmp") / "clifflab" / deep if deep else Path("/tmp")
    monkeypatch.setenv("TMPDIR", str(parent))
    found = local._own_folder()
    try:
        assert len(str(found / SOCKET)) <= 107
        assert stat.S_IMODE(found.parent.stat().st_mode) == 0o700
        assert found.parent.name.startswith(name)
        assert (found.parents[1] == parent) == (len(deep) < 40)
        assert local._folders == [found.parent]
    finally:
        found.parent.rmdir()
        if deep and found.parents[1] == parent:
            parent.rmdir()
            parent.parent.rmdir()


def test_a_place_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/none")
    with pytest.raises(ClusterError, match="RAY_TMPDIR: /proc/none: cannot hold Ray's files"):
        local._own_folder()
