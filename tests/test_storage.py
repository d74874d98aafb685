"""Results in a bucket: whole or absent, one run at a time, and the same as on a disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clifflab.errors import OutputError
from clifflab.runtime.folder import StudyFiles, identify, plan
from clifflab.runtime.storage import check_output, left_probe, mirror_job, open_store, reads_of, seen_probes
from clifflab.runtime.storage import lease as storage_lease
from clifflab.runtime.storage import objects as storage_objects
from clifflab.runtime.storage.mirror import MirrorStore
from clifflab.runtime.study import prepare, run
from clifflab.runtime.work import Job, Worker
from clifflab.scoring import filesystems
from clifflab.stages import STEPS, Context, Identities, Unit
from tests.buckets import CUT, Bucket, writable
from tests.studies import FEW, events, parse, small_study
from tests.test_repair_steps import repair_study

SECRETS = ("AKIAOFNOBODY", "hush-hush-hush")
OUT = "s3://shelf/runs"
Open = Callable[..., MirrorStore]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket that the client is sent to with a key and a secret of its own; nobody waits long."""
    with writable() as held:
        monkeypatch.setenv("AWS_ENDPOINT_URL", held.endpoint)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRETS[0])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS[1])
        monkeypatch.setattr(filesystems, "_ATTEMPTS", 1)
        monkeypatch.setattr(storage_objects, "PAUSES", (0.01,) * 3)
        monkeypatch.setattr(storage_lease, "MOMENT", 0.1)
        filesystems._remote.cache_clear()
        yield held
        for key, data in held.objects.items():
            assert not any(secret.encode() in data for secret in SECRETS), key
    filesystems._remote.cache_clear()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens stores of one output, each in a folder of its own, as processes on many machines would."""
    stores: list[MirrorStore] = []

    def start(out: str = OUT, name: str = "study", scratch: Path | None = None) -> MirrorStore:
        store = open_store(out, name, scratch or tmp_path / f"scratch-{len(stores)}")
        assert isinstance(store, MirrorStore)
        stores.append(store)
        return store

    yield start
    for store in stores:
        store.close()


def put(store: MirrorStore, **files: str | bytes) -> None:
    """Write files; ``__`` stands for ``/`` and ``_`` at the end for a suffix."""
    for name, content in files.items():
        path = store.root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def content(store: MirrorStore) -> dict[str, bytes]:
    return {path.relative_to(store.root).as_posix(): path.read_bytes() for path in store.files()}


def one_line(error: pytest.ExceptionInfo[Any], *words: str) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert not any(secret in text for secret in SECRETS)
    for word in words:
        assert word in text, text
    return text


@pytest.mark.parametrize("kind", ["s3", "memory", "local"])
def test_what_one_writes_another_reads(kind: str, s3: Bucket, opened: Open, tmp_path: Path) -> None:
    out = {"s3": OUT, "memory": f"memory://{tmp_path.name}", "local": f"local://{tmp_path}/shelf"}[kind]
    s3.page = 2
    one, other = opened(out), opened(out)
    assert one.address == f"{out}/study"
    assert one.remote
    put(one, a="a", m__b="b" * 5000, m__deep__empty="", **{".work__m__s__0": "unit", ".steps__m__s.json": "{}"})
    put(one, **{".a.1-2.tmp": "half", "m__.b.tmp__c": "half", ".lock": "", ".lock.json": "mine"})
    (one.root / "link").symlink_to("/etc/hostname")
    one.push()
    s3.seen.clear()
    one.push()
    assert s3.seen == []
    other.pull()
    wanted = {"a": b"a", "m/b": b"b" * 5000, "m/deep/empty": b"", ".steps/m/s.json": b"{}"}
    assert content(other) == wanted
    other.pull([other.root / ".work" / "m", other.root / "none"])
    assert content(other) == {**wanted, ".work/m/s/0": b"unit"}
    assert other.present(other.root / ".work") == {other.root / ".work/m/s/0"}

    before = other.files()
    put(other, m__b="changed", m__own="not sent")
    one.remove(one.root / "m" / "deep")
    one.remove(one.root / "a")
    put(one, m__b="theirs")
    one.push()
    other.pull()
    assert content(other) == {
        "m/b": b"changed", "m/own": b"not sent", ".steps/m/s.json": b"{}", ".work/m/s/0": b"unit",
    }  # fmt: skip
    other.drop(before)
    other.pull([other.root / "m"])
    assert content(other) == {"m/b": b"theirs", ".steps/m/s.json": b"{}", ".work/m/s/0": b"unit"}
    other.remove(other.root / ".work")
    other.remove(other.root / ".left.tmp")
    one.pull()
    one.pull([one.root / ".work"])
    assert content(one) | {".lock": b"", ".lock.json": b""} == {
        "m/b": b"theirs", ".steps/m/s.json": b"{}", ".lock": b"", ".lock.json": b"",
    }  # fmt: skip


def test_a_change_within_a_second(s3: Bucket, opened: Open) -> None:
    """S3 tells times in whole seconds, and the size stays the same."""
    one, other = opened(), opened()
    put(one, a="1")
    one.push()
    other.pull()
    s3.changed.clear()
    s3.objects["runs/study/a"] = b"2"
    when = os.stat(other.root / "a").st_mtime
    s3.changed["runs/study/a"] = other._here.seen["a"].remote.when or when
    other.pull()
    assert content(other) == {"a": b"2"}
    before = s3.count("GET /shelf/")
    other.pull()
    assert s3.count("GET /shelf/") == before  # looked at, not fetched


def test_what_vouches_for_others_goes_last(s3: Bucket, opened: Open) -> None:
    store = opened()
    names = {"manifest.json": "{}", ".steps__m__s.json": "{}", "metrics.json": "{}", ".work__m__s__0": "u", "m__x": "x"}
    put(store, **names)
    store.push()
    puts = [request.rpartition("/study/")[2] for request in s3.seen if request.startswith("PUT")]
    assert puts == ["m/x", ".work/m/s/0", "metrics.json", ".steps/m/s.json", "manifest.json"]

    put(store, **{"m__x": "y", "manifest.json": "[]"})
    s3.fault = lambda method, path: 503 if method == "PUT" and path.endswith("/m/x") else 0
    with pytest.raises(OutputError) as caught:
        store.push()
    one_line(caught, "output: s3://shelf/runs/study: cannot be used", "looked for AWS_ACCESS_KEY_ID (set)")
    assert s3.objects["runs/study/manifest.json"] == b"{}"
    s3.fault = lambda method, path: 0
    store.push()
    assert (s3.objects["runs/study/m/x"], s3.objects["runs/study/manifest.json"]) == (b"y", b"[]")


def test_a_write_that_is_cut_leaves_the_old_object(s3: Bucket, opened: Open) -> None:
    store, large = opened(), os.urandom(21 << 20)
    put(store, small="old", large="old")
    store.push()
    put(store, small="new" * 40000, large=large)
    s3.fault = lambda method, path: CUT if method == "PUT" and ("partNumber=2" in path or path.endswith("small")) else 0
    with pytest.raises(OutputError) as caught:
        store.push()
    one_line(caught, "cannot be used")
    assert (s3.objects["runs/study/small"], s3.objects["runs/study/large"]) == (b"old", b"old")
    left = {"small": 2, "partNumber=2": 1}

    def soon(method: str, path: str) -> int:
        for end in left:
            if method == "PUT" and end in path and left[end]:
                left[end] -= 1
                return CUT
        return 0

    s3.fault = soon
    store.push()
    assert left == {"small": 0, "partNumber=2": 0}
    assert (s3.objects["runs/study/small"], s3.objects["runs/study/large"]) == (b"new" * 40000, large)
    other = opened()
    other.pull([other.root / "large"])
    assert content(other) == {"large": large}


KILLED = """
import sys
from pathlib import Path
from clifflab.runtime.storage import open_store
store = open_store("s3://shelf/runs", "study", Path(sys.argv[1]))
with store.lock():
    for number in range(3):
        (store.root / f"large-{number}").write_bytes(bytes(12 << 20))
    (store.root / "manifest.json").write_text("{}")
    store.push()
