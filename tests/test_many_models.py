"""Studies over many models: their checkpoints, sweeps, resources, damage, and names that mean harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from clifflab.config import ModelSpec
from clifflab.errors import ConfigError, InputError
from clifflab.models.loading import load
from clifflab.studyfile import dump_study, load_study, parse_study
from tests.strengths import STRENGTHS, broken, checkpoints, nan
from tests.studies import small_study


def test_strengths_are_the_planted_model_with_quieter_heads(tmp_path: Path) -> None:
    folders = checkpoints(tmp_path)
    assert list(folders) == list(STRENGTHS)
    assert len(folders) == 6
    weights = {}
    for name in ("full", "weak", "none"):
        found = load(ModelSpec(name=name, path=str(folders[name])))
        weights[name] = found.model.state_dict()
    own = load(ModelSpec(name="planted", path="organism:planted")).model.state_dict()
    assert all(torch.equal(tensor, weights["full"][key]) for key, tensor in own.items())
    changed = [key for key, tensor in own.items() if not torch.equal(tensor, weights["none"][key])]
    assert changed == [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (4, 6)]
    for key in changed:
        columns = (own[key] != weights["none"][key]).any(0).nonzero().flatten()
        assert torch.equal(weights["weak"][key][:, columns], own[key][:, columns] * STRENGTHS["weak"])
        assert not weights["none"][key][:, columns].any()


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        load(ModelSpec(name="broken", path=str(broken(tmp_path / "broken"))))
    with pytest.raises(InputError, match="not finite"):
        load(ModelSpec(name="nan", path=str(nan(tmp_path / "nan"))))


def models_of(*entries: Any) -> list[dict[str, Any]]:
    study = parse_study(small_study(models=list(entries)))
    return [{k: v for k, v in model.model_dump().items() if v is not None} for model in study.models]


def test_sweeps_over_sizes_revisions_and_adapters(tmp_path: Path) -> None:
    plain = {"name": "planted", "path": "organism:planted", "system": "Braces {stay} without a sweep."}
    sizes = {"name": "q{size}-x", "path": "Qwen/Qwen3-{size}", "gpus": 0.5, "sweep": {"size": ["0.6B", "1.7B", 4]}}
    steps = {
        "name": "olmo",
        "path": "allenai/{kind}",
        "revision": "{step}",
        "system": "Answer in {{json}}, {kind}.",
        "dtype": "{dtype}",
        "sweep": {"kind": ["OLMo/2", "B"], "step": ["main", "step 100"], "dtype": ["bfloat16"]},
    }
    found = models_of(plain, sizes, steps)
    assert [model["name"] for model in found] == [
        "planted", "q0.6B-x", "q1.7B-x", "q4-x", "olmo-OLMo-2-main-bfloat16", "olmo-OLMo-2-step-100-bfloat16",
        "olmo-B-main-bfloat16", "olmo-B-step-100-bfloat16",
    ]  # fmt: skip
    assert found[0]["system"] == plain["system"]
    assert [model["path"] for model in found[1:4]] == ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-4"]
    assert {model["gpus"] for model in found[1:4]} == {0.5}
    assert found[5] | {"name": ""} == {
        **found[0], "name": "", "path": "allenai/OLMo/2", "revision": "step 100", "dtype": "bfloat16",
        "system": "Answer in {json}, OLMo/2.",
    }  # fmt: skip
    # A single entry, a value that refers to another entry, overrides before, and the written file after.
    pairs = {"name": "after-{n}", "path": "organism:planted", "adapter": "{n}", "before": "base-{n}"}
    base = {"name": "base-{n}", "path": "{n}", "sweep": {"n": ["one", "two"]}}
    assert [model.get("before") for model in models_of(base, {**pairs, "sweep": {"n": ["one", "two"]}})] == [
        None, None, "base-one", "base-two",
    ]  # fmt: skip
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(small_study(models=base)))
    study = load_study(file, ("models.sweep.n=[two, one, three]",))
    assert [model.path for model in study.models] == [str(tmp_path / "two"), str(tmp_path / "one"), "three"]
    file.write_text(yaml.safe_dump(small_study(models=[base])))
    study = load_study(file, ("models.0.path=other-{n}", "models.0.name=m"))
    assert [(model.name, model.path) for model in study.models] == [("m-one", "other-one"), ("m-two", "other-two")]
    written = yaml.safe_load(dump_study(study))
    assert [model["name"] for model in written["models"]] == ["m-one", "m-two"]
    assert parse_study(written) == study


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"path": "a/{siz}"}, "models.0.path: no key 'siz' in sweep; it has size"),
        ({"path": "a/b"}, "nothing but the name mentions {size}"),
        ({"path": "a/{size}", "sweep": {"size": []}}, "models.0.sweep.size: is no list of values, or an empty one"),
        ({"path": "a/{size}", "sweep": {"size": "1B"}}, "models.0.sweep.size: is no list of values"),
        ({"path": "a/{size}", "sweep": {}}, "models.0.sweep: give keys with lists"),
        ({"path": "a/{size}", "sweep": ["1B"]}, "models.0.sweep: give keys with lists"),
        ({"path": "a/{size}", "sweep": {"size": [["1B"]]}}, "neither text nor a number"),
        ({"path": "a/{size}", "sweep": {"size": [True]}}, "neither text nor a number"),
        ({"path": "a/{size}", "sweep": {"size": ["a", "a"]}}, "'a' stands there twice"),
        ({"path": "a/{size}", "sweep": {"size": ["a/b", "a-b"]}}, "the name 'm-a-b' is used twice"),
        ({"path": "a/{size}", "sweep": {"size": ["a", "A"]}}, "'m-a' and 'm-A' differ only by case"),
        ({"path": "a/{size}", "sweep": {"size": ["x" * 90]}}, "models.0.name"),
        ({"path": "a/{size}", "sweep": {"0": [1]}}, "is no key"),
        ({"path": "a/{size}", "sweep": {"size": list(range(1001))}}, "makes 1,001 models"),
        ({"path": "a/{size}", "name": None}, "models.0.name"),
    ],
)
def test_sweeps_that_cannot_be(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        models_of({"name": "m", "path": "p", "sweep": {"size": ["1B"]}, **change})
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
