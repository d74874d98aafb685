"""A checkpoint with heads scaled in its output projections, which any engine serves without code of ours.

Scaling what a head puts into its output projection by gamma is the same as scaling the projection's columns for that
head by gamma, so the written model is the hooked one. That is checked before the checkpoint takes its name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from clifflab.artifacts import output_error, read_json
from clifflab.config import ModelSpec
from clifflab.errors import InputError, InterventionError, OutputError
from clifflab.models.heads import Head, HeadMap, heads_of
from clifflab.models.intervene import Intervention, intervene
from clifflab.models.loading import LoadedModel, fetch, load

# Files that a tokenizer may consist of, copied as they stand.
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
)
_AS_THEY_STAND = ("config.json", "generation_config.json")
_DTYPES = ("float32", "bfloat16", "float16")
_PROMPT = "Explain in a few sentences how the tides work, and say when the next spring tide is due."
Describe = Callable[[dict[str, Any]], dict[str, str]]


def export_ablated(
    spec: ModelSpec, chosen: Sequence[Head], intervention: Intervention, out: Path, describe: Describe
) -> dict[str, Any]:
    """Write the model with chosen heads scaled as a Hugging Face checkpoint.

    The checkpoint keeps the dtype of the one that it is made from. It is written beside its place, loaded from there
    and compared with the hooked model, and only then renamed; what goes wrong leaves nothing behind.

    Args:
        spec: The model; its own code is never run.
        chosen: Heads to scale.
        intervention: By how much: its ``gamma``.
        out: Folder to make; it may be there if it is empty.
        describe: Called with what was written and how it was checked; gives further files by name.

    Returns:
        What ``describe`` was told: ``dtype, layers, heads_total, check``.

    Raises:
        InputError: The model cannot be used, lacks a head, or the intervention is no scaling.
        OutputError: The folder is not empty or cannot be written.
        InterventionError: The written model is not the hooked one.
    """
    if intervention.means is not None or intervention.renormalise:
        what = "renormalised heads" if intervention.renormalise else "heads replaced by their means"
        problem = f"{what} depend on each token, so no fixed weight does that"
        raise InputError(
            "export", what, problem, "export heads scaled by a gamma alone: --checkpoint MODEL --heads ..."
        )
    if not chosen:
        raise InputError("--heads", "", "no head is named", "give some as layer.head, e.g. 4.2,6.2")
    from transformers import GenerationConfig

    out = out.resolve()
    check_out(out)
    spec = spec.model_copy(update={"dtype": own_dtype(spec), "trust_remote_code": False})
    loaded = load(spec)
    heads = heads_of(loaded)
    heads.check(chosen, "--heads")
    source = source_folder(spec)
    hooked, plain = _logits(loaded, heads, chosen, intervention), _logits(loaded, heads, (), intervention)
    about: dict[str, Any] = {
        "dtype": spec.dtype,
        "layers": len(heads.layers),
        "heads_total": len(heads),
    }
    with beside(out) as scratch:
        scale(heads, chosen, intervention.gamma)
        # The source's own is copied, whatever it says; saving would refuse some.
        loaded.model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        loaded.model.save_pretrained(scratch)
        del loaded, heads  # two copies of a large model need not fit
        copy_files(source, scratch)
        about["check"] = _check(spec, scratch, hooked, plain, intervention)
        for name, text in describe(about).items():
            (scratch / name).write_bytes(text.encode())
            for file in scratch.iterdir():  # weights are written for their owner alone; whoever serves them reads them
                file.chmod((scratch / name).stat().st_mode)
    return about


def check_out(out: Path) -> None:
    """Refuse a place that holds something.

    Raises:
        OutputError: It does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problem = "is not empty" if out.is_dir() else "is a file"
        raise OutputError("--out", out, problem, "choose a new or empty folder")


def own_dtype(spec: ModelSpec) -> Any:
    """The dtype that a checkpoint is stored in; float32 where it says none that clifflab loads."""
    from transformers.utils.hub import cached_file

    path = cached_file(fetch(spec), "config.json", revision=spec.revision)
    config = read_json(Path(str(path))) or {}
    nested = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    named = [str(part.get(key)).removeprefix("torch.") for part in nested for key in ("dtype", "torch_dtype")]
    return next((name for name in named if name in _DTYPES), "float32")


@torch.no_grad()
def scale(heads: HeadMap, chosen: Sequence[Head], gamma: float) -> None:
    """Scale the columns of the output projections that chosen heads own, in place; biases stay."""
    for index, head in set(chosen):
        layer = heads.layers[index]
        layer.weight[:, layer.columns(head)] *= gamma


def copy_files(source: Path, target: Path) -> None:
    """Copy the tokenizer, the config and the generation config as they stand."""
    (target / "generation_config.json").unlink(missing_ok=True)  # stays away where the source has none
    for pattern in (*_TOKENIZER, *_AS_THEY_STAND):
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def source_folder(spec: ModelSpec) -> Path:
    """The folder that a model's small files are in; a hub id's are fetched."""
    path = fetch(spec)
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=spec.revision, allow_patterns=[*_TOKENIZER, *_AS_THEY_STAND]))


@torch.inference_mode()
def _logits(loaded: LoadedModel, heads: HeadMap, chosen: Sequence[Head], intervention: Intervention) -> torch.Tensor:
    """Next-token logits at every token of a prompt, on the CPU."""
    ids = torch.tensor([loaded.renderer.prompt_ids([{"role": "user", "content": _PROMPT}])], device=loaded.device)
    with intervene(heads, [chosen], intervention):
        logits: torch.Tensor = loaded.model(input_ids=ids, use_cache=False).logits
    return logits.cpu()


def _check(
    spec: ModelSpec, folder: Path, hooked: torch.Tensor, plain: torch.Tensor, intervention: Intervention
) -> dict[str, Any]:
    """Load what was written and compare it with the hooked model.

    Columns of zeros add exactly what values of zero add, so in float32 a removal must agree bit for bit; elsewhere the
    factor is rounded at another place, and the logits agree to the rounding of the dtype.
    """
    written = load(spec.model_copy(update={"path": str(folder.absolute()), "revision": None, "adapter": None}))
    logits = _logits(written, heads_of(written), (), intervention)
    exact = spec.dtype == "float32" and intervention.gamma == 0
    bound = 0.0 if exact else {"bfloat16": 4e-2, "float16": 1e-2}.get(spec.dtype, 1e-4) * float(hooked.abs().max())
    difference = float((logits.float() - hooked.float()).abs().max())
    if not difference <= bound:
        raise InterventionError(
            f"the written checkpoint differs from the hooked model (logits by {difference:.3g}, {bound:.3g} allowed): "
            "nothing was kept"
        )
    return {
        "largest_difference_of_logits": difference,
        "allowed": bound,
        "largest_change_of_logits": float((plain.float() - hooked.float()).abs().max()),
        "tokens": hooked.shape[1],
    }


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A new folder beside ``out`` that takes its place at the end of a ``with`` that ends well.

    Raises:
        OutputError: The disk is full or cannot be written.
    """
    scratch = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        scratch.mkdir(parents=True)
        yield scratch
        os.replace(scratch, out)
    except OSError as error:
        raise output_error(out, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
