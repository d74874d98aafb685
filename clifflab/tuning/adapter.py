"""LoRA adapters: attached to a model, written in PEFT's own format, checked and merged."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from clifflab.artifacts import read_json, write_json, write_text
from clifflab.config import ModelSpec, TuneConfig
from clifflab.errors import InputError, shorten
from clifflab.models.loading import LoadedModel

CONFIG, WEIGHTS, ABOUT = "adapter_config.json", "adapter_model.safetensors", "clifflab.json"
ADAPTER_FILES = (CONFIG, WEIGHTS, "README.md", ABOUT)
_ALL = "all-linear"
_SAMPLE = 256  # weights that name a base model


def attach(loaded: LoadedModel, settings: TuneConfig, seed: int) -> Any:
    """Put a new adapter into the model's linear layers, in place; it changes nothing until it is trained.

    Args:
        loaded: The model; its own weights no longer require a gradient.
        settings: Rank, scale and which layers.
        seed: Of its weights, which are float32.

    Returns:
        The PEFT model around it.

    Raises:
        InputError: A module name fits no linear layer.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=_ALL if settings.modules == (_ALL,) else _checked(loaded, settings.modules),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers stored transposed, which PEFT then sets itself
        torch.manual_seed(seed)
        return get_peft_model(loaded.model, config)


def detach(peft: Any) -> None:
    """Take an adapter out again: the model's own modules are back in their places, with their weights."""
    peft.base_model.unload()