"""


def test_a_process_that_is_killed_while_it_sends(s3: Bucket, opened: Open, tmp_path: Path) -> None:
    stalled = threading.Event()

    def stall(method: str, path: str) -> int:
        if "partNumber=2" in path:
            stalled.set()
            threading.Event().wait(20)
        return 0

    s3.fault = stall
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "killed")])
    assert stalled.wait(60)
    process.kill()
    process.wait()
    s3.fault = lambda method, path: 0
    assert s3.keys() == ["runs/study/.lock.json"]
    store = opened(scratch=tmp_path / "killed")
    assert content(store) == {}  # its folder is used again, without what it had not sent
    with store.lock():  # at once: its holder was a process of this machine
        store.pull()
    assert content(store) == {}


def test_a_file_is_moved_into_place(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a filesystem shows what is half-written: here fsspec's for a disk."""
    from fsspec.implementations.local import LocalFileSystem

    monkeypatch.setattr(storage_objects, "PAUSES", (0.01,) * 2)
    store, seen, plain = opened(f"local://{tmp_path}/shelf"), list[str](), LocalFileSystem.mv
    put(store, small="old", large="old")
    store.push()

    def fail(self: Any, one: str, other: str, **options: Any) -> None:
        seen.append(one)
        raise OSError("the wire was cut")

    monkeypatch.setattr(LocalFileSystem, "mv", fail)
    for name in ("small", "large"):
        put(store, **{name: "new" * 4_000_000 if name == "large" else "new"})
        with pytest.raises(OutputError) as caught:
            store.push()
        one_line(caught, "the wire was cut", "looked for what fsspec's local filesystem takes from the environment")
        assert (tmp_path / "shelf/study" / name).read_bytes() == b"old"
        store.drop({})
        store.pull()
    assert len(seen) == 6  # each tried again
    assert sorted(path.name for path in (tmp_path / "shelf/study").iterdir()) == ["large", "small"]
    monkeypatch.setattr(LocalFileSystem, "mv", plain)
    put(store, large="new" * 4_000_000)
    store.push()
    assert (tmp_path / "shelf/study/large").stat().st_size == 12_000_000


