"""Studies over many models: their checkpoints, sweeps, resources, damage, and names that mean harm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from clifflab.artifacts import file_hash, read_parquet, refuse_links
from clifflab.config import ModelSpec
from clifflab.errors import ClifflabError, ConfigError, InputError, OutputError, shorten
from clifflab.models.fit import FIXED_MB, ROOM, gpus_needed, weight_bytes
from clifflab.models.loading import load, model_identity, resolve_spec
from clifflab.models.placing import check_place, device_map
from clifflab.models.sizes import model_sizes
from clifflab.organism import planted_path
from clifflab.runtime.prepare import check_format
from clifflab.runtime.study import run
from clifflab.stages import STEPS
from clifflab.stages.base import Layout
from clifflab.studyfile import dump_study, load_study, parse_study
from tests.ggufs import tiny_model, write_gguf
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


Damage = Callable[[Path], object]


def changed_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def changed_config(**settings: Any) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))

    return damage


def index_of(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))

    return damage


UP = "model.layers.2.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "a pointer": (lambda folder: (folder / "model.safetensors").write_bytes(b"version https://git-lfs"), "header"),
    "a missing shard": (index_of("model-1.safetensors"), "model-1.safetensors"),
    "a missing weight": (changed_weights(lambda t: t.pop(UP)), f"its files hold no {UP}"),
    "a short weight": (changed_weights(lambda t: t.update({UP: t[UP][:8].clone()})), "other sizes than its config"),
    "nan in the norm": (changed_weights(lambda t: t["model.norm.weight"].fill_(torch.nan)), "not finite (model.norm"),
    "inf in the head": (changed_weights(lambda t: t["lm_head.weight"][5].fill_(torch.inf)), "not finite (lm_head"),
    "more layers": (changed_config(num_hidden_layers=9), "its files hold no model.layers.8"),
    "no number": (changed_config(hidden_size="x"), "hidden_size"),
    "zero heads": (changed_config(num_attention_heads=0), "cannot be loaded"),
    "an unknown kind": (changed_config(model_type="nonsense"), "nonsense"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be loaded"),
    "a torn tokenizer": (lambda folder: (folder / "tokenizer.json").write_bytes(b'{"a'), "cannot be loaded"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "a torn config": (lambda folder: (folder / "config.json").write_bytes(b"{"), "not a valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_one_line(damage: str, tmp_path: Path) -> None:
    """Whatever looks at them, the driver before the first unit or a worker that loads, and however they are damaged."""
    folder = shutil.copytree(planted_path(), tmp_path / "model")
    change, problem = DAMAGES[damage]
    change(folder)
    spec = ModelSpec(name="damaged", path=str(folder))
    with pytest.raises(InputError) as caught:
        load(spec)
    assert problem in str(caught.value)
    assert str(caught.value).startswith(f"models.path: {shorten(folder)}: ")
    assert "\n" not in str(caught.value)
    looks: list[Callable[[], object]] = [
        lambda: resolve_spec(spec),
        lambda: model_identity(spec, file_hash),
        lambda: check_format(0, spec),
        lambda: model_sizes(spec),
        lambda: gpus_needed(spec, 24_000, 1),
    ]
    for look in looks:
        with suppress(ClifflabError):
            look()


def test_strange_checkpoints_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        load(ModelSpec(name="broken", path=str(broken(tmp_path / "broken"))))
    with pytest.raises(InputError, match=r"not finite \(model.layers.0.mlp.down_proj.weight\)"):
        load(ModelSpec(name="nan", path=str(nan(tmp_path / "nan"))))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 12")]
)
def test_what_does_not_fit_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(InputError, match=r"does not fit into .*memory.* \(0\.0 GB of weights as"):
        load(ModelSpec(name="a", path="organism:planted"))


def of_size(folder: Path, shards: list[dict[str, tuple[str, list[int]]]]) -> ModelSpec:
    """A checkpoint of headers alone: its weights are said to be there."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = [f"model-{number}.safetensors" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        about = {key: {"dtype": kind, "shape": shape, "data_offsets": [0, 0]} for key, (kind, shape) in shard.items()}
        header = json.dumps({"__metadata__": {"format": "pt"}, **about}).encode()
        (folder / name).write_bytes(len(header).to_bytes(8, "little") + header)
    index = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "consolidated.safetensors").write_bytes(b"the same weights again, which nothing loads")
    return ModelSpec(name="m", path=str(folder))


