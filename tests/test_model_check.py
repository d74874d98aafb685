"""``clifflab model check``: what it says of good models, and that each check fails on a model made to fail it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from clifflab.cli import cli as group
from clifflab.config import ModelSpec
from clifflab.errors import InputError
from clifflab.findings import Finding, has_problem, visible
from clifflab.models import LoadedModel, load
from clifflab.models.check import check_model
from tests.conftest import ARCHITECTURES, Cli, tiny_config
from tests.families import CHATML_TOKENS, PLAIN, build, family_tokenizer
from tests.test_bad_input import one_line


def family_checkpoint(folder: Path, tokenizer: Any, **config: Any) -> Path:
    """A tiny random model with a tokenizer of the test's choice."""
    from transformers import AutoModelForCausalLM

    settings = tiny_config("llama", len(tokenizer))
    settings.pad_token_id, settings.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings)
    for key, value in config.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def inside(*args: str) -> Any:
    """The command in this process: importing torch and transformers anew takes most of a subprocess's time."""
    return CliRunner().invoke(group, args)


def found(loaded: LoadedModel) -> dict[str, Finding]:
    findings = check_model(loaded)
    assert len(findings) == 13, "every check ran"
    return {finding.name: finding for finding in findings}


@pytest.fixture
def loaded(checkpoints: dict[str, Path]) -> LoadedModel:
    return load(ModelSpec(name="m", path=str(checkpoints["llama"])))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_architectures_pass(checkpoints: dict[str, Path], architecture: str, dtype: str) -> None:
    rows = found(load(ModelSpec.model_validate({"name": "m", "path": str(checkpoints[architecture]), "dtype": dtype})))
    assert not has_problem(list(rows.values())), rows
    head_dim = {"llama": 16, "qwen3": 16}.get(architecture, 8)
    assert rows["attention"].data == {"heads": 4, "kv_heads": 2, "head_dim": head_dim}
    assert rows["architecture"].data["layers"] == 3
    assert rows["heads"].status == "ok"
    assert (rows["heads"].data["heads"], rows["heads"].data["size"]) == (12, [head_dim])
    assert dtype in rows["size"].detail
    for name in ("hooks", "capture", "padding", "output head"):
        assert rows[name].status == "ok"
    assert "last layer through the final norm" in rows["hooks"].detail