def test_a_store_that_stumbles_and_one_that_refuses(s3: Bucket, opened: Open) -> None:
    left = [5]

    def first(method: str, path: str) -> int:
        left[0] -= 1
        return 503 if left[0] >= 0 and left[0] % 2 else 0

    s3.fault = first
    one, other = opened(), opened()
    put(one, a="a")
    one.push()
    other.pull()
    assert content(other) == {"a": b"a"}
    s3.fault, s3.code = (lambda method, path: 403), "AccessDenied"
    put(one, b="b")
    for act in (one.push, other.pull, lambda: one.remove(one.root / "a"), lambda: one.lock().__enter__()):
        s3.seen.clear()
        with pytest.raises(OutputError) as caught:
            act()  # type: ignore[operator]
        one_line(caught, "access denied", "looked for AWS_ACCESS_KEY_ID (set)")
        assert len(s3.seen) <= 2, s3.seen  # asked once
    assert content(one) == {"a": b"a", "b": b"b"}
    s3.fault, s3.code = (lambda method, path: 404), "NoSuchBucket"
    s3.seen.clear()
    with pytest.raises(OutputError) as caught:
        one.push()
    one_line(caught, "s3://shelf/runs/study")
    assert len(s3.seen) <= 2


def test_a_full_disk_under_the_mirror(s3: Bucket, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("runs/study/m/a", b"x" * 5000)
    store = opened()
    plain = Path.open

    def full(path: Path, *args: Any, **kwargs: Any) -> Any:
        return plain(Path("/dev/full") if path.name.endswith(".tmp") else path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OutputError) as caught:
            store.pull()
    one_line(caught, "scratch: ", "no space left on the disk", "CLIFFLAB_SCRATCH")
    assert content(store) == {}
    store.pull()
    assert content(store) == {"m/a": b"x" * 5000}


def test_names_that_lead_outside_are_not_followed(s3: Bucket, opened: Open, tmp_path: Path) -> None:
    for key in ("../evil", "m/../../evil", "/evil", "m//evil", "m/.evil.tmp", ".clifflab-check-x", "m/ok"):
        s3.put(f"runs/study/{key}", b"x")
    store = opened()
    store.pull()
    assert content(store) == {"m/ok": b"x"}
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]


