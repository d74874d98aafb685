"""Checks of a loaded model: what it is, and whether clifflab may rely on it.

Shape suffixes: B traces, T tokens, D width of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from clifflab.config import TracesConfig
from clifflab.engines import Request, TransformersEngine
from clifflab.errors import ClifflabError, InputError
from clifflab.findings import Finding
from clifflab.models.forward import Padding, not_finite, states_at
from clifflab.models.heads import HeadLayer, find_heads
from clifflab.models.hooks import capture
from clifflab.models.loading import LoadedModel
from clifflab.text.render import Messages

# Largest distance of two states relative to the length of the first, over all layers and positions.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
GREEDY_TOKENS = 64
_SAMPLES = {
    "plain": ("i cannot help.", "sorry, i cannot help."),
    "capitals": ("This is harmful. I should NOT help.", "Sorry, I cannot help."),
    "lines": ("First line.\n\n- second\n\tthird", "1. One\n2. Two\n"),
    "code": ('def f(x):\n    return {"a": [x, 1]}', "```python\nprint(f(2))\n```"),
    "unicode": ("Naïve café: 你好, нет, 👩‍🔬!", "Да — 好的 👍🏽"),
    "markup": ("a < b and <b>bold</b>", "x </b> & y"),
    "no full stop": ("it ends without one", "so does this"),
    "no thinking": ("", "sorry."),
}
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
_LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def check_model(loaded: LoadedModel, *, given: bool = False) -> list[Finding]:
    """Run every check; one that fails does not keep the others from running.

    Args:
        loaded: The model.
        given: The thinking format was set by the user and not read off the template.
    """
    checks: dict[str, Callable[[LoadedModel], Finding]] = {
        "architecture": _architecture,
        "attention": _attention,
        "heads": _heads,
        "size": _size,
        "thinking format": lambda model: _format(model, given),
        "closing tokens": _closing,
        "rendering": _round_trip,
        "stop tokens": _stop_ids,
        "hooks": _hooks,
        "capture": _no_trace,
        "padding": _parity,
        "output head": _output_head,
        "greedy answer": _generation,
    }
    findings = []
    for name, check in checks.items():
        try:
            with torch.inference_mode():
                findings.append(check(loaded))
        except ClifflabError as error:
            findings.append(
                Finding(name, "problem", str(error), "mend the checkpoint; it cannot be measured like this")
            )
    return findings


def _architecture(loaded: LoadedModel) -> Finding:
    config = loaded.model.config
    kind = f"{type(loaded.model).__name__} ({config.model_type})"
    data = {"class": type(loaded.model).__name__, "layers": len(loaded.blocks), "d_model": loaded.d_model}
    return Finding("architecture", "info", f"{kind}: {len(loaded.blocks)} layers, width {loaded.d_model}", data=data)


def _attention(loaded: LoadedModel) -> Finding:
    config = loaded.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return Finding("attention", "skip", "the config counts no attention heads")
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or loaded.d_model // heads
    detail = f"{heads} query heads, {kv_heads} key/value heads, head size {head_dim} (from the config)"
    return Finding("attention", "info", detail, data={"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim})


def _heads(loaded: LoadedModel) -> Finding:
    """The heads as they are removed: found by structure and checked on forward passes."""
    try:
        heads = find_heads(loaded)
    except InputError as error:
        remedy = "set heads.traces to 0: all else can be measured"
        return Finding("heads", "warning", f"cannot be removed one by one: {error.problem}", remedy)
    counts, sizes, names = (
        sorted({get(layer) for layer in heads.layers})
        for get in (lambda layer: layer.heads, lambda layer: layer.size, _projection_name)
    )
    shape, size = (" or ".join(map(str, found)) for found in (counts, sizes))
    where = f"each {size} wide where {' or '.join(names)} reads it"
    detail = f"{len(heads):,}: {len(heads.layers)} layers of {shape}, {where}"
    data = {"heads": len(heads), "layers": len(heads.layers), "per_layer": counts, "size": sizes, "projection": names}
    return Finding("heads", "ok", f"{detail}; their writes add up to what the attention returns", data=data)


def _projection_name(layer: HeadLayer) -> str:
    """What the attention calls its output projection."""
    return str(next(path for path, module in layer.attention.named_modules() if module is layer.projection))


def _size(loaded: LoadedModel) -> Finding:
    parameters = sum(p.numel() for p in loaded.model.parameters())
    dtype = str(_dtype(loaded)).removeprefix("torch.")
    detail = f"{parameters:,} parameters, {dtype} on {loaded.device}, context {loaded.context:,} tokens"
    data = {"parameters": parameters, "dtype": dtype, "device": str(loaded.device), "context": loaded.context}
    return Finding("size", "info", detail, data=data)


def _format(loaded: LoadedModel, given: bool) -> Finding:
    form = loaded.renderer.form
    how = "as given, and the chat template does not contradict it" if given else "read off the chat template"
    if form.thinks:
        who = "the chat template opens" if form.pre_opened else "the model opens"
        how += f"; {who} {form.open!r}, {form.close!r} closes"
    data = {"format": form.name, "given": given, "template_hash": loaded.renderer.template_hash}
    return Finding("thinking format", "ok", f"{form.name}: {how}", data=data)


def _closing(loaded: LoadedModel) -> Finding:
    """The closing tokens of a canonical trace, one by one."""
    renderer = loaded.renderer
    ids, spans = renderer.render(_user(), *_texts(loaded, "plain"))
    run = ids[spans.closing_start : spans.response_start]
    tokens = [renderer.decode([token]) for token in run]
    data = {"ids": run, "tokens": tokens, "final_id": ids[spans.final]}
    if not renderer.form.thinks:
        final = renderer.decode([ids[spans.final]])
        detail = f"none; the final position is the prompt's last token, {ids[spans.final]} {final!r}"
        return Finding("closing tokens", "ok", detail, data=data)
    detail = "  ".join(f"{token} {text!r}" for token, text in zip(run, tokens, strict=True))
    merged = not renderer.decode(run).startswith(renderer.form.close)
    note = "  (the first one holds the end of the thinking too)" if merged else ""
    return Finding("closing tokens", "ok", detail + note, data=data)


def _round_trip(loaded: LoadedModel) -> Finding:
    """Text to ids to text, with the thinking and the response of every sample."""
    renderer = loaded.renderer
    lossy, broken = [], []
    for name in _SAMPLES:
        thinking, response = _texts(loaded, name)
        ids, spans = renderer.render(_user(), thinking, response)
        back = renderer.texts(ids, spans)
        if not spans.closed or renderer.parse(ids[: spans.prefix_end], ids[spans.prefix_end :]) != spans:
            broken.append(name)
        elif back == ((thinking or "").strip(), response.strip()):
            continue
        elif all(renderer.decode(renderer.encode(text)) == text for text in (thinking or "", response)):
            broken.append(name)  # the tokenizer keeps the text, so the rendering lost it
        else:
            lossy.append(name)
    data = {"samples": len(_SAMPLES), "lossy": lossy, "broken": broken}
    if broken:
        detail = f"these samples do not come back as they were: {', '.join(broken)}"
        return Finding("rendering", "problem", detail, "check thinking_format and the tokenizer's files", data)
    if lossy:
        detail = f"the tokenizer cannot hold these samples: {', '.join(lossy)}"
        remedy = "measure existing traces only if they keep to its vocabulary; what the model writes itself is whole"
        return Finding("rendering", "warning", detail, remedy, data)
    return Finding("rendering", "ok", f"{len(_SAMPLES)} samples come back as they were", data=data)


def _stop_ids(loaded: LoadedModel) -> Finding:
    stops = sorted(loaded.stop_ids)
    detail = "  ".join(f"{token} {loaded.renderer.decode([token])!r}" for token in stops)
    if not stops:
        remedy = "set eos_token_id in generation_config.json"
        return Finding("stop tokens", "warning", "none: every trace runs into its token limit", remedy, {"ids": stops})
    form = loaded.renderer.form
    inside = [t for t in loaded.renderer.encode(form.open_text + form.close_text) if t in loaded.stop_ids]
    if inside:
        detail = f"{inside[0]} {loaded.renderer.decode(inside[:1])!r} stops generation and is part of a thinking marker"
        remedy = "take it out of eos_token_id in generation_config.json"
        return Finding("stop tokens", "problem", detail, remedy, {"ids": stops})
    return Finding("stop tokens", "ok", detail, data={"ids": stops})


def _hooks(loaded: LoadedModel) -> Finding:
    """Captured states against the model's own, bit for bit; the last one through the final norm."""
    tokens_BT = _tokens(loaded)
    got: dict[int, torch.Tensor] = {}
    with capture(loaded.blocks, range(len(loaded.blocks)), lambda layer, hidden: got.__setitem__(layer, hidden)):
        output = loaded.body(input_ids=tokens_BT, use_cache=False, output_hidden_states=True)
    own = output.hidden_states
    wrong = [layer for layer in range(len(loaded.blocks) - 1) if not torch.equal(got[layer], own[layer + 1])]
    norm = next((getattr(loaded.body, name) for name in _FINAL_NORMS if hasattr(loaded.body, name)), None)
    last = "final norm not found, last layer not compared"
    if isinstance(norm, nn.Module):
        last = "last layer through the final norm"
        if not torch.equal(norm(got[len(loaded.blocks) - 1]), own[-1]):
            wrong.append(len(loaded.blocks) - 1)
    if wrong:
        detail = f"the states after layers {wrong} are not the model's own"
        return Finding("hooks", "problem", detail, "this architecture is not supported", {"layers": wrong})
    return Finding("hooks", "ok", f"captured states equal the model's own, bit for bit ({last})")


