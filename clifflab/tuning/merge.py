"""A checkpoint with an adapter added to its weights, which any engine serves without PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clifflab import __version__
from clifflab.artifacts import file_hash, read_json, write_json
from clifflab.config import ModelSpec
from clifflab.errors import InterventionError
from clifflab.models.export import beside, check_out, own_dtype
from clifflab.models.loading import LoadedModel, load_bare
from clifflab.tuning.adapter import ABOUT, CONFIG, WEIGHTS, find_adapter, load_adapter, merge_adapter
from clifflab.tuning.card import card
from clifflab.tuning.run import write_weights

_PROMPT = "Explain in a few sentences how the tides work, and say when the next spring tide is due."
_ROUNDING = {"bfloat16": 5e-2, "float16": 1e-2}  # of the logits' size: a sum of weights is rounded once more


def export_merged(spec: ModelSpec, adapter: Path, out: Path, source: dict[str, Any]) -> dict[str, Any]:
    """Write a model with an adapter merged as a Hugging Face checkpoint.

    The checkpoint keeps the dtype of the one that it is made from. It is written beside its place, loaded from there
    and compared with the model that has the adapter beside its weights, and only then renamed.

    Args:
        spec: The base model; its own code is never run.
        adapter: Folder of the adapter.
        out: Folder to make; it may be there if it is empty.
        source: What the base model is, for the card: its name and its bytes or the hub's commit.

    Returns:
        What ``clifflab.json`` says of it.

    Raises:
        InputError: The model or the adapter cannot be used, or they do not belong together.
        OutputError: The folder is not empty or cannot be written.
        InterventionError: The written model is not the adapted one.
    """
    out, adapter = out.resolve(), find_adapter(adapter)
    check_out(out)
    spec = spec.model_copy(update={"dtype": own_dtype(spec), "trust_remote_code": False, "adapter": None})
    loaded = load_bare(spec)
    plain = _logits(loaded)
    peft = load_adapter(loaded.model, adapter, spec)
    adapted = _logits(loaded)
    peft.base_model.unload()
    merge_adapter(loaded.model, adapter, spec)
    about: dict[str, Any] = {
        **(read_json(adapter / ABOUT) or {}),
        "kind": "merged",
        "clifflab": __version__,
        "source": source,
        "adapter": {"sha256": file_hash(adapter / WEIGHTS), "config": read_json(adapter / CONFIG)},
        "dtype": spec.dtype,
        "layers": int(loaded.model.config.get_text_config().num_hidden_layers),
    }
    about["adapter"]["config"].pop("base_model_name_or_path", None)  # may be a path of some machine
    with beside(out) as scratch:
        write_weights(loaded, scratch, loaded.model.state_dict(), spec.dtype)
        del loaded, peft  # two copies of a large model need not fit
        about["check"] = _check(spec, scratch, adapted, plain)
        write_json(scratch / ABOUT, about)
        (scratch / "README.md").write_bytes(card(about).encode())
        for file in scratch.iterdir():
            file.chmod((scratch / "README.md").stat().st_mode)
    return about


@torch.inference_mode()
def _logits(loaded: LoadedModel) -> torch.Tensor:
    """Next-token logits at every token of a prompt, on the CPU."""
    ids = torch.tensor([loaded.renderer.prompt_ids([{"role": "user", "content": _PROMPT}])], device=loaded.device)
    logits: torch.Tensor = loaded.model(input_ids=ids, use_cache=False).logits
    return logits.float().cpu()


def _check(spec: ModelSpec, folder: Path, adapted: torch.Tensor, plain: torch.Tensor) -> dict[str, Any]:
    """Load what was written and compare it with the adapted model."""
    logits = _logits(load_bare(spec.model_copy(update={"path": str(folder.absolute()), "revision": None})))
    bound = _ROUNDING.get(spec.dtype, 1e-4) * float(adapted.abs().max())
    difference = float((logits - adapted).abs().max())
    change = float((plain - adapted).abs().max())
    if difference > change / 2 and change > 0:
        raise InterventionError(
            f"the adapter does not survive the rounding of {spec.dtype}: it moves the logits by {change:.3g}, and the "
            f"written checkpoint is {difference:.3g} away; nothing was kept (merge it into a float32 checkpoint)"
        )
    if not difference <= bound:
        raise InterventionError(
            f"the written checkpoint differs from the adapted model (logits by {difference:.3g}, {bound:.3g} allowed): "
            "nothing was kept"
        )
    return {
        "largest_difference_of_logits": difference,
        "allowed": bound,
        "largest_change_of_logits": change,
        "tokens": logits.shape[1],
    }