@pytest.mark.parametrize("kind", ["s3", "memory", "local"])
def test_one_run_at_a_time(kind: str, s3: Bucket, opened: Open, tmp_path: Path) -> None:
    out = {"s3": OUT, "memory": f"memory://{tmp_path.name}", "local": f"local://{tmp_path}/shelf"}[kind]
    one, other = opened(out), opened(out)
    with one.lock():
        with pytest.raises(OutputError) as caught, other.lock():
            raise AssertionError
        one_line(caught, "another run is writing there (since 2", f"from host {os.uname().nodename}", "if it died")
        put(one, a="a")
        one.push()
        one.pull()
    with other.lock():
        other.push()
    names = {path.name for path in other.present(other.root)}
    assert names == {"a"}


def test_of_two_takers_one_yields(s3: Bucket, opened: Open) -> None:
    stores, together, results = [opened() for _ in range(4)], threading.Barrier(4), list[str]()

    def take(store: MirrorStore) -> None:
        together.wait()
        try:
            with store.lock():
                results.append("held")
                together.wait(10)
        except OutputError as error:
            results.append(str(error))
            together.wait(10)

    threads = [threading.Thread(target=take, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("held") == 1, results
    assert sum("another run is writing there" in result for result in results) == 3
    assert "runs/study/.lock.json" not in s3.objects


def lease(s3: Bucket, age: float, **changes: Any) -> None:
    """A lease that was renewed some seconds ago, by the store's clock."""
    about = {
        "owner": "other",
        "host": "elsewhere",
        "pid": 1,
        "since": 1.7e9,
        "time": 1.7e9,
        "machine": "m",
        "began": "1",
    }
    s3.put("runs/study/.lock.json", json.dumps({**about, **changes}).encode())
    s3.changed["runs/study/.lock.json"] -= age


def test_a_lease_ends_with_its_holder(s3: Bucket, opened: Open) -> None:
    store = opened()
    lease(s3, 60, time=0)  # a machine whose clock is far behind
    with pytest.raises(OutputError) as caught, store.lock():
        raise AssertionError
    assert "in 60 s" in one_line(caught, "since 2023-11-14 22:13:20 UTC, from host elsewhere") or "in 59 s" in str(
        caught.value
    )
    lease(s3, storage_lease.SPAN + 1)
    with store.lock():
        assert json.loads(s3.objects["runs/study/.lock.json"])["pid"] == os.getpid()
    child = subprocess.Popen(["true"])
    child.wait()
    lease(s3, 0, machine=storage_lease._machine(), pid=child.pid)  # a run of this machine that was killed
    with store.lock():
        pass
    lease(s3, 0, machine=storage_lease._machine(), pid=os.getpid(), began="1")  # its number was given again
    with store.lock():
        pass
    s3.put("runs/study/.lock.json", b"no json")
    with pytest.raises(OutputError, match="another run is writing there"), store.lock():
        raise AssertionError
    assert s3.keys() == ["runs/study/.lock.json"]


def test_a_claim_is_waited_for(s3: Bucket, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_lease, "MOMENT", 0.02)
    store, claim = opened(), f"runs/study/{storage_lease.CLAIM}other"
    s3.put(claim, b"{}")
    with pytest.raises(OutputError) as caught, store.lock():
        raise AssertionError
    one_line(caught, "another run is writing there, or about to; wait for it")
    assert s3.keys() == [claim]
    s3.changed[claim] -= storage_lease.SPAN + 1
    with store.lock():
        assert s3.keys() == ["runs/study/.lock.json"]


def test_a_lost_lease_stops_what_is_sent(s3: Bucket, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_lease, "RENEWAL", 0.4)
    store = opened()
    with store.lock():
        before = s3.objects["runs/study/.lock.json"]
        for _ in range(100):
            if s3.objects["runs/study/.lock.json"] != before:
                break
            threading.Event().wait(0.05)
        assert json.loads(s3.objects["runs/study/.lock.json"])["owner"] == json.loads(before)["owner"]
        lease(s3, 0)
        put(store, a="a")
        store.push()  # nobody has looked yet
        threading.Event().wait(0.7)
        put(store, a="late")
        with pytest.raises(OutputError) as caught:
            store.push()
        one_line(caught, "this run no longer holds it", "another run took it, from host elsewhere", "run again")
        with pytest.raises(OutputError):
            store.remove(store.root / "a")
    assert s3.objects["runs/study/a"] == b"a"
    assert json.loads(s3.objects["runs/study/.lock.json"])["owner"] == "other"  # not released by who lost it


def test_a_lease_that_could_not_be_renewed_is_looked_at_first(
    s3: Bucket, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened()
    with store.lock():
        lease(s3, 0)  # taken while this machine slept
        monkeypatch.setattr(storage_lease, "SPAN", 0.0)
        put(store, a="a")
        with pytest.raises(OutputError, match="no longer holds it"):
            store.push()
    assert "runs/study/a" not in s3.objects


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("hf://datasets/a/b", "can only be read"),
        ("https://example.org/x", "can only be read"),
        ("nosuch://b/x", "no such filesystem here"),
        ("s3://", "names no bucket"),
        ("s3://b/../x", "holds '..'"),
        ("s3://b/x?region=eu", "holds '..', '?' or '#'"),
        ("simplecache::s3://b/x", "is no path and no address"),
        ("", "is no path and no address"),
        (f"s3://{SECRETS[0]}:{SECRETS[1]}@b/x", "holds a credential; leave it out of the address; set AWS_ACCESS"),
        (f"memory://b/x?token={SECRETS[1]}", "holds a credential"),
    ],
)
def test_addresses_that_are_none(out: str, words: str) -> None:
    for act in (open_store, lambda out, name: check_output(out, name, "t")):
        with pytest.raises(OutputError) as caught:
            act(out, "study")
        one_line(caught, "output: ", words)
    with pytest.raises(OutputError, match="no name of a folder"):
        open_store("/tmp", "../x")


def test_a_local_output_is_itself(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/runs", "study")
    assert (store.root, store.remote, store.address) == (tmp_path / "runs/study", False, str(tmp_path / "runs/study"))
    with store.lock():
        (store.root / "a").write_text("a")
        store.push()
        store.pull()
        store.drop({})
        assert store.present(store.root) == {store.root / "a", store.root / ".lock"}
        with (
            pytest.raises(OutputError, match="another run is writing there"),
            open_store(str(tmp_path / "runs"), "study").lock(),
        ):
            raise AssertionError
        store.remove(store.root / "a")
    assert not (store.root / "a").exists()


def test_nodes_that_see_the_same_output(s3: Bucket, tmp_path: Path) -> None:
    """Two disks with one path are told apart by what is seen there."""
    here, there = str(tmp_path / "disk-a/runs"), str(tmp_path / "disk-b/runs")
    for out, other, shared in ((here, here, True), (here, there, False), (OUT, OUT, True), (OUT, "s3://b/y", True)):
        if other == "s3://b/y":
            out, other, shared = OUT, "s3://shelf/elsewhere", False
        with left_probe(out, "study", "t0", "driver/0"):
            assert check_output(other, "study", "t0", "node 1") == ({"driver/0"} if shared else set())
            assert check_output(other, "study", "t1", "node 1") == set()
            assert seen_probes(out, "study", "t0") == {"driver/0"}
    assert not (tmp_path / "disk-a").exists()  # made for the check alone
    assert not (tmp_path / "disk-b").exists()
    assert s3.keys() == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        check_output(str(tmp_path / "file"), "study", "t0")
    s3.fault, s3.code = (lambda method, path: 403), "AccessDenied"
    with pytest.raises(OutputError) as caught:
        check_output(OUT, "study", "t0")
    one_line(caught, "access denied")


def test_mirrors_are_held_by_one_and_used_again(
    s3: Bucket, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = opened(scratch=tmp_path / "s"), opened(scratch=tmp_path / "s")
    assert one.root != two.root
    put(one, a="a", b="b")
    one.push()
    put(one, b="not sent", c="not sent", **{".d.tmp": "half"})
    one.close()
    again = opened(scratch=tmp_path / "s")
    assert again.root == one.root
    assert content(again) == {"a": b"a"}  # what an ended process had not sent may be out of date
    s3.seen.clear()
    again.pull()
    assert content(again) == {"a": b"a", "b": b"b"}
    assert s3.count("GET /shelf/runs/study/a") == 0

    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("CLIFFLAB_SCRATCH", raising=False)
    passing = open_store(OUT, "study")
    passing.pull()
    assert passing.root.is_relative_to(tmp_path / f"clifflab-{os.getuid()}")
    passing.close()
    assert list((tmp_path / f"clifflab-{os.getuid()}").iterdir()) == []
    monkeypatch.setenv("CLIFFLAB_SCRATCH", str(tmp_path / "kept"))
    assert open_store(OUT, "study").root.is_relative_to(tmp_path / "kept")
    monkeypatch.delenv("CLIFFLAB_SCRATCH")
    shutil.rmtree(tmp_path / f"clifflab-{os.getuid()}")
    (tmp_path / f"clifflab-{os.getuid()}").symlink_to(tmp_path / "kept")
    with pytest.raises(OutputError, match="is not this user's own folder"):
        open_store(OUT, "study")


def test_a_job_between_a_pull_and_a_push(s3: Bucket, opened: Open) -> None:
    one, other = opened(), opened()
    put(one, m__a="a", m__w__0="0", m__w__1="1", m__f="f")
    one.push()

    def work() -> str:
        put(other, m__a="A", m__new="n")
        shutil.rmtree(other.root / "m" / "w")
        return "done"

    reads = [other.root / "m"]
    assert mirror_job(other, reads, work) == "done"
    one.pull()
    assert content(one) == {"m/a": b"A", "m/new": b"n", "m/f": b"f"}

    def fail() -> None:
        put(other, m__a="half")
        raise OSError("no")

    put(other, **{"events.jsonl": "1\n"}, own="of the driver, where it does jobs itself")
    with pytest.raises(OSError, match="no"):
        mirror_job(other, reads, fail)
    assert mirror_job(other, reads, lambda: put(other, m__f="half"), lambda result: False) is None
    other.pull(reads)
    driver = {"events.jsonl": b"1\n", "own": b"of the driver, where it does jobs itself"}
    assert content(other) == content(one) | driver
    assert s3.objects["runs/study/m/a"] == b"A"


def test_unit_files_do_not_pile_up(s3: Bucket, opened: Open) -> None:
    store = opened()
    units = {name: store.root / ".work" / "m" / name for name in ("capture", "probe")}
    for number in range(3):
        mirror_job(store, [], lambda n=number: put(store, **{f".work__m__capture__{n}": "large", f"m__{n}": "x"}))
    assert {path for path in store.files() if units["capture"] in path.parents} == {units["capture"] / "2"}
    mirror_job(store, [units["capture"]], lambda: put(store, **{".work__m__probe__0": "p"}))
    assert {path.name for path in store.files() if units["capture"] in path.parents} == {"0", "1", "2"}
    put(store, **{".work__m__probe__1": "not sent"})
    store.let_go([])
    assert content(store) == {"m/0": b"x", "m/1": b"x", "m/2": b"x", ".work/m/probe/1": b"not sent"}
    assert len(store.present(store.root / ".work")) == 4


class Named(dict[Any, str]):
    def __missing__(self, key: Any) -> str:
        return f"{key[0]}-{key[1]}".ljust(16, "0")


def test_what_jobs_read() -> None:
    study = prepare(parse(repair_study(curve={"budgets": []})))
    root = Path("/out")
    context = Context(study, root, Identities(Named(), {}, []))

    def reads(step: str, model: str | None, unit: bool = True) -> set[str]:
        job = Job(step, model, Unit(step, model, "0") if unit else None)
        return {path.relative_to(root).as_posix() for path in reads_of(context, job)}

    own, repaired = "planted/", "planted-repaired/"
    assert reads("prompts", None) >= {"prompts.parquet", "corpus.parquet"}
    assert not any(path.startswith(own) for path in reads("prompts", None))
    traces = reads("traces", "planted")
    assert "planted/repair" not in traces
    assert not any(path.startswith((repaired, ".work")) for path in traces)
    assert ".work/planted/traces/traces-planted00" in reads("traces", "planted", unit=False)
    assert ".work/planted/capture/capture-planted0" in reads("probe", "planted")
    assert not any(path.startswith(".work") for path in reads("cliff", "planted"))
    assert {"planted/repair", "planted/traces.parquet"} <= reads("traces", "planted-repaired")
    assert {"planted/outcomes.parquet", "planted-repaired/outcomes.parquet"} <= reads("evaluate", "planted-repaired")
    assert {"planted/repair", ".work/planted/tune/tune-planted0000"} <= reads("tune", "planted")
    report = reads("report", None, unit=False)
    assert {"planted/cliffs.parquet", "planted-repaired/evaluation.json", "figures", "metrics.json"} <= report
    assert ".work/_study/report/report-None00000" in report


def test_a_study_in_a_bucket_is_the_one_on_a_disk(
    s3: Bucket, opened: Open, tmp_path: Path, existing_traces: Path
) -> None:
    """Merges and first units in fresh folders, as on machines of their own; then again, with nothing left to do."""
    written = {"name": "written", "path": str(existing_traces), "label": "harmful", "existing": True, "limit": 40}
    sets = [{**written, "columns": {"label": "label"}}]
    probe, cliff = {"min_examples": 6, **FEW}, {"bootstrap": 100}
    study = parse(small_study(prompts=sets, truncation={"traces": 2}, probe=probe, cliff=cliff))
    local = run(study, tmp_path / "runs", runtime="inline").root

    prepared, driver, workers = prepare(study), opened(name="small"), [opened(name="small") for _ in range(2)]
    held: dict[str, Any] = {}
    with driver.lock():
        driver.pull()
        context = identify(prepared, driver.root)
        files, todo = StudyFiles(context, driver), plan(context)
        files.begin(todo, set())
        for name, model in todo:
            files.open((name, model))
            jobs = [Job(name, model, unit) for unit in STEPS[name].plan(context, model)]
            for number, job in enumerate([*jobs, Job(name, model)]):
                # Of many units two workers do the most.
                fresh = number == 0 or job.unit is None
                store = opened(name="small") if fresh else workers[number % 2]
                worker = Worker(prepared, store, context.identities)
                worker.context._held = held  # the folder is fresh, not the model
                result = worker.do(job)
                assert result.error is None, result.error
            files.finish((name, model), result.counts)
        files.end([])

    last = opened(name="small")
    last.pull()
    found = content(last)
    wanted = {path.relative_to(local).as_posix(): path.read_bytes() for path in local.rglob("*") if path.is_file()}
    for own in (".lock", "events.jsonl", "status.json", "study.yaml", ".steps/hashes.json"):
        wanted.pop(own, None)
        found.pop(own, None)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert last.present(last.root / ".work") == set()

    again = run(study, OUT, runtime="inline")
    assert again.address == "s3://shelf/runs/small"
    assert [event["event"] for event in events(again.root) if event["event"] in ("unit", "merge", "step_start")] == []
    assert b"run_start" in s3.objects["runs/small/events.jsonl"]
    assert s3.objects["runs/small/metrics.json"] == wanted["metrics.json"]