def test_the_shipped_model(cli: Cli) -> None:
    done = cli("model", "check", "organism:planted", fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in (
        "LlamaForCausalLM (llama): 8 layers, width 128",
        "8 query heads, 8 key/value heads, head size 32",
        "64: 8 layers of 8, each 32 wide where o_proj reads it",
        "1,903,744 parameters, float32",
        "r1: read off the chat template; the chat template opens '<think>'",
        "8 '</think>'  9 '\\n\\n'",
        "no problems, 1 warning",  # a word-level vocabulary cannot hold code
    ):
        assert words in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("name", "form", "closing"),
    [
        ("gpt-oss", "auto", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        ("qwen3", "auto", "</think>\n\n"),
        ("s1", "s1", "<|im_start|>answer\n"),
        ("phi4-mini-reasoning", "phi4-mini-reasoning", "</think>\n\n"),
    ],
)
def test_closing_tokens_and_rendering_of_families(tmp_path: Path, name: str, form: str, closing: str) -> None:
    folder = str(family_checkpoint(tmp_path / "m", family_tokenizer(name, "pieces")))
    done = inside("model", "check", folder, "--format", form, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    rows = {row["name"]: row for row in answer["findings"]}
    assert answer["ok"] is True
    assert answer["model"] == folder
    assert "".join(rows["closing tokens"]["data"]["tokens"]) == closing
    assert rows["closing tokens"]["data"]["ids"] == family_tokenizer(name, "pieces")(closing)["input_ids"]
    assert rows["rendering"]["status"] == "ok"
    assert rows["thinking format"]["data"].get("given", False) == (form != "auto")


def test_a_model_without_thinking(tmp_path: Path) -> None:
    folder = family_checkpoint(tmp_path / "m", build(PLAIN, CHATML_TOKENS, "pieces", 400))
    done = inside("model", "check", str(folder), "--format", "none")
    assert done.exit_code == 0, done.output
    assert "the final position is the prompt's last token" in done.stdout


def test_heads_that_cannot_be_removed_are_a_warning(loaded: LoadedModel) -> None:
    """All else of such a model can be measured."""
    loaded.blocks[1].self_attn.second = nn.ModuleDict({"o_proj": nn.Linear(8, 8)})
    row = found(loaded)["heads"]
    assert row.status == "warning"
    assert "block 1 has 2 attention output projections" in row.detail
    assert "heads.traces" in row.remedy


def test_a_failed_check_ends_with_2_after_the_others_ran(cli: Cli, tmp_path: Path) -> None:
    tokenizer = family_tokenizer("gpt-oss")
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    family_checkpoint(tmp_path / "m", tokenizer, eos_token_id=stops)
    done = cli("model", "check", "m")
    assert done.returncode == 2
    assert "problem stop tokens" in done.stdout
    assert "-> take it out of eos_token_id in generation_config.json" in done.stdout
    assert "ok      output head" in done.stdout
    assert "1 problem," in done.stdout
    assert "Traceback" not in done.stderr


def test_what_cannot_be_loaded_is_one_line(cli: Cli, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    one_line(cli("model", "check", "/no/model"), "/no/model", "no such folder", "give a checkpoint folder")
    for args, words in (
        (("nobody/nothing",), "check the hub id, the network and the login"),
        ((" ",), "is empty"),
        (("organism:planted", "--format", "r9"), "--format: r9: unknown thinking format; choose auto, r1"),
        (("organism:planted", "--format", "gpt-oss"), "set it to r1"),
    ):
        error = inside("model", "check", *args).exception
        assert isinstance(error, InputError)
        assert words in str(error)
    family_checkpoint(tmp_path / "unknown", build(PLAIN, CHATML_TOKENS, "pieces", 400))
    one_line(cli("model", "check", "unknown"), "no thinking marker", "set the model's thinking_format: none if")
    family_checkpoint(tmp_path / "bare", build(None, CHATML_TOKENS, "pieces", 400))
    one_line(cli("model", "check", "bare"), "no chat template", "use a chat or reasoning checkpoint")
    nan = family_checkpoint(tmp_path / "nan", family_tokenizer("qwen3")) / "model.safetensors"
    weights = load_file(nan)
    weights["model.layers.1.mlp.down_proj.weight"].fill_(torch.nan)
    save_file(weights, nan, metadata={"format": "pt"})
    one_line(cli("model", "check", "nan"), "not finite", "get the checkpoint again")


def noise(loaded: LoadedModel) -> None:
    """Outputs that change from pass to pass, as with dropout left on."""
    loaded.blocks[1].register_forward_hook(lambda m, i, out: out + torch.randn_like(out))


def no_mask(loaded: LoadedModel) -> None:
    """A model that looks at its padding."""
    forward = loaded.body.forward
    loaded.body.forward = lambda attention_mask=None, position_ids=None, **rest: forward(**rest)  # type: ignore[method-assign]


def other_head(loaded: LoadedModel) -> None:
    """An output embedding that is not what makes the logits."""
    head = nn.Linear(loaded.d_model, loaded.model.config.vocab_size, bias=False)
    loaded.model.get_output_embeddings = lambda: head


def not_a_number(loaded: LoadedModel) -> None:
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(torch.nan)


def forgetful(loaded: LoadedModel) -> None:
    """A renderer that loses the last letter."""
    texts = loaded.renderer.texts
    loaded.renderer.texts = lambda ids, spans: (texts(ids, spans)[0][:-1], texts(ids, spans)[1])  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("sabotage", "names"),
    [
        (noise, {"capture", "padding", "output head", "hooks"}),
        (no_mask, {"padding"}),
        (other_head, {"output head"}),
        (not_a_number, {"capture", "output head", "greedy answer"}),
    ],
)
def test_every_check_can_fail(loaded: LoadedModel, sabotage: Callable[[LoadedModel], None], names: set[str]) -> None:
    sabotage(loaded)
    rows = found(loaded)
    assert {name for name, row in rows.items() if row.status == "problem"} == names
    assert all(rows[name].remedy for name in names)


def test_rendering_that_loses_text(tmp_path: Path) -> None:
    loaded = load(ModelSpec(name="m", path=str(family_checkpoint(tmp_path / "m", family_tokenizer("qwen3")))))
    assert found(loaded)["rendering"].status == "ok"
    forgetful(loaded)
    assert found(loaded)["rendering"].status == "problem"


def test_control_characters_of_a_model_do_not_reach_the_terminal(tmp_path: Path) -> None:
    assert visible("a\x1b[31m\u202eb\nc") == "a\\x1b[31m\\u202eb\\nc"
    tokenizer = build(PLAIN, ("\x1b]0;evil\x07", *CHATML_TOKENS), "pieces", 400)
    tokenizer.eos_token = "\x1b]0;evil\x07"
    done = inside("model", "check", str(family_checkpoint(tmp_path / "m", tokenizer)), "--format", "none")
    assert done.exit_code == 0, done.output
    assert "evil" in done.stdout
    assert "\x1b" not in done.stdout
