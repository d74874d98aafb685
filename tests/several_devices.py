"""All that looks inside a model, once on one device and once with its blocks on two (see ``tests/devices.py``).

A process of its own: the pretended device stays registered with torch, and its modes slow everything down.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

torch.inference_mode = torch.no_grad  # type: ignore[misc, assignment]  # wrappers know no inference tensors

from clifflab.config import TracesConfig  # noqa: E402
from clifflab.engines.base import Request  # noqa: E402
from clifflab.engines.transformers import TransformersEngine  # noqa: E402
from clifflab.models.forward import states_at  # noqa: E402
from clifflab.models.heads import find_heads  # noqa: E402
from clifflab.models.intervene import Intervention  # noqa: E402
from clifflab.models.lens import make_lens  # noqa: E402
from clifflab.models.loading import LoadedModel  # noqa: E402
from clifflab.models.perplexity import Reading, total_nll  # noqa: E402
from clifflab.scoring.kernel import Kernel  # noqa: E402
from clifflab.sweep import Meter, attribution, direct_effects, mean_outputs, sweep  # noqa: E402
from clifflab.sweep.plain import plain_sweep  # noqa: E402
from tests import test_score_kernel as kernels  # noqa: E402
from tests import test_sweeps as sweeps  # noqa: E402
from tests.devices import register, spread  # noqa: E402

SETS = [[(0, 1)], [(1, 0), (2, 3)], []]
REMOVED = Intervention(renormalise=True)
Look = Callable[[LoadedModel], Any]


def _states(loaded: LoadedModel) -> Any:
    found: list[Any] = []
    ids = [trace.ids for trace in sweeps.traces()]
    states_at(loaded, ids, [[0, 5], [2]], range(3), lambda b, layer, states: found.append(states.cpu().numpy()))
    return np.concatenate(found)


def _meter(loaded: LoadedModel) -> Meter:
    lens = make_lens(loaded, [3, 4, 5], [6, 7])
    assert lens is not None
    weights = torch.from_numpy(np.random.default_rng(1).standard_normal((2, loaded.d_model)).astype(np.float32))
    return Meter((1, 2), weights / loaded.d_model**0.5, torch.tensor([0.3, -0.2]), lens)


def _swept(positions: Any, means: bool) -> Look:
    def look(loaded: LoadedModel) -> Any:
        heads, traces, meter = find_heads(loaded), sweeps.traces(), _meter(loaded)
        change = Intervention(means=mean_outputs(loaded, heads, traces)) if means else REMOVED
        fast = [sweep(loaded, heads, trace, SETS, meter, change, positions).changed for trace in traces]
        plain = [found.changed for found in plain_sweep(loaded, heads, traces, SETS, meter, change, positions)]
        return np.concatenate([*fast, *plain])

    return look


def _attributed(positions: Any) -> Look:
    def look(loaded: LoadedModel) -> Any:
        with torch.autograd.set_multithreading_enabled(False):  # a thread a device, and the pretended have none
            trace = sweeps.traces()[0]
            return attribution(loaded, find_heads(loaded), trace, _meter(loaded), REMOVED, positions)

    return look


def _direct(loaded: LoadedModel) -> Any:
    found = direct_effects(loaded, find_heads(loaded), sweeps.traces()[0], _meter(loaded))
    return np.concatenate([found.heads.ravel(), found.mlps.ravel(), found.biases.ravel(), found.logits.ravel()])


def _nll(loaded: LoadedModel) -> Any:
    readings = [Reading(trace.ids, 3, tuple(SETS[n])) for n, trace in enumerate(sweeps.traces())]
    return np.array(total_nll(loaded, find_heads(loaded), readings, Intervention(0.5)))


def _generated(loaded: LoadedModel) -> Any:
    prompts = sweeps.traces(((24, 4), (17, 3), (9, 3), (5, 2)))  # half of them end early and leave the batch
    limits = (3, 9, 9, 3)
    requests = [Request(prompt.ids, 5, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    found = TransformersEngine(loaded).generate(requests, TracesConfig())
    return np.array([token for completion in found for token in completion.ids], float)


def _scored(mode: Any) -> Look:
    def look(loaded: LoadedModel) -> Any:
        ids, spans = kernels.traces()
        probes = kernels.probe_set(loaded.d_model, (2, 0, 1))
        kernel = Kernel(loaded, probes, kernels.WINDOW, 64, mode)
        assert kernel.trimmed, kernel.trim_reason
        assert kernel.mode == mode, kernel.reason
        return kernel.score(ids, spans).measures

    return look


LOOKS: dict[str, Look] = {
    "states": _states,
    "sweep at closing tokens": _swept("closing", means=False),
    "sweep at all tokens": _swept("all", means=True),
    "attribution at closing tokens": _attributed("closing"),
    "attribution at all tokens": _attributed("all"),
    "direct effects": _direct,
    "perplexity": _nll,
    "generation": _generated,
    "scoring, packed": _scored("packed"),
    "scoring, padded": _scored("padded"),
}


def main(names: list[str]) -> int:
    """Print a line a model and look; the number that differ or fail."""
    expected = {name: {what: look(sweeps.tiny(name)) for what, look in LOOKS.items()} for name in names}
    register()
    failed = 0
    for name in names:
        loaded = sweeps.tiny(name)
        places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
        places |= {f"model.layers.{layer}": int(layer > 0) for layer in range(len(loaded.blocks))}
        with spread(loaded.model, places):
            for what, look in LOOKS.items():
                try:
                    off = float(np.nanmax(np.abs(look(loaded) - expected[name][what])))
                    print(f"{name}: {what}: {'ok' if off < 1e-3 else 'DIFFERS'} ({off:.1e})", flush=True)
                    failed += off >= 1e-3
                except Exception:  # noqa: BLE001
                    print(f"{name}: {what}: FAILED\n{traceback.format_exc()}", flush=True)
                    failed += 1
    return failed


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(bool(main(sys.argv[1:])))