def _no_trace(loaded: LoadedModel) -> Finding:
    """Outputs before and after a capture, bit for bit."""
    tokens_BT = _tokens(loaded)
    before_BTV = loaded.model(input_ids=tokens_BT).logits
    with capture(loaded.blocks, range(len(loaded.blocks)), lambda layer, hidden: None):
        loaded.body(input_ids=tokens_BT, use_cache=False)
    after_BTV = loaded.model(input_ids=tokens_BT).logits
    if not torch.isfinite(before_BTV).all():
        raise not_finite(loaded, "logits")
    if not torch.equal(before_BTV, after_BTV):
        remedy = "the model's outputs are not repeatable: look for dropout or custom kernels"
        return Finding("capture", "problem", "outputs after a capture differ from those before", remedy)
    return Finding("capture", "ok", "outputs after a capture are bit-identical to those before; all numbers finite")


def _parity(loaded: LoadedModel) -> Finding:
    """States of a trace alone against the same trace in a padded batch, left and right."""
    rows = [loaded.renderer.render(_user(), *_texts(loaded, name))[0] for name in ("plain", "code", "no thinking")]
    layers = range(len(loaded.blocks))

    def states(batch: list[list[int]], padding: Padding) -> list[dict[int, torch.Tensor]]:
        found: list[dict[int, torch.Tensor]] = [{} for _ in batch]
        positions = [range(len(row)) for row in batch]
        states_at(loaded, batch, positions, layers, lambda b, layer, h: found[b].__setitem__(layer, h), padding)
        return found

    alone = [states([row], "right")[0] for row in rows]
    worst = {}
    for padding in ("left", "right"):
        batch = states(rows, padding)
        worst[padding] = max(
            float(((b[layer] - a[layer]).norm(dim=-1) / a[layer].norm(dim=-1).clamp_min(1e-6)).max())
            for a, b in zip(alone, batch, strict=True)
            for layer in layers
        )
    limit = TOLERANCE[_dtype(loaded)]
    detail = f"states in a padded batch against alone: {worst['left']:.1e} (left), {worst['right']:.1e} (right)"
    detail += f", relative; tolerance {limit:g}"
    if not max(worst.values()) <= limit:  # NaN fails too
        remedy = "use batch_size 1, or another dtype; scores of one trace would depend on its batch mates"
        return Finding("padding", "problem", detail, remedy, worst)
    return Finding("padding", "ok", detail, data=worst)


