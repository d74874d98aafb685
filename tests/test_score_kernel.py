"""The scoring kernel equals the plain way, packed and padded, and leaves no trace in the model."""

from __future__ import annotations

import json
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file, save_file

from clifflab import tables
from clifflab.artifacts import file_hash
from clifflab.errors import InputError
from clifflab.models.loading import LoadedModel
from clifflab.scoring.kernel import Kernel
from clifflab.scoring.measures import Found
from clifflab.scoring.packed import PackedAttention, configs_of
from clifflab.scoring.plain import plain_logits, score_plain
from clifflab.scoring.probes import Probe, ProbeFile, ProbeSet, check_probes, load_probes
from clifflab.scoring.table import inputs_of, scored_table
from clifflab.scoring.trial import TOLERANCE, find_ways, length_borders
from clifflab.stages.corpus_cliff import cliff_rows
from clifflab.text.spans import Spans
from tests.test_sweeps import ARCHITECTURES, GQA, tiny

WINDOW = (0.5, 0.9)
SPANS = ("prefix_end", "thinking_start", "closing_start", "response_start")
# Prefix, thinking, closing and response tokens: empty windows, no thinking, no closing tokens, equal lengths.
SHAPES = ((9, 20, 4, 3), (5, 26, 2, 0), (5, 1, 2, 6), (4, 0, 3, 2), (6, 0, 0, 4), (1, 2, 1, 1), (9, 20, 4, 1),
          (3, 40, 1, 2), (8, 21, 4, 3), (1, 0, 0, 1))  # fmt: skip


def traces(shapes: Any = SHAPES, seed: int = 0) -> tuple[list[list[int]], list[Spans]]:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(1, 97, sum(shape)).tolist() for shape in shapes]
    spans = []
    for prefix, thinking, closing, response in shapes:
        borders = np.cumsum([prefix, thinking, closing, response]).tolist()
        spans.append(Spans(prefix, *borders, closed=True))
    return ids, spans


def probe_set(width: int, layers: tuple[int, ...]) -> ProbeSet:
    rng = np.random.default_rng(1)
    probes = []
    for place, layer in enumerate(layers):
        weight = (rng.standard_normal(width) / width**0.5).astype(np.float32)
        probes.append(Probe("f" * 12, "all", "logistic", layer, place == 0, weight, 0.3 - 0.2 * place))
    return ProbeSet(tuple(probes), (ProbeFile("probes.safetensors", "f" * 64, {}, "", 3),))


def off(found: Found, plain: Found) -> float:
    """Largest difference; both have a number at the same places."""
    assert found.problem == plain.problem
    assert found.tokens == plain.tokens
    pairs = [(getattr(found, name), getattr(plain, name)) for name in ("measures", "drops", "drops_logit")]
    assert all((np.isnan(a) == np.isnan(b)).all() for a, b in pairs)
    return max(float(np.nanmax(np.abs(a - b))) for a, b in pairs)


