"""Every fast sweep equals the plain one, on the structures that real models have."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from clifflab.bench.geometries import _Ids
from clifflab.config import ModelSpec
from clifflab.errors import InputError, InterventionError, TraceError
from clifflab.models.heads import find_heads
from clifflab.models.intervene import Intervention, intervene
from clifflab.models.lens import make_lens
from clifflab.models.loading import LoadedModel, find_blocks
from clifflab.sweep import Meter, SweepTrace, attribution, direct_effects, mean_outputs, sweep
from clifflab.sweep.plain import plain_sweep
from clifflab.sweep.resume import shares_prefix
from clifflab.text.spans import Spans

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
GQA = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {"head_dim": 8, "sliding_window": 7}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**GQA, "attention_bias": True}),
    "qwen2": ("qwen2", GQA),
    "qwen3": ("qwen3", {**GQA, "head_dim": 12}),  # head size is not width / heads; q and k norms
    "qwen3-moe": ("qwen3_moe", {**GQA, **EXPERTS, "head_dim": 8}),
    "mistral": ("mistral", {**GQA, "sliding_window": 7}),
    "phi3": ("phi3", {**GQA, "pad_token_id": 0, "partial_rotary_factor": 0.5}),  # fused q, k and v
    "gpt-neox": ("gpt_neox", {**SIZES, "rotary_pct": 0.25, "use_parallel_residual": True}),
    "gpt2": ("gpt2", {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "gemma2": ("gemma2", {**GQA, **WINDOW, "query_pre_attn_scalar": 8}),  # output norms
    "olmo2": ("olmo2", GQA),
    "gpt-oss": ("gpt_oss", {**GQA, **WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1}),  # attention sinks
}
ASKED = ("llama", "qwen2", "qwen3", "qwen3-moe", "mistral", "phi3", "gpt-neox")


@cache
def tiny(name: str) -> LoadedModel:
    """A random model whose weights are large enough for heads to matter."""
    kind, sizes = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
            elif "norm" not in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
    width = model.config.hidden_size
    return LoadedModel(
        spec=ModelSpec(name=name, path=f"tiny-{name}"), model=model, body=model.base_model,
        blocks=find_blocks(model, name), renderer=_Ids(97), stop_ids=frozenset(), pad_id=0, context=128, d_model=width,
    )  # fmt: skip


def traces(lengths: tuple[tuple[int, int], ...] = ((24, 4), (17, 3))) -> list[SweepTrace]:
    rng = np.random.default_rng(0)
    return [SweepTrace(tuple(rng.integers(1, 97, total).tolist()), total - closing) for total, closing in lengths]


@cache
def meter_of(name: str) -> Meter:
    loaded = tiny(name)
    lens = make_lens(loaded, [3, 4, 5], [6, 7])
    assert lens is not None
    weights = torch.from_numpy(np.random.default_rng(1).standard_normal((2, loaded.d_model)).astype(np.float32))
    return Meter((1, 2), weights / loaded.d_model**0.5, torch.tensor([0.3, -0.2]), lens)


def largest(a: Any, b: Any) -> float:
    assert (np.isnan(a) == np.isnan(b)).all()
    return float(np.nanmax(np.abs(a - b)))


KINDS = {
    "zero": Intervention(),
    "gamma": Intervention(0.4),
    "zero-renormalised": Intervention(renormalise=True),
    "mean": "mean",
    "mean-renormalised": "mean",
}


@pytest.mark.parametrize("positions", ["closing", "all"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fast_equals_plain(name: str, positions: Any) -> None:
    loaded, meter = tiny(name), meter_of(name)
    heads = find_heads(loaded)
    if name in ASKED:
        assert shares_prefix(loaded, heads)
    sets = [*([head] for head in heads), [(0, 1), (2, 3)], [(1, 0), (1, 2)], []]
    batch = traces()
    before = loaded.model(torch.tensor([batch[0].ids])).logits
    for kind, given in KINDS.items():
        intervention = given
        if not isinstance(given, Intervention):
            means = mean_outputs(loaded, heads, traces(((20, 3), (15, 2), (9, 3))))
            intervention = Intervention(means=means, renormalise="renorm" in kind)
        for padding in ("left", "right"):
            plain = plain_sweep(loaded, heads, batch, sets, meter, intervention, positions, padding=padding)
            for trace, reference in zip(batch, plain, strict=True):
                fast = sweep(loaded, heads, trace, sets, meter, intervention, positions)
                assert largest(fast.clean, reference.clean) < 1e-4
                assert largest(fast.changed, reference.changed) < 1e-4, (kind, padding)
        assert np.nanmax(np.abs(plain[0].effects)) > 1e-2  # the changes do something
    assert torch.equal(loaded.model(torch.tensor([batch[0].ids])).logits, before)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-neox"])
def test_small_batches_and_whole_sequences_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, meter, trace = tiny(name), meter_of(name), traces()[0]
    heads = find_heads(loaded)
    sets = [[head] for head in heads]
    whole = sweep(loaded, heads, trace, sets, meter, Intervention(), "closing", share=False)
    monkeypatch.setattr("clifflab.sweep.resume._CPU_TOKENS", 9)  # two sets a batch
    small = sweep(loaded, heads, trace, sets, meter, Intervention(), "closing")
    assert largest(whole.effects, small.effects) < 1e-4
    reverse = sweep(loaded, heads, trace, sets[::-1], meter, Intervention(), "closing")
    assert largest(small.effects, reverse.effects[::-1]) < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_direct_effects_are_complete(name: str) -> None:
    loaded, meter = tiny(name), meter_of(name)
    heads = find_heads(loaded)
    found = direct_effects(loaded, heads, traces()[0], meter)
    assert np.abs(found.total() + meter.biases.numpy() - found.logits).max() < 1e-4
    assert found.heads.shape == (2, len(heads))
    last = [layer == 2 for layer, _ in heads]
    assert np.isnan(found.heads[0, last]).all()  # above the direction's layer
    assert not np.isnan(found.heads[1]).any()


@pytest.mark.parametrize("name", ["qwen3", "gpt-neox", "gemma2"])
def test_a_head_of_the_probed_layer_acts_through_its_write_alone(name: str) -> None:
    """In the probed layer of a parallel block, or without an MLP behind it, removal costs just the direct effect."""
    loaded, meter = tiny(name), meter_of(name)
    heads = find_heads(loaded)
    found = direct_effects(loaded, heads, traces()[0], meter)
    if name == "gpt-neox":
        at = [i for i, (layer, _) in enumerate(heads) if layer == 2]
        swept = sweep(loaded, heads, traces()[0], [[head] for head in heads], meter, Intervention(), "closing")
        assert largest(-found.heads[1, at], swept.effects[at, 1]) < 1e-4
    assert np.nanmax(np.abs(found.mlps)) > 0


@pytest.mark.parametrize("positions", ["closing", "all"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-neox", "gemma2"])
def test_the_estimate_is_the_slope_of_the_effect(name: str, positions: Any) -> None:
    loaded, meter, trace = tiny(name), meter_of(name), traces()[0]
    heads = find_heads(loaded)
    step = 1e-2
    up, down = (
        sweep(loaded, heads, trace, [[head] for head in heads], meter, Intervention(1 + sign * step), positions)
        for sign in (1, -1)
    )
    slope = ((up.changed - down.changed) / (2 * step))[:, [0, -1]]
    estimate = attribution(loaded, heads, trace, meter, Intervention(), positions)
    assert largest(-estimate, slope) < 2e-3 * max(1.0, float(np.nanmax(np.abs(slope))))
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_an_interrupted_sweep_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, meter, trace = tiny("qwen3"), meter_of("qwen3"), traces()[0]
    heads = find_heads(loaded)
    ids = torch.tensor([trace.ids])
    before = loaded.model(ids).logits

    def hooks() -> list[int]:  # the library keeps some of its own, once hidden states were asked for
        return [n for m in loaded.model.modules() for part in (m._forward_pre_hooks, m._forward_hooks) for n in part]

    there = hooks()

    def interrupted(*_args: Any, **_kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clifflab.sweep.types.Meter.read", interrupted)
    for positions in ("closing", "all"):
        for run in (sweep, lambda *a: plain_sweep(a[0], a[1], [a[2]], *a[3:])):
            with pytest.raises(KeyboardInterrupt):
                run(loaded, heads, trace, [[(0, 1)]], meter, Intervention(), positions)
    assert torch.equal(loaded.model(ids).logits, before)
    assert hooks() == there
    assert loaded.model.config._attn_implementation == "sdpa"


def test_bad_input_is_one_clear_line() -> None:
    loaded, meter, trace = tiny("llama"), meter_of("llama"), traces()[0]
    heads = find_heads(loaded)
    run = lambda sets, use: sweep(loaded, heads, trace, sets, use, Intervention(), "closing")  # noqa: E731
    with pytest.raises(InputError, match=r"heads: 0\.99: layer 0 has no such head; give heads 0 to 3"):
        run([[(0, 99)]], meter)
    with pytest.raises(InputError, match=r"heads: 99\.0: the model has no such layer; give layers 0 to 2"):
        run([[(99, 0)]], meter)
    with pytest.raises(InputError, match="probe: llama: reads 16 numbers where the model has 32"):
        run([[(0, 0)]], replace(meter, weights=torch.ones(2, 16)))
    with pytest.raises(InputError, match="probe: llama: reads layer 7 where the model has 3"):
        run([[(0, 0)]], replace(meter, layers=(1, 7)))
    with pytest.raises(TraceError, match="no closing tokens"):
        SweepTrace.of([1, 2, 3], Spans(1, 1, 3, 3, 3, True))
    with (
        pytest.raises(InterventionError, match=r"layers \[1\] never fired"),
        intervene(heads, [[(1, 0)]], Intervention()),
    ):
        pass


def test_a_model_without_an_output_projection_is_refused() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).eval()
    loaded = replace(tiny("llama"), model=model, body=model.base_model, blocks=find_blocks(model, "mamba"))
    with pytest.raises(InputError, match="block 0 has 0 attention output projections where one is expected"):
        find_heads(loaded)


def test_a_projection_that_is_not_the_last_word_is_refused() -> None:
    """An attention that changes what its projection returns cannot be told apart into heads."""
    loaded = tiny("olmo2")
    attention = find_heads(loaded).layers[1].attention
    handle = attention.register_forward_hook(lambda _m, _i, out: (out[0] * 1.5, *out[1:]))
    try:
        with pytest.raises(InputError, match="block 1 changes what its output projection returns"):
            find_heads(loaded)
    finally:
        handle.remove()
