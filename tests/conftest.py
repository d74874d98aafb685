"""Fixtures: tiny random checkpoints of several architectures, and the command line as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forkserver import READ_AT_IMPORT, Server

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As in a study's workers: results are compared bit by bit, and threads that wait for each other cost time.
os.environ["OMP_NUM_THREADS"] = "1"

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "phi3")


# Words of file names (test_ray_crash.py) whose tests share one process where there are several: Ray keeps all cores
# busy by itself, and some of its tests kill workers; the tests of ablation and of its export share a study.
TOGETHER = ("ray", "ablation")
LONG = (*TOGETHER, "report", "sceptic", "study")  # begun early, so that no process ends long after the others


def words_of(file: str) -> list[str]:
    return Path(file).stem.split("_")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes (``-n 2``) all tests of a file share one, and with it the studies that fixtures run."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return next((word for word in TOGETHER if word in words_of(file)), file)

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first."""
    items.sort(key=lambda item: next((i for i, w in enumerate(LONG) if w in words_of(item.path.name)), len(LONG)))


def tiny_config(architecture: str, vocab: int) -> Any:
    """A config of a few thousand parameters, with grouped queries and a head size of its own where there is one."""
    from transformers import LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if architecture == "mistral":  # the window is shorter than the traces
        return MistralConfig(**common, sliding_window=24, head_dim=8)
    if architecture == "qwen3":
        return Qwen3Config(**common, head_dim=16)
    if architecture == "llama":
        return LlamaConfig(**common, head_dim=16)
    return {"qwen2": Qwen2Config, "phi3": Phi3Config}[architecture](**common)


def make_checkpoint(folder: Path, architecture: str, seed: int = 0) -> Path:
    """A random model with the planted language's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from clifflab.organism.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    config = tiny_config(architecture, len(tokenizer))
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny checkpoint an architecture."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(root / name, name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def existing_traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 written traces of the planted language, with labels and groups."""
    from clifflab.organism.corpus import corpus_rows

    path = tmp_path_factory.mktemp("corpus") / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in corpus_rows(200, seed=5)))
    return path


@pytest.fixture(scope="session")
def guards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Guards that find the word bomb harmful (and sorry a refusal), and a template file."""
    from tests.guards import CHAT_TEMPLATE, FILE_TEMPLATE, LLAMA_GUARD, PARTS_TEMPLATE, WILDGUARD, make_guard

    root = tmp_path_factory.mktemp("guards")
    (root / "guard.jinja").write_text(FILE_TEMPLATE)
    return {
        "llama": make_guard(root / "llama", LLAMA_GUARD, CHAT_TEMPLATE),
        "parts": make_guard(root / "parts", LLAMA_GUARD, PARTS_TEMPLATE),
        "wild": make_guard(root / "wild", WILDGUARD),
        "template": root / "guard.jinja",
    }


Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def forkserver() -> Iterator[Server]:
    """Begins commands without the seconds that their imports take."""
    server = Server()
    yield server
    server.close()


@pytest.fixture
def cli(tmp_path: Path, forkserver: Server) -> Cli:
    """``clifflab ARGS`` in a process of its own, in an empty folder; ``fresh``: in an interpreter of its own, too."""

    def call(*args: str, timeout: float = 300, fresh: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
        command, given = [sys.executable, "-m", "clifflab", *args], {**os.environ, **env}
        late = {name for name in env if name.startswith(READ_AT_IMPORT) and env[name] != os.environ.get(name)}
        if fresh or late:
            return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=tmp_path, env=given)
        running = forkserver.start(args, tmp_path, given)
        out, err = running.communicate(timeout)
        return subprocess.CompletedProcess(command, running.wait(), out, err)

    return call


@pytest.fixture(scope="session")
def ablated_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of the planted model whose heads were searched and removed."""
    from clifflab.runtime.study import run
    from tests.studies import ablation_study, parse

    return run(parse(ablation_study()), tmp_path_factory.mktemp("ablated"), runtime="inline").root