def test_gpus_follow_the_weights(tmp_path: Path) -> None:
    own = ModelSpec(name="planted", path="organism:planted", dtype="float32")
    parameters = sum(weight.numel() for weight in load(own).model.parameters())
    assert weight_bytes(own) == 4 * parameters
    assert weight_bytes(own.model_copy(update={"dtype": "auto"})) == 2 * parameters
    # 70 thousand million weights, stored as float32 in two files, and a billion bytes that stay as they are.
    big = of_size(
        tmp_path / "big", [{"a": ("F32", [35_000, 10**6])}, {"b": ("BF16", [35, 10**9]), "c": ("U8", [10**9])}]
    )
    assert weight_bytes(big) == 141 * 10**9
    whole = 141e9 * ROOM / (1 << 20)
    for memory in (24_564, 81_559, 143_771):
        needed = gpus_needed(big, memory)
        assert needed * (memory - FIXED_MB) >= whole > (needed - 1) * (memory - FIXED_MB)
    assert gpus_needed(big, 81_559) == 3
    assert gpus_needed(big, None) == 1
    assert gpus_needed(own, 81_559) == gpus_needed(own, 1_000) == 1
    assert gpus_needed(big.model_copy(update={"gpus": 0.25}), 81_559, 0) == 0.25
    assert gpus_needed(big, 81_559, 4) == 3
    with pytest.raises(
        InputError, match=r"is too big: 141.0 GB of weights need 3 GPUs, and the machine with .* has 2;"
    ):
        gpus_needed(big, 81_559, 2)
    with pytest.raises(InputError, match=r"models.gpus: m: 4: GPUs of one machine, and the machine with .* has 2;"):
        gpus_needed(big.model_copy(update={"gpus": 4.0}), 81_559, 2)
    for unknown in ("no-such/model-on-the-hub", str(broken(tmp_path / "broken") / "none"), "organism:nothing"):
        assert gpus_needed(ModelSpec(name="m", path=unknown), 81_559, 1) == 1
    (tmp_path / "big" / "model.safetensors.index.json").write_text("[]")
    assert gpus_needed(big, 81_559) == 1


def test_gpus_of_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = tiny_model()
    spec = ModelSpec(name="m", path=str(write_gguf(tmp_path / "m.gguf", model, quantised=True)), dtype="bfloat16")
    assert weight_bytes(spec) == 2 * sum(weight.numel() for weight in model.parameters())


def test_only_what_one_gpu_cannot_hold_is_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = of_size(tmp_path / "big", [{"a": ("BF16", [50, 10**9])}])
    assert device_map(big) == {}  # no GPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda index: SimpleNamespace(total_memory=(80 if index else 79) << 30)
    )
    spread = device_map(big)
    assert spread["device_map"] == "balanced"
    assert list(spread["max_memory"]) == [0, 1]
    assert 70 << 30 < spread["max_memory"][0] < 79 << 30
    assert list(device_map(big.model_copy(update={"gpus": 3.0}))["max_memory"]) == [0, 1, 2]
    assert device_map(big.model_copy(update={"gpus": 0.5})) == {}
    assert device_map(ModelSpec(name="p", path="organism:planted")) == {}
    for places in ({"a": 0, "b": "cpu"}, {"a": 0, "b": 1, "c": "disk"}, {"a": "disk"}):
        with pytest.raises(
            InputError, match=r"does not fit into the memory of 4 GPU\(s\) \(100.0 GB of weights as auto\)"
        ):
            check_place(SimpleNamespace(hf_device_map=places), big)
    check_place(SimpleNamespace(hf_device_map={"a": 0, "b": 1}), big)


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


