"""A tuning from a file of examples to a folder with an adapter (or all weights), its card and its figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clifflab import __version__
from clifflab.artifacts import read_json, write_json
from clifflab.config import ModelSpec, TuneConfig
from clifflab.errors import InputError, OutputError
from clifflab.models.export import copy_files, source_folder
from clifflab.models.loading import LoadedModel
from clifflab.tuning.adapter import ABOUT, base_name, save_adapter, weight_sample
from clifflab.tuning.card import card
from clifflab.tuning.examples import read_rows
from clifflab.tuning.group import Group, together, write_folder
from clifflab.tuning.job import Prepared, prepare, trainable
from clifflab.tuning.loop import Listen, NonFiniteLossError, train
from clifflab.tuning.state import Progress

FIGURES, BROKEN = "tuning.json", "not_finite.json"
_HOW = (
    "workers",
    "max_failures",
    "micro_tokens",
    "checkpointing",
    "save_every",
)  # how the work is carried out, no part of the recipe
_IDENTITY = ("hub", "revision", "sha256", "gguf")


@dataclass(frozen=True)
class Order:
    """What is to be tuned on what, and where the result goes; plain data that crosses process borders.

    Attributes:
        data: File of examples (see :func:`clifflab.tuning.examples.read_rows`).
        sha256: Hash of its bytes.
        out: Folder for ``adapter/`` or ``model/``, and ``tuning.json``.
        settings: The recipe.
        seed: Of the adapter's weights, the held-out groups and the order of the examples.
        base: What the base model is (:func:`clifflab.models.loading.model_identity`).
        fingerprint: Of everything that the result follows from.
        field: What error lines call the file.
    """

    data: str
    sha256: str
    out: Path
    settings: TuneConfig
    seed: int
    base: dict[str, Any]
    fingerprint: str
    field: str = "--data"


def tune(loaded: LoadedModel, order: Order, group: Group, listen: Listen | None = None) -> dict[str, Any]:
    """Train one model, write the result and leave the model as it was.

    Every worker calls it; the first one writes. The figures (``tuning.json``) are written last.

    Raises:
        InputError: The data holds no usable example, or does not suit the model or the number of workers.
        NonFiniteLossError: The loss is no number; ``not_finite.json`` names the step and the examples.
        OutputError: The result cannot be written.
    """
    settings, seed = order.settings, order.seed
    rows, rejects = read_rows(order.data, order.field)
    prepared = prepare(loaded, rows, settings, seed)
    prepared.encoded.rejects[:0] = rejects
    sample = weight_sample(loaded.model)
    try:
        with trainable(loaded, settings, seed) as peft:
            progress = train(loaded.model, prepared.data, settings, seed, group, listen=listen)
            figures = _figures(loaded, order, prepared, progress, group.size)
            about = _about(loaded.spec, order, figures, sample)
            together(group, lambda: _write(loaded, peft, order, about, figures), loaded.device)
    except NonFiniteLossError as error:
        if group.rank == 0:
            write_json(order.out / BROKEN, error.report)
        raise error.at(order.out / BROKEN) from None
    except torch.OutOfMemoryError as error:
        remedy = "lower it, set tune.checkpointing to on, or leave out the longest examples"
        problem = f"a forward pass does not fit the GPU's memory ({error})"
        raise InputError("tune.micro_tokens", settings.micro_tokens, problem, remedy) from None
    return figures


def result_folder(out: Path, settings: TuneConfig) -> Path:
    """Where the weights of a tuning are."""
    return out / ("adapter" if settings.method == "lora" else "model")


def _write(loaded: LoadedModel, peft: Any, order: Order, about: dict[str, Any], figures: dict[str, Any]) -> None:
    place = result_folder(order.out, order.settings)
    if peft is not None:
        write_folder(place, lambda folder: save_adapter(peft, folder, about))
    else:
        write_folder(place, lambda folder: save_model(loaded, folder, about))
    figures["files"] = sorted(str(file.relative_to(order.out)) for file in place.iterdir())
    figures["sizes"] = {file: (order.out / file).stat().st_size for file in figures["files"]}
    (order.out / BROKEN).unlink(missing_ok=True)
    write_json(order.out / FIGURES, figures)


def save_model(loaded: LoadedModel, folder: Path, about: dict[str, Any]) -> None:
    """Write all weights of a model that was tuned as a whole, in the dtype that it was loaded in, and its card."""
    dtype = getattr(torch, loaded.spec.dtype)
    weights = {name: tensor.to(dtype) for name, tensor in loaded.model.state_dict().items()}
    write_weights(loaded, folder, weights, loaded.spec.dtype)
    write_json(folder / ABOUT, about)
    (folder / "README.md").write_bytes(card(about).encode())
    for file in folder.iterdir():  # weights are written for their owner alone; whoever serves them reads them
        file.chmod((folder / "README.md").stat().st_mode)


def write_weights(loaded: LoadedModel, folder: Path, weights: dict[str, torch.Tensor], dtype: str) -> None:
    """Write a model's weights as safetensors beside its source's own tokenizer and config.

    Args:
        loaded: The model.
        folder: An existing folder.
        weights: Its state.
        dtype: Of these weights; the written config says so.
    """
    from transformers import GenerationConfig

    model = loaded.model
    # The source's own is copied, whatever it says; saving would refuse some.
    own, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        model.generation_config = own
    copy_files(source_folder(loaded.spec), folder)
    config = read_json(folder / "config.json")
    if dtype not in (config.get("dtype"), config.get("torch_dtype")):
        config.pop("torch_dtype", None)
        write_json(folder / "config.json", {**config, "dtype": dtype})


def recipe(settings: TuneConfig) -> dict[str, Any]:
    """The settings that decide the result, with the learning rate in numbers."""
    told = settings.model_dump(mode="json", exclude=set(_HOW))
    return {**told, "learning_rate": settings.peak}


def _figures(loaded: LoadedModel, order: Order, prepared: Prepared, progress: Progress, workers: int) -> dict[str, Any]:
    data, encoded = prepared.data, prepared.encoded
    parameters = list(loaded.model.parameters())
    return {
        "reason": "",
        "fingerprint": order.fingerprint,
        "method": order.settings.method,
        "recipe": recipe(order.settings),
        "seed": order.seed,
        "workers": workers,
        "examples": {
            "train": len(data.train),
            "validation": len(data.held),
            "rejected": encoded.reasons,
            "cut": encoded.cut,
        },
        "tokens": {
            "epoch": sum(len(example.ids) for example in data.train),
            "learnt": sum(example.targets for example in data.train),
        },
        "steps": progress.step,
        "stopped_early": progress.stopped_early,
        "best": progress.best,
        "curve": progress.curve,
        "validation": progress.validation,
        "parameters": {
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "all": sum(p.numel() for p in parameters),
        },
        "files": [],
        "sizes": {},
    }


def _about(spec: ModelSpec, order: Order, figures: dict[str, Any], sample: dict[str, list[float]]) -> dict[str, Any]:
    """What the card says: of the data numbers alone, of this machine nothing."""
    curve, best = figures["curve"], figures["best"]
    return {
        "kind": "adapter" if order.settings.method == "lora" else "tuned",
        "clifflab": __version__,
        "base": {
            "name": base_name(spec),
            **{key: order.base[key] for key in _IDENTITY if order.base.get(key)},
            "dtype": spec.dtype,
            "thinking_format": spec.thinking_format,
            "sample": sample,
        },
        "recipe": figures["recipe"],
        "seed": order.seed,
        "data": {"sha256": order.sha256},
        **{key: figures[key] for key in ("examples", "tokens", "steps", "stopped_early", "fingerprint")},
        "loss": {
            "first": curve[0]["loss"],
            "last": curve[-1]["loss"],
            "best": best["loss"] if best else None,
        },
    }


def check_finished(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """The figures of a tuning that is whole already; ``None`` where it is still to do.

    Raises:
        OutputError: The folder holds something else.
    """
    if out.exists() and not out.is_dir():
        raise OutputError("--out", out, "is a file", "choose a new or empty folder")
    figures = read_json(out / FIGURES)
    if figures is None:
        ours = {".work", ".lock", "status.json", BROKEN, "adapter", "model"}
        found = list(out.iterdir()) if out.is_dir() else []
        others = [path.name for path in found if path.name not in ours and not path.match(".*.tmp")]
        if others:
            raise OutputError("--out", out, f"holds something else ({others[0]})", "choose a new or empty folder")
        return None
    if figures.get("fingerprint") != fingerprint:
        problem = "holds a tuning of another model, with other data or settings, or by another version"
        raise OutputError("--out", out, problem, "choose a new or empty folder")
    whole: dict[str, Any] = figures
    sizes = figures["sizes"]
    kept = all((out / f).is_file() and (out / f).stat().st_size == sizes[f] for f in figures["files"])
    return whole if kept else None