def _output_head(loaded: LoadedModel) -> Finding:
    """The body's last state through the output head against the model's logits."""
    declared = [name for name in _LOGIT_SETTINGS if getattr(loaded.model.config.get_text_config(), name, None)]
    if declared:
        return Finding("output head", "skip", f"the config changes logits after the head ({', '.join(declared)})")
    tokens_BT = _tokens(loaded)
    head = loaded.model.get_output_embeddings()
    if head is None:
        return Finding("output head", "problem", "the model has none", "give a causal language model")
    states_BTD = loaded.body(input_ids=tokens_BT, use_cache=False).last_hidden_state
    own_BTV = loaded.model(input_ids=tokens_BT, use_cache=False).logits
    gap = float((head(states_BTD).float() - own_BTV.float()).abs().max() / own_BTV.float().abs().max().clamp_min(1e-6))
    limit = TOLERANCE[_dtype(loaded)]
    detail = f"last state through the head against the logits: {gap:.1e}, relative; tolerance {limit:g}"
    if not gap <= limit:  # NaN fails too
        return Finding("output head", "problem", detail, "this architecture is not supported", {"gap": gap})
    return Finding("output head", "ok", detail, data={"gap": gap})


def _generation(loaded: LoadedModel) -> Finding:
    """A short greedy completion: how a trace of this model begins, and whether it ends."""
    prompt = loaded.renderer.prompt_ids(_user())
    limit = min(GREEDY_TOKENS, loaded.context - len(prompt))
    request = Request(tuple(prompt), 0, limit)
    completion = TransformersEngine(loaded).generate([request], TracesConfig(temperature=0.0))[0]
    spans = loaded.renderer.parse(prompt, completion.ids)
    ended = f"ends after {len(completion.ids)} tokens" if completion.finish_reason == "stop" else f"goes on at {limit}"
    thinking = f", thinking {'closed' if spans.closed else 'not closed'}" if loaded.renderer.form.thinks else ""
    start = loaded.renderer.decode(completion.ids)[:60]
    data = {"tokens": len(completion.ids), "finish_reason": completion.finish_reason, "closed": spans.closed}
    return Finding("greedy answer", "info", f"to 'hello' {ended}{thinking}: {start!r}", data=data)


def _user() -> Messages:
    return [{"role": "user", "content": "hello"}]


def _texts(loaded: LoadedModel, name: str) -> tuple[str | None, str]:
    thinking, response = _SAMPLES[name]
    return (thinking if loaded.renderer.form.thinks else None), response


def _tokens(loaded: LoadedModel) -> torch.Tensor:
    ids, _ = loaded.renderer.render(_user(), *_texts(loaded, "plain"))
    return torch.tensor([ids], device=loaded.device)


def _dtype(loaded: LoadedModel) -> torch.dtype:
    dtype: torch.dtype = loaded.model.get_input_embeddings().weight.dtype
    return dtype