def state_of(loaded: LoadedModel) -> list[str]:
    """What a pass could leave behind: settings, hooks, entries of modules."""
    return [
        f"{name} {sorted(vars(module))} {list(module._forward_hooks)} {list(module._forward_pre_hooks)} "
        f"{getattr(getattr(module, 'config', None), '_attn_implementation', None)}"
        for name, module in loaded.model.named_modules()
    ] + [repr(loaded.model.config)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kernel_equals_plain(name: str) -> None:
    loaded = tiny(name)
    ids, spans = traces()
    before = loaded.model(torch.tensor([ids[0]]), output_hidden_states=True).logits  # transformers keeps hooks for it
    state = state_of(loaded)
    for layers in ((1,), (2, 0, 2, 1)):
        probes = probe_set(loaded.d_model, layers)
        plain = score_plain(loaded, probes, WINDOW, ids, spans)
        assert np.isnan(plain.measures).any()
        assert np.nanstd(plain.measures) > 0.1
        for mode, budget in (("packed", 200), ("packed", 64), ("padded", None), ("padded", 64), ("auto", 1)):
            kernel = Kernel(loaded, probes, WINDOW, budget, mode)  # type: ignore[arg-type]
            assert kernel.mode == ("packed" if mode == "auto" else mode)
            assert kernel.trimmed
            assert kernel.reason == ("padding was asked for" if mode == "padded" else "")
            found = kernel.score(ids, spans)
            assert off(found, plain) < 1e-4, (mode, budget)
            assert found.padding_share < (0.05 if mode == "padded" else 1e-9)
    assert torch.equal(loaded.model(torch.tensor([ids[0]])).logits, before)
    assert state_of(loaded) == state


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_memory_that_runs_out_halves_the_budget(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny("llama")
    probes = probe_set(loaded.d_model, (1,))
    ids, spans = traces()
    kernel = Kernel(loaded, probes, WINDOW, 400, mode)
    lengths = [span.response_start for span in spans]
    most = sorted(lengths)[-2]  # the longest trace does not fit at all
    body, failed = type(loaded.body).forward, []

    def forward(self: Any, input_ids: torch.Tensor, **others: Any) -> Any:
        if input_ids.numel() > most:
            failed.append(input_ids.numel())
            if len(failed) % 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
        return body(self, input_ids=input_ids, **others)

    monkeypatch.setattr(type(loaded.body), "forward", forward)
    found = kernel.score(ids, spans)
    longest = lengths.index(max(lengths))
    assert [n for n, problem in enumerate(found.problem) if problem] == [longest]
    assert found.problem[longest] == "too_long"
    assert kernel.budget < 400
    failed.clear()
    again = kernel.score(ids[:longest], spans[:longest])
    assert kernel.budget >= most or not failed
    monkeypatch.undo()
    plain = score_plain(loaded, probes, WINDOW, ids, spans)
    kept = [n for n in range(len(ids)) if n != longest]
    assert np.nanmax(np.abs(found.measures[kept] - plain.measures[kept])) < 1e-4
    assert np.isnan(found.measures[longest]).all()
    assert off(again, score_plain(loaded, probes, WINDOW, ids[:longest], spans[:longest])) < 1e-4
    monkeypatch.setattr(type(loaded.body), "forward", lambda *a, **b: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # any other error is a bug, and stays one
        kernel.score(ids, spans)


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_a_trace_that_is_not_finite_is_flagged_alone(mode: Any) -> None:
    loaded = tiny("qwen2")
    probes = probe_set(loaded.d_model, (2, 1))
    ids, spans = traces()
    ids[1][3] = 96  # a token that no other trace has
    ids = [[token if n == 1 or token != 96 else 5 for token in row] for n, row in enumerate(ids)]
    weight = loaded.model.get_input_embeddings().weight
    kept = weight[96].clone()
    try:
        with torch.no_grad():
            weight[96] = torch.nan
        found = Kernel(loaded, probes, WINDOW, 100, mode).score(ids, spans)
        plain = score_plain(loaded, probes, WINDOW, ids, spans)
    finally:
        with torch.no_grad():
            weight[96] = kept
    assert [n for n, problem in enumerate(found.problem) if problem] == [1]
    assert found.problem[1] == "not_finite"
    assert np.isnan(found.measures[1]).all()
    assert off(found, plain) < 1e-4


def test_what_cannot_be_packed_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny("llama")
    probes = probe_set(loaded.d_model, (1,))
    monkeypatch.setattr("clifflab.scoring.packed.PackedAttention.apart", lambda self, lengths: nullcontext())
    kernel = Kernel(loaded, probes, WINDOW)
    assert kernel.mode == "padded"  # traces that see each other
    assert kernel.reason.startswith("states after block 1 differ by")
    with pytest.raises(InputError, match=r"models.path: tiny-llama: cannot be packed \(states after block 1 differ"):
        Kernel(loaded, probes, WINDOW, mode="packed")
    monkeypatch.undo()
    assert Kernel(loaded, probes, WINDOW).mode == "packed"


@pytest.mark.parametrize("name", ["input_layernorm", "self_attn"])
def test_a_block_that_cannot_be_trimmed_runs_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny("llama")
    probes = probe_set(loaded.d_model, (1,))
    monkeypatch.setattr("clifflab.scoring.trim._ATTENTION", (name,))  # keys of all tokens are needed behind it
    kernel = Kernel(loaded, probes, WINDOW)
    assert not kernel.trimmed
    assert kernel.trim_reason
    ids, spans = traces()
    assert off(kernel.score(ids, spans), score_plain(loaded, probes, WINDOW, ids, spans)) < 1e-4


LONG = {**GQA, "max_position_embeddings": 1024, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 8.0, 30.0]}


def built(kind: str, **sizes: Any) -> LoadedModel:
    """A tiny model of an architecture whose attention depends on lengths or places."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, kind, (kind, {**LONG, **sizes}))
        loaded = tiny.__wrapped__(kind)
    return replace(loaded, context=1024)


def of_lengths(*lengths: int) -> tuple[list[list[int]], list[Spans]]:
    return traces([(4, length - 6, 2, 0) for length in lengths])


@pytest.mark.parametrize("kind", ["phi3", "phimoe"])
def test_long_traces_leave_the_frequencies_of_short_ones_alone(kind: str) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **FACTORS}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    if kind == "phimoe":
        rope |= {"short_mscale": 1.0, "long_mscale": 1.2}
    loaded = built(kind, rope_parameters=rope, original_max_position_embeddings=64, **experts)
    assert length_borders(loaded) == (64,)
    probes = probe_set(loaded.d_model, (2, 1))
    ids, spans = of_lengths(66, 65, 64, 63, 100, 30, 101, 64)
    plain = score_plain(loaded, probes, WINDOW, ids, spans)
    before = loaded.model(torch.tensor([ids[0]])).logits
    for mode, budget in (("packed", 300), ("packed", 150), ("padded", 500), ("auto", None)):
        kernel = Kernel(loaded, probes, WINDOW, budget, mode)  # type: ignore[arg-type]
        assert kernel.mode == ("padded" if mode == "padded" else "packed")
        assert off(kernel.score(ids, spans), plain) < 1e-4, (mode, budget)
    assert torch.equal(loaded.model(torch.tensor([ids[0]])).logits, before)
    object.__setattr__(kernel._ways, "borders", ())
    assert off(kernel.score(ids, spans), plain) > 1e-2  # what the border is for
    layered = SimpleNamespace(_attn_implementation_internal="sdpa", rope_scaling={"full": {**rope}, "sliding": None})
    layered.rope_scaling["full"]["original_max_position_embeddings"] = 9
    module: Any = torch.nn.Identity()
    module.config = layered
    assert length_borders(SimpleNamespace(body=module)) == (9,)  # type: ignore[arg-type]


def test_attention_by_the_place_in_the_row_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows only far behind in a row: a short trial would not see it."""
    sizes = {
        "head_dim": 8, "attention_chunk_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "attn_scale": 0.5,
        "intermediate_size_mlp": 48, "no_rope_layers": [1, 0, 1], "attn_temperature_tuning": True,
    }  # fmt: skip
    ids, spans = of_lengths(200, 120, 70, 45, 45, 12)
    for scale, mode in ((40, "padded"), (900, "padded"), (2000, "packed")):
        loaded = built("llama4_text", **sizes, floor_scale=scale)
        probes = probe_set(loaded.d_model, (2,))
        kernel = Kernel(loaded, probes, WINDOW)
        assert kernel.mode == mode, (scale, kernel.reason)
        assert ("states after block 2 differ" in kernel.reason) == (mode == "padded")
        assert off(kernel.score(ids, spans), score_plain(loaded, probes, WINDOW, ids, spans)) < 1e-4
    for config in configs_of(loaded):
        monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="flash_attention_2 knows no chunks"):
        PackedAttention(loaded)


def test_long_windows_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = built("gemma3_text", head_dim=8, sliding_window=400, layer_types=["sliding_attention"] * 3)
    probes = probe_set(loaded.d_model, (2,))
    ids, spans = of_lengths(900, 500, 405, 390, 120)
    plain = score_plain(loaded, probes, WINDOW, ids, spans)
    for budget in (None, 500):
        kernel = Kernel(loaded, probes, WINDOW, budget)
        assert kernel.mode == "packed"
        assert off(kernel.score(ids, spans), plain) < 1e-4
    monkeypatch.setattr("clifflab.scoring.packed._Mask.of", lambda self, length: None)  # causal, whatever the window
    assert Kernel(loaded, probes, WINDOW).mode == "padded"
    assert Kernel(loaded, probes, WINDOW, 500).mode == "padded"  # the window's length alone asks for it
    kernel = Kernel(loaded, probes, WINDOW, 300)  # a row that no trace beyond the window shares
    assert kernel.mode == "packed"
    assert off(kernel.score(ids, spans), plain) < 1e-4


def test_no_packed_row_is_longer_than_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny("llama")
    probes = probe_set(loaded.d_model, (1,))
    monkeypatch.setattr("clifflab.scoring.trial._MOST_CPU", 100)
    assert Kernel(loaded, probes, WINDOW, 1000).budget == 100
    assert Kernel(loaded, probes, WINDOW, 1000, "padded").budget == 1000


def test_a_trial_without_memory_is_made_again_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny("llama")
    probes = probe_set(loaded.d_model, (1,))
    body, most = type(loaded.body).forward, 150

    def forward(self: Any, input_ids: torch.Tensor, **others: Any) -> Any:
        if input_ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return body(self, input_ids=input_ids, **others)

    monkeypatch.setattr(type(loaded.body), "forward", forward)
    kernel = Kernel(loaded, probes, WINDOW, 400)
    assert (kernel.mode, kernel.reason, kernel.budget) == ("packed", "", 100)
    most = 50
    with pytest.raises(torch.OutOfMemoryError):
        find_ways(loaded, (1,), "auto", 100)


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_half_precision(mode: Any) -> None:
    loaded = tiny("qwen2")
    model = deepcopy(loaded.model).to(torch.bfloat16)
    loaded = replace(loaded, model=model, body=model.base_model, blocks=model.base_model.layers)
    probes = probe_set(loaded.d_model, (2, 1))
    ids, spans = traces()
    kernel = Kernel(loaded, probes, WINDOW, 200, mode)
    assert kernel.mode == mode
    assert kernel.trimmed
    plain = score_plain(loaded, probes, WINDOW, ids, spans)
    with torch.no_grad():
        states = loaded.model(torch.tensor([ids[7]]), output_hidden_states=True).hidden_states[1:-1]
    length = max(float(state.float().norm(dim=-1).max()) for state in states)
    weight = max(float(np.linalg.norm(probe.weight)) for probe in probes.probes)
    assert off(kernel.score(ids, spans), plain) < 2 * TOLERANCE[torch.bfloat16] * length * weight
    assert np.nanstd(plain.measures) > 0.1


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_what_no_measure_reads_may_be_anything(mode: Any) -> None:
    """A state outside the read positions that is not finite spoils nothing, in either way."""
    loaded = tiny("qwen2")
    ids, spans = of_lengths(60, 60, 30)
    ids = [[5 if token == 96 else token for token in row] for row in ids]
    ids[0][8] = 96  # in the thinking, before the window
    weight = loaded.model.get_input_embeddings().weight
    kept = weight[96].clone()
    probes = probe_set(loaded.d_model, (0,))
    try:
        with torch.no_grad():
            # Later tokens stay as they are, and its own logit is beyond float32.
            weight[96] = torch.from_numpy(np.sign(probes.probes[0].weight)) * 3e38
        found = Kernel(loaded, probes, WINDOW, 100, mode).score(ids, spans)
        plain = score_plain(loaded, probes, WINDOW, ids, spans)
        logits = plain_logits(loaded, probes, ids[0], spans[0])
    finally:
        with torch.no_grad():
            weight[96] = kept
    assert not np.isfinite(logits).all()
    assert plain.problem == ["", "", ""]
    assert off(found, plain) < 1e-4


def write_probes(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A model's folder of a study, as the stage ``probe`` leaves it."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    about: dict[str, Any] = {
        "trained": True, "model": {"sha256": "a" * 64, "dtype": "float32"}, "template_hash": "t", "probes": {},
    }  # fmt: skip
    for key in ("all.logistic", "all.difference", "final.logistic"):
        tensors[f"{key}.w"] = rng.standard_normal((3, 32)).astype(np.float32)
        tensors[f"{key}.b"] = rng.standard_normal(3).astype(np.float32)
        about["probes"][key] = {"reported_layer": 1 if key == "all.logistic" else 2}
    save_file(tensors, folder / "probes.safetensors")
    (folder / "probes.json").write_text(json.dumps({**about, **changes}))
    return folder


def test_probes_of_several_files_and_layers(tmp_path: Path) -> None:
    one, two = write_probes(tmp_path / "one"), write_probes(tmp_path / "two", seed=1)
    probes = load_probes([one, two / "probes.safetensors"], ["all", "all:logistic:every", "final", "all:difference:0"])
    names = [file_hash(folder / "probes.safetensors")[:12] for folder in (one, two)]
    keys = [("all", "logistic", 1), ("all", "logistic", 0), ("all", "logistic", 2), ("final", "logistic", 2)]
    keys.append(("all", "difference", 0))
    assert [(p.name, p.train_positions, p.estimator, p.layer) for p in probes.probes] == [
        (name, *key) for name in names for key in keys
    ]
    assert [p.reported for p in probes.probes] == [True, False, False, True, False, *[False] * 5]
    assert probes.layers == (0, 1, 2)
    assert len({json.dumps(entry) for entry in probes.identity()}) == len(probes) == 10
    check_probes(probes, {"sha256": "a" * 64, "dtype": "bfloat16"}, "t", 3, 32)
    loaded = tiny("qwen3")  # every probe reads its own layer, in one pass
    ids, spans = traces()
    plain = score_plain(loaded, probes, WINDOW, ids, spans)
    assert off(Kernel(loaded, probes, WINDOW).score(ids, spans), plain) < 1e-4


def test_bad_probes_are_one_line(tmp_path: Path) -> None:
    good = write_probes(tmp_path / "good")
    probes = load_probes([good], ["all:logistic:every"])
    same = {"sha256": "a" * 64, "dtype": "float32"}
    for given, line in (
        (
            ({"sha256": "b" * 64}, "t", 3, 32),
            r"another model \(sha256 aaaaaaaaaaaa\) than --model \(sha256 bbbbbbbbbbbb",
        ),
        (({"hub": "x/y", "revision": "r"}, "t", 3, 32), r"another model \(sha256 a+\) than --model \(no sha256\)"),
        (({**same, "adapter": "c"}, "t", 3, 32), r"another model \(no adapter\) than --model \(adapter c\)"),
        ((same, "other", 3, 32), "another chat template"),
        ((same, "t", 3, 64), "probes of width 32, where the model's residual stream has 64"),
        ((same, "t", 2, 32), "reads layer 2, where the model has layers 0 to 1"),
    ):
        with pytest.raises(InputError, match=f"^--probes: .*{line}"):
            check_probes(probes, *given)
    untrained = write_probes(tmp_path / "untrained", trained=False, reason="3 refused traces")
    damaged = write_probes(tmp_path / "damaged")
    (damaged / "probes.safetensors").write_bytes(b"12345678 no tensors")
    broken = write_probes(tmp_path / "broken")
    (broken / "probes.json").write_text("{")
    nan = write_probes(tmp_path / "nan")
    tensors = {**load_file(good / "probes.safetensors"), "all.logistic.b": np.full(3, np.nan, dtype=np.float32)}
    save_file(tensors, nan / "probes.safetensors")
    (tmp_path / "empty").mkdir()
    for path, spec, line in (
        (tmp_path / "none", "all", "no such file or folder"),
        (tmp_path / "empty", "all", r"no such file \(probes.safetensors\)"),
        (untrained, "all", r"no trained probes \(3 refused traces\)"),
        (damaged, "all", "cannot be read"),
        (broken, "all", "is damaged"),
        (nan, "all", "is damaged"),
        (good, "final:difference", "holds no probe final:difference; it has all:logistic, all:difference, final:l"),
        (good, "all:logistic:3", r"holds no layer 3 \(asked for as all:logistic:3\); give layers 0 to 2"),
    ):
        with pytest.raises(InputError, match=f"^--probes: .*{line}"):
            load_probes([path], [spec])


def test_the_table_has_the_rows_of_the_stage(tmp_path: Path) -> None:
    """Column by column what the study's own stage writes, for every probe."""
    loaded = tiny("llama")
    ids, spans = traces()
    probes = probe_set(loaded.d_model, (1, 2))
    found = score_plain(loaded, probes, WINDOW, ids, spans)
    found.problem[3] = "not_finite"
    rows = [
        {
            "row": 100 + n, "id": f"i{n}", "label": "harmful" if n % 2 else None, "group": f"g{n}",
            "outcome": "refused", "token_ids": row, "cut_tokens": n, **{k: getattr(span, k) for k in SPANS},
        }
        for n, (row, span) in enumerate(zip(ids, spans, strict=True))
    ]  # fmt: skip
    ready = pa.Table.from_pylist(rows, schema=tables.READY)
    for cut in (ready, pa.concat_tables([ready[:4], ready[4:]])):
        again, borders = inputs_of(cut)
        assert [list(row) for row in again] == ids
        assert borders == spans
        table = scored_table(cut, found, probes, "m", "corpus")
    assert table.schema == tables.SCORED
    got = table.to_pylist()
    readers = SimpleNamespace(logistic=[("all", 0, 1), ("final", 0, 2)])
    want = []
    for n, (row, span) in enumerate(zip(rows, spans, strict=True)):
        if n == 3:
            continue
        logits = plain_logits(loaded, probes, ids[n], span)
        trace = {
            **row, "model": "m", "trace_id": f"corpus/i{n}#0", "sample": 0, "set": "corpus", "end": span.end,
            "closed": True,
        }  # fmt: skip
        own = cliff_rows(trace, {"all": logits[:1], "final": logits[1:]}, readers, WINDOW)  # type: ignore[arg-type]
        want += [{**one, "cut_tokens": n, "probe": "f" * 12} for one in own]
    for one, other in zip(got, want, strict=True):
        other |= {"train_positions": "all", "reported": one["layer"] == 1}
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], abs=1e-6), name
    nothing = scored_table(ready[:0], score_plain(loaded, probes, WINDOW, [], []), probes, "m", "corpus")
    assert nothing == tables.SCORED.empty_table()