def test_no_model_takes_a_name_of_the_studys_own(tmp_path: Path) -> None:
    """Every file and folder that a study makes in its results, those of its models apart, is refused as a name."""
    study = parse_study({**small_study(), "judge": {"guard": {"path": "organism:planted"}}})
    layout = Layout(tmp_path)
    own = {
        path.relative_to(tmp_path).parts[0]
        for step in STEPS.values()
        if not step.per_model
        for path in step.outputs(layout, None)
    }
    own |= {"study.yaml", "manifest.json", "events.jsonl", "metrics.json", "status.json", ".work", ".steps", ".lock"}
    own |= {"_study", "hashes.json", "index.json", *(f"{name}.json" for name in STEPS)}
    assert {"prompts.parquet", "clusters.parquet", "report.html", "figures"} <= own
    assert study.models[0].name == "planted"
    for name in sorted(own | {name.upper() for name in own}):
        with pytest.raises(ConfigError, match=r"models\.0\.name: "):
            models_of({"name": name, "path": "organism:planted"})
    for name in ("..", ".", "", "../up", "a/b", "/etc", "a\\b", "a\n", "a b", "é", "-a", "a\0", "x" * 81, "~", "$HOME"):
        for place in ({"models": [{"name": name, "path": "p"}]}, {"name": name}):
            with pytest.raises(ConfigError):
                parse_study({**small_study(), **place})
        sets = [*small_study()["prompts"], {"name": name, "path": "p", "label": "harmful"}]
        with pytest.raises(ConfigError, match=r"prompts\.3\.name: "):
            parse_study(small_study(prompts=sets))
        with pytest.raises(ConfigError, match=r"repair\.corpus\.0\.name: "):
            parse_study(small_study(repair={"corpus": [{"name": name, "path": "p", "label": "unlabelled"}]}))
    for path in ("x" * 300, "a/" * 3000, "a\0b", "~no-such-user/x"):
        for model in ({"path": path}, {"path": "p", "adapter": path}):
            with pytest.raises(ConfigError, match=r"models\.0\.(path|adapter): "):
                models_of({"name": "m", **model})
    names = ["Llama-3.1-8B", "a", "q4_k.gguf", "x" * 80]
    assert [model["name"] for model in models_of(*({"name": name, "path": "p"} for name in names))] == names
    with pytest.raises(ConfigError, match="'Qwen' and 'qwen' differ only by case"):
        models_of({"name": "Qwen", "path": "p"}, {"name": "qwen", "path": "p"})


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    root, out = tmp_path / "runs" / "study", tmp_path / "out"
    (root / "model" / "figures").mkdir(parents=True)
    out.mkdir()
    refuse_links(root)
    refuse_links(tmp_path / "absent")
    (root / "inside").symlink_to(root / "model")
    (root / "model" / "up").symlink_to("../model/figures")
    (tmp_path / "link").symlink_to(root)
    refuse_links(root)
    refuse_links(tmp_path / "link")
    for place, target in (
        ("model/figures/x", out),
        ("events.jsonl", out / "none"),
        (".work", "../.."),
        ("a", "/proc/self"),
    ):
        (root / place).symlink_to(target)
        with pytest.raises(OutputError, match="is a link that leads out of the results"):
            refuse_links(root)
        (root / place).unlink()
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(OutputError, match="loop: is a link"):
        refuse_links(root)


HOSTILE = (
    "../../up",
    "/etc/passwd",
    "..",
    "a/../../b",
    "a\\..\\b",
    "x\n../y",
    "%2e%2e/z",
    "~/.ssh/id",
    "$(touch z)",
    "con",
    "é/\u202e",
)
WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.copyfile"}


def test_names_in_rows_become_no_files(existing_traces: Path, tmp_path: Path) -> None:
    """Ids, groups, categories and pools that look like paths: nothing is written outside of the results."""
    rows = [json.loads(line) for line in existing_traces.read_text().splitlines()][:96]
    for number, row in enumerate(rows):
        name = HOSTILE[number % len(HOSTILE)]
        row |= {"id": f"{name}{number}", "group": f"{name}{number // 2}", "category": name}
    data = tmp_path / "in" / "rows.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [{"name": "given", "path": str(data), "label": "harmful", "existing": True, "columns": {"label": "label"}}]
    study = small_study(
        prompts=sets, truncation={"traces": 0}, repair={"evaluate": {"pools": {pool: ["given"] for pool in HOSTILE}}}
    )
    out, written, on = tmp_path / "out", set[str](), [True]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if on and (opened or event in WRITES):
            written.update(str(path) for path in args[: 2 if event == "os.rename" else 1])

    sys.addaudithook(hook)
    try:
        root = run(parse_study(study), out, runtime="inline").root
    finally:
        on.clear()
    assert set(read_parquet(root / "prompts.parquet")["category"].to_pylist()) == set(HOSTILE)
    # A bare name is one in a folder that is being emptied; drawing keeps a cache of fonts.
    places = {path for path in written if "/" in path and "matplotlib" not in path}
    assert len(places) > 50
    assert not [path for path in places if not os.path.realpath(path).startswith(f"{out}/") and path != str(out)]


def test_blocks_on_several_devices() -> None:
    """Captures, sweeps, lens, generation and scoring follow the states over devices, to the same numbers."""
    command = [sys.executable, "-m", "tests.several_devices", "mistral"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count(": ok (") == 10
