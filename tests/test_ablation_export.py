"""Checkpoints with heads scaled: the same as the hooked model, whole or absent, with a card that says what they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPTNeoXConfig

from clifflab.cli import cli as command
from clifflab.config import ModelSpec, TracesConfig
from clifflab.engines import Request, TransformersEngine
from clifflab.errors import ClifflabError, InputError, InterventionError, OutputError
from clifflab.models import export
from clifflab.models.export import export_ablated
from clifflab.models.heads import heads_of
from clifflab.models.intervene import HeadMeans, Intervention, intervene
from clifflab.models.loading import LoadedModel, load, resolve_path
from clifflab.organism.tokenizer import build_tokenizer
from tests.conftest import Cli

PLANTED = ((4, 2), (6, 2))
NO_FILES: dict[str, str] = {}


def describe(_about: dict[str, Any]) -> dict[str, str]:
    return NO_FILES


def logits(loaded: LoadedModel, heads: Any = (), gamma: float = 0.0) -> torch.Tensor:
    ids = torch.tensor([loaded.renderer.prompt_ids([{"role": "user", "content": "how do i bake a red cake"}])])
    with torch.inference_mode(), intervene(heads_of(loaded), [heads], Intervention(gamma)):
        out: torch.Tensor = loaded.model(ids).logits
    return out


def spec(path: Path | str) -> ModelSpec:
    return ModelSpec(name="m", path=str(path))


def greedy(loaded: LoadedModel, heads: Any) -> list[tuple[int, ...]]:
    prompts = ("how do i make a bomb", "pretend you are a pirate. how do i bake a cake")
    ids = [tuple(loaded.renderer.prompt_ids([{"role": "user", "content": text}])) for text in prompts]
    engine = TransformersEngine(loaded, heads_of(loaded))
    written = engine.generate([Request(row, 0, 48, 0, heads) for row in ids], TracesConfig(temperature=0.0))
    return [completion.ids for completion in written]


def random_checkpoint(folder: Path, config: Any) -> Path:
    tokenizer = build_tokenizer()
    config.update({"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 1})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)  # biases too
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_planted_model_without_its_heads(tmp_path: Path) -> None:
    out = tmp_path / "new" / "ablated"
    told: list[dict[str, Any]] = []

    def card(about: dict[str, Any]) -> dict[str, str]:
        told.append(about)
        return {"README.md": "card"}

    about = export_ablated(spec("organism:planted"), PLANTED, Intervention(), out, card)
    source, exported = load(spec("organism:planted")), load(spec(out))
    assert torch.equal(logits(exported), logits(source, PLANTED))
    assert not torch.equal(logits(exported), logits(source))
    assert greedy(exported, ()) == greedy(source, PLANTED)
    assert told == [about]
    assert about["check"]["largest_difference_of_logits"] == 0 < about["check"]["largest_change_of_logits"]
    plain = AutoModelForCausalLM.from_pretrained(out)  # no code of ours is needed
    changed = {name for name, p in plain.named_parameters() if not torch.equal(p, source.model.get_parameter(name))}
    assert changed == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer, _ in PLANTED}
    folder = Path(resolve_path(spec("organism:planted")))
    same = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in same)
    assert {file.name for file in out.iterdir()} == {*same, "README.md", "model.safetensors"}  # and no ground truth
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1
    assert [path.name for path in out.parent.iterdir()] == ["ablated"]
    assert AutoTokenizer.from_pretrained(out).chat_template


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=256),
        GPTNeoXConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=256,
        ),
    ],
    ids=["gpt2", "gpt_neox"],
)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_other_projections(tmp_path: Path, config: Any, gamma: float) -> None:
    """GPT-2 keeps its projection transposed; both have biases, which stay."""
    path = random_checkpoint(tmp_path / "source", config)
    chosen = ((0, 3), (1, 0), (1, 2))
    export_ablated(spec(path), chosen, Intervention(gamma), tmp_path / "out", describe)
    source, exported = load(spec(path)), load(spec(tmp_path / "out"))
    got, wanted = logits(exported), logits(source, chosen, gamma)
    assert torch.equal(got, wanted) if gamma == 0 else torch.allclose(got, wanted, atol=1e-4, rtol=1e-4)
    assert float((got - logits(source)).abs().max()) > 1e-2
    assert greedy(exported, ()) == greedy(source, chosen) or gamma


def test_half_precision_stays(tmp_path: Path) -> None:
    """The dtype is the checkpoint's own, not that of the machine."""
    source = load(spec("organism:planted"))
    source.model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    export.copy_files(Path(resolve_path(spec("organism:planted"))), tmp_path / "half")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    (tmp_path / "half" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    about = export_ablated(spec(tmp_path / "half"), PLANTED, Intervention(0.3), tmp_path / "out", describe)
    assert about["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_what_goes_wrong_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted, out = spec("organism:planted"), tmp_path / "out"

    def refused(error: type[ClifflabError], words: str, heads: Any = PLANTED, how: Any = None) -> None:
        with pytest.raises(error, match=words):
            export_ablated(planted, heads, how or Intervention(), out, describe)
        assert not list(tmp_path.iterdir())

    refused(InputError, "renormalised heads", how=Intervention(renormalise=True))
    refused(InputError, "replaced by their means", how=Intervention(means=HeadMeans((), ())))
    refused(InputError, "--heads: 99.0: the model has no such layer", [(99, 0)])
    refused(InputError, "--heads: 0.99: layer 0 has no such head", [(0, 99)])
    refused(InputError, "no head is named", [])
    monkeypatch.setattr(export, "scale", lambda heads, chosen, gamma: None)  # a change that never reached the weights
    refused(InterventionError, "differs from the hooked model")
    monkeypatch.undo()
    monkeypatch.setattr(export, "copy_files", lambda source, target: os.open("/nowhere/at/all", os.O_RDONLY))
    refused(OutputError, "cannot be written")


def test_bad_input_is_one_line(tmp_path: Path, ablated_run: Path) -> None:
    def line(*args: str) -> str:
        result = CliRunner().invoke(command, ["export", "ablated", *args, "--out", str(tmp_path / "out")])
        assert isinstance(result.exception, ClifflabError)
        assert result.exception.exit_code == 2
        return str(result.exception)

    run, planted = str(ablated_run), ("--checkpoint", "organism:planted")
    assert "needs either RUN or --checkpoint" in line()
    assert "needs either RUN or --checkpoint" in line(run, *planted)
    assert "--heads: (absent)" in line(*planted)
    assert "goes with a RUN" in line(*planted, "--fraction", "0.1")
    assert "both choose the heads" in line(run, "--heads", "4.2", "--fraction", "0.1")
    assert "is no list of heads" in line(run, "--heads", "4-2")
    assert "is no share of the heads" in line(run, "--fraction", "0")
    assert "--gamma: 1.0: is out of range" in line(run, "--gamma", "1")
    assert "is no finished run" in line(str(tmp_path))
    assert "the run has no such model; choose from planted" in line(run, "--model", "other")
    assert "the model has no such layer" in line(*planted, "--heads", "99.1")
    assert "no such shipped model" in line("--checkpoint", "organism:other", "--heads", "1.1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert "is not empty" in line(run)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_a_run_becomes_a_checkpoint(cli: Cli, ablated_run: Path, tmp_path: Path) -> None:
    """The command as users run it, and a card with the run's own figures."""
    done = cli("export", "ablated", str(ablated_run), "--out", "ablated")
    assert done.returncode == 0, done.stderr
    assert "4.2, 6.2 of 64, gamma 0" in done.stdout
    out = tmp_path / "ablated"
    data = json.loads((out / "clifflab.json").read_text())
    figures = json.loads((ablated_run / "planted" / "ablation.json").read_text())
    results = {(r["kind"], r["thinking"]): r for r in figures["sets"]["wrapped_strong"]["results"]}
    entry = next(e for e in data["measured"]["sets"]["wrapped_strong"] if e["thinking"] == "regenerated")
    assert entry["before"] == results["none", "regenerated"]
    assert entry["after"] == results["suppression", "regenerated"]
    manifest = json.loads((ablated_run / "manifest.json").read_text())
    assert data["run"]["fingerprints"]["heads"] == manifest["steps"]["planted/heads"]["fingerprint"]
    assert data["source"]["sha256"] == manifest["models"]["planted"]["sha256"]
    card = (out / "README.md").read_text()
    assert "| wrapped_strong | harmful | regenerated | 8 | 100% [" in card
    assert "Benign perplexity" in card
    assert data["source"]["sha256"] in card
    assert str(ablated_run) not in card + json.dumps(data)


def test_a_card_without_figures_says_so(ablated_run: Path, tmp_path: Path) -> None:
    def export_to(name: str, *args: str) -> tuple[dict[str, Any], str]:
        out = tmp_path / name
        result = CliRunner().invoke(command, ["export", "ablated", *args, "--out", str(out)], catch_exceptions=False)
        assert result.exit_code == 0
        return json.loads((out / "clifflab.json").read_text()), (out / "README.md").read_text()

    data, card = export_to("by_hand", "--checkpoint", "organism:planted", "--heads", "6.2,4.2,6.2", "--gamma", "0.25")
    assert (data["heads"], data["gamma"], data["run"], data["measured"]) == (["4.2", "6.2"], 0.25, None, None)
    assert "There is no run: nothing is known" in card
    data, card = export_to("other_gamma", str(ablated_run), "--gamma", "0.5")
    assert data["measured"] is None  # the run measured removal
    assert "did not generate with exactly these heads and this factor" in card
    data, _ = export_to("same_heads", str(ablated_run), "--heads", "4.2,6.2")
    assert data["measured"]["fraction"] == 0.03
