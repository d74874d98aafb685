"""The scoring kernel equals the plain way, packed and padded, and leaves no trace in the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clifflab.models.loading import LoadedModel
from clifflab.scoring.kernel import Kernel
from clifflab.scoring.measures import Found
from clifflab.scoring.plain import score_plain
from clifflab.scoring.probes import Probe, ProbeFile, ProbeSet
from clifflab.text.spans import Spans
from tests.test_sweeps import ARCHITECTURES, tiny

WINDOW = (0.5, 0.9)
# Prefix, thinking, closing and response tokens: empty windows, no thinking, no closing tokens, equal lengths.
SHAPES = ((9, 20, 4, 3), (5, 26, 2, 0), (5, 1, 2, 6), (4, 0, 3, 2), (6, 0, 0, 4), (1, 2, 1, 1), (9, 20, 4, 1), (3, 40, 1, 2),
          (8, 21, 4, 3), (1, 0, 0, 1))  # fmt: skip


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
        assert np.isnan(plain.measures).any() and np.nanstd(plain.measures) > 0.1
        for mode, budget in (("packed", None), ("packed", 64), ("padded", None), ("padded", 64), ("auto", 1)):
            kernel = Kernel(loaded, probes, WINDOW, budget, mode)  # type: ignore[arg-type]
            assert kernel.mode == ("packed" if mode == "auto" else mode)
            found = kernel.score(ids, spans)
            assert off(found, plain) < 1e-4, (mode, budget)
            assert found.padding_share < 0.05 and (mode == "padded" or not found.padding)
    assert torch.equal(loaded.model(torch.tensor([ids[0]])).logits, before)
    assert state_of(loaded) == state