def _checked(loaded: LoadedModel, names: tuple[str, ...]) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    linear = [name for name, module in loaded.model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    for name in names:
        if not any(own == name or own.endswith(f".{name}") for own in linear):
            known = ", ".join(sorted({own.rpartition(".")[2] for own in linear}))
            raise InputError(
                "tune.modules", name, "the model has no such linear layer", f"choose {_ALL}, or of {known}"
            )
    return sorted(names)


def base_name(spec: ModelSpec) -> str:
    """What an adapter calls its base model: a hub id, ``organism:`` or ``package:`` name, else the folder's name."""
    local = Path(spec.path).expanduser()
    return local.resolve().name if local.exists() else spec.path


def save_adapter(peft: Any, folder: Path, about: dict[str, Any]) -> None:
    """Write an adapter that plain PEFT loads, its model card, and the same as data.

    Args:
        peft: What :func:`attach` gave.
        folder: An existing folder.
        about: See :func:`clifflab.tuning.card.card`; the base model's ``sample`` must be in it.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    from clifflab.tuning.card import card

    tensors = get_peft_model_state_dict(peft, save_embedding_layers=False)
    save_file(
        {k: v.detach().contiguous().cpu() for k, v in sorted(tensors.items())}, folder / WEIGHTS, {"format": "pt"}
    )
    config = peft.peft_config["default"]
    config.save_pretrained(str(folder))
    written = json.loads((folder / CONFIG).read_text())
    written["target_modules"] = sorted(config.target_modules)  # a set, whose order changes from run to run
    written["inference_mode"] = True
    written["base_model_name_or_path"] = about["base"]["name"]  # PEFT puts a path of this machine there
    write_json(folder / CONFIG, written)
    write_json(folder / ABOUT, about)
    write_text(folder / "README.md", card(about))


def find_adapter(folder: Path) -> Path:
    """The adapter in a folder: the folder itself, or the one inside that a tuning wrote."""
    inside = folder / "adapter"
    return inside if not (folder / CONFIG).exists() and (inside / CONFIG).exists() else folder


def weight_sample(model: Any) -> dict[str, list[float]]:
    """What tells a base model from any other, whatever file it came from; to be taken without an adapter.

    Returns:
        ``values``, a few weights rounded to bfloat16, and ``sizes``, the mean absolute value of each weight matrix.
    """
    own = [parameter.detach() for _, parameter in sorted(model.named_parameters()) if parameter.dim() > 1]
    values = []
    for number, place in enumerate(torch.linspace(0, len(own) - 1, _SAMPLE).long().tolist()):
        flat = own[place].flatten()
        values.append(float(flat[(number * 7919 + 13) % len(flat)].to(torch.bfloat16)))
    sizes = [float(torch.linalg.vector_norm(p, ord=1, dtype=torch.float32)) / p.numel() for p in own]
    return {"values": values, "sizes": sizes}


def merge_adapter(model: Any, folder: Path, spec: ModelSpec) -> Any:
    """Add a LoRA adapter to the weights of a freshly loaded model, in place.

    Args:
        model: The base model, as transformers loaded it.
        folder: An adapter in PEFT's format.
        spec: The model's configuration, for error lines.

    Returns:
        The same model, with no trace of PEFT but its changed weights.

    Raises:
        InputError: No adapter, one of another kind, or one of another base model.
    """
    peft = load_adapter(model, folder, spec)
    try:
        return peft.base_model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise _unfit(folder, f"cannot be merged ({error})") from None


def load_adapter(model: Any, folder: Path, spec: ModelSpec) -> Any:
    """Put a written adapter into a model, as it is, after checking that it belongs there.

    Returns:
        The PEFT model.

    Raises:
        InputError: See :func:`merge_adapter`.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, about = read_json(folder / CONFIG), read_json(folder / ABOUT)
    if not isinstance(config, dict):
        raise _unfit(folder, f"holds no {CONFIG}")
    if config.get("peft_type") != "LORA":
        raise _unfit(folder, f"is an adapter of kind {config.get('peft_type')}, and only LORA is merged")
    if not (folder / WEIGHTS).is_file():
        raise _unfit(folder, f"holds no {WEIGHTS}")
    _check_base(model, folder, about, spec)
    try:
        tensors = load_file(folder / WEIGHTS)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft = get_peft_model(model, LoraConfig.from_pretrained(str(folder)))
            loading: Any = set_peft_model_state_dict(peft, tensors)
    except SafetensorError as error:
        raise _unfit(folder, f"its weights are damaged ({error})") from None
    except (RuntimeError, ValueError, TypeError) as error:  # shapes or module names that the model does not have
        found = re.search(r"size mismatch for (\S+):", str(error))
        first = f"sizes of {found[1]} differ" if found else shorten(error)
        raise _unfit(folder, f"does not fit {spec.path}, it was made for another base model ({first})") from None
    unmatched = [*loading.unexpected_keys, *(name for name in loading.missing_keys if "lora_" in name)]
    if unmatched:
        problem = f"does not fit {spec.path}, it was made for another base model (no match for {unmatched[0]})"
        raise _unfit(folder, problem)
    return peft


def _check_base(model: Any, folder: Path, about: Any, spec: ModelSpec) -> None:
    """Compare the model with what an adapter of ours says of its base."""
    base = about.get("base") if isinstance(about, dict) else None
    sample = base.get("sample") if isinstance(base, dict) else None
    if not sample:
        return
    own = weight_sample(model)
    # A checkpoint in float32 that is loaded as float16 is rounded twice: one step of bfloat16 is then no difference.
    slack = 2.0**-7 if "float16" in (spec.dtype, about["base"].get("dtype")) else 0.0
    if not (_close(own["values"], sample["values"], slack) and _close(own["sizes"], sample["sizes"], 1e-3)):
        name = about["base"].get("name", "another model")
        raise _unfit(folder, f"was made for another base model ({name}); the weights of {spec.path} are not the same")


def _close(own: list[float], other: list[float], slack: float) -> bool:
    least = 2.0**-24 if slack else 0.0  # the smallest step of float16
    return len(own) == len(other) and all(abs(a - b) <= slack * abs(b) + least for a, b in zip(own, other, strict=True))


def _unfit(folder: Path, problem: str) -> InputError:
    return InputError("adapter", folder, problem, "give a LoRA adapter of this very model, in PEFT's format")
