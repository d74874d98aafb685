"""Loading a checkpoint, checking that clifflab can look inside it, and naming it exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clifflab.config import ModelSpec
from clifflab.errors import InputError
from clifflab.models import gguf
from clifflab.models.hooks import capture
from clifflab.models.placing import as_one_line, check_place, check_weights, device_map
from clifflab.text.formats import FORMATS, ThinkingFormat, resolve_format
from clifflab.text.render import Renderer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".model", ".py")


@dataclass
class LoadedModel:
    """A model that is ready to use.

    Attributes:
        spec: Its configuration.
        model: The causal language model, in eval mode.
        body: The model without its output head.
        blocks: Decoder blocks in order; ``len(blocks)`` layers.
        renderer: Its prompts and traces as token ids.
        stop_ids: Ids that end a turn.
        context: Longest sequence in tokens.
        d_model: Width of the residual stream.
        heads: Its attention heads, once they were asked for (see :func:`clifflab.models.heads.heads_of`).
    """

    spec: ModelSpec
    model: Any
    body: nn.Module
    blocks: nn.ModuleList
    renderer: Renderer
    stop_ids: frozenset[int]
    pad_id: int
    context: int
    d_model: int
    heads: Any = None

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device


def resolve_path(spec: ModelSpec) -> str:
    """The checkpoint folder, GGUF file or hub id that a model spec names.

    Raises:
        InputError: An unknown ``organism:`` name, a package without a GGUF file, or a path-like value that is neither
            a GGUF file nor a folder with a config.
    """
    if spec.path.startswith("organism:"):
        from clifflab.organism import planted_path

        if spec.path != "organism:planted":
            raise InputError("models.path", spec.path, "no such shipped model", "use organism:planted, or build one")
        return str(planted_path())
    if spec.path.startswith(gguf.PACKAGE):
        return str(gguf.package_file(spec.path))
    folder = Path(spec.path).expanduser()
    if folder.is_file() and folder.suffix == ".gguf":
        return str(folder)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            remedy = "give a Hugging Face checkpoint, or a .gguf file"
            raise InputError("models.path", spec.path, "folder holds no config.json", remedy)
        return str(folder)
    if folder.suffix == ".gguf":
        raise InputError("models.path", spec.path, "no such file", "check the path (it counts from the study's folder)")
    if folder.is_absolute() or spec.path.startswith((".", "~")) or spec.path.count("/") > 1:
        raise InputError("models.path", spec.path, "no such folder", "give a checkpoint folder or a hub id")
    return spec.path


def fetch(spec: ModelSpec, note: Callable[[str], None] | None = None) -> str:
    """The checkpoint folder or hub id that a model is loaded from; a GGUF file is dequantised here, once.

    Args:
        spec: A resolved spec.
        note: Told of what takes time (see :func:`clifflab.models.gguf.checkpoint`).
    """
    path = resolve_path(spec)
    return str(gguf.checkpoint(Path(path), note)) if Path(path).is_file() else path


def resolve_spec(spec: ModelSpec) -> ModelSpec:
    """The spec with everything settled that would otherwise depend on when and where it is read.

    ``dtype: auto`` becomes the dtype for this machine, a hub id's branch or tag the commit that it stands for.

    Raises:
        InputError: The model is neither a folder nor on the hub.
    """
    updates: dict[str, Any] = {}
    if spec.dtype == "auto":
        updates["dtype"] = "bfloat16" if torch.cuda.is_available() else "float32"
    path = Path(resolve_path(spec))
    if spec.adapter and not spec.repairs:
        check_adapter(Path(spec.adapter).expanduser())
    if path.is_file():
        gguf.check_file(spec.path, path)
    elif not path.is_dir():
        updates["revision"] = _hub_commit(spec)
    return spec.model_copy(update=updates)


def model_identity(spec: ModelSpec, file_hash: Callable[[Path], str]) -> dict[str, Any]:
    """What makes the model what it is: the bytes of its files, or the hub's commit, and how they are read.

    Args:
        spec: A resolved spec (see :func:`resolve_spec`).
        file_hash: SHA-256 of a file.
    """
    path = resolve_path(spec)
    how = spec.model_dump(include={"dtype", "thinking_format", "system", "trust_remote_code"})
    if spec.adapter and not spec.repairs:
        how["adapter"] = _folder_hash(Path(spec.adapter).expanduser(), file_hash)
    folder = Path(path)
    if folder.is_file():
        return {"gguf": file_hash(folder), "converter": gguf.converter(), **how}
    if not folder.is_dir():
        return {"hub": path, "revision": spec.revision, **how}
    return {"sha256": _folder_hash(folder, file_hash), **how}


def _folder_hash(folder: Path, file_hash: Callable[[Path], str]) -> str:
    """Hash of the files that a checkpoint is loaded from."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _SUFFIXES and file.name != "ground_truth.json":
            digest.update(f"{file.name}:{file_hash(file)}:".encode())
    return digest.hexdigest()


def absolute(spec: ModelSpec) -> ModelSpec:
    """The spec with full paths where it names local files: workers may have another current folder."""

    def full(path: str) -> str:
        place = Path(path).expanduser()
        return str(place.absolute()) if place.exists() else path

    adapter = full(spec.adapter) if spec.adapter and not spec.repairs else spec.adapter
    return spec.model_copy(update={"path": full(spec.path), "adapter": adapter})


def load(spec: ModelSpec) -> LoadedModel:
    """Load a model and its tokenizer and check them.

    Raises:
        InputError: The model is not there, is no causal language model, has no safetensors, lacks weights or holds
            some that are not finite, does not fit, or its blocks cannot be found.
    """
    loaded = _load(spec, lambda tokenizer: resolve_format(spec.thinking_format, tokenizer))
    with as_one_line(spec, "cannot be used", "check the checkpoint's files: clifflab doctor --model"):
        loaded.blocks = find_blocks(loaded.model, spec.path)
        check_blocks(loaded)
    return loaded


def load_bare(spec: ModelSpec) -> LoadedModel:
    """Load a model that only has to write (a guard): no look at its blocks or its thinking.

    Raises:
        InputError: The model is not there, is no causal language model, or has no safetensors.
    """
    return _load(spec, lambda tokenizer: FORMATS["none"])


def _load(spec: ModelSpec, find_format: Callable[[Any], ThinkingFormat]) -> LoadedModel:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    spec = resolve_spec(spec)
    path = fetch(spec)
    cuda = torch.cuda.is_available()
    options: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    with as_one_line(spec, "cannot be loaded", "give a folder or hub id of a safetensors checkpoint"):
        tokenizer = load_tokenizer(path, options)
        form = find_format(tokenizer)  # before the weights, which may take minutes
        spread = device_map(spec)
        given: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=_DTYPES[spec.dtype], use_safetensors=True, output_loading_info=True, **spread, **options
        )
        model, about = given
    if missing := sorted(about["missing_keys"]):  # transformers would go on with random numbers
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        problem = f"cannot be loaded (its files hold no {missing[0]}{more})"
        raise InputError("models.path", spec.path, problem, "get the whole checkpoint")
    with as_one_line(spec, "cannot be made ready", "see whether the GPU is well: nvidia-smi"):
        if spec.adapter:
            from clifflab.tuning.adapter import merge_adapter

            model = merge_adapter(model, Path(spec.adapter).expanduser(), spec)
        model = (model if spread else model.to("cuda" if cuda else "cpu")).eval()
    check_place(model, spec)
    check_weights(model, spec)
    return LoadedModel(
        spec=spec,
        model=model,
        body=model.base_model if model.base_model is not model else model.get_decoder(),
        blocks=nn.ModuleList(),
        renderer=Renderer(tokenizer, form, spec.system),
        stop_ids=_stop_ids(model, tokenizer),
        pad_id=int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0),
        context=int(getattr(_text_config(model), "max_position_embeddings", 1 << 20)),
        d_model=int(_text_config(model).hidden_size),
    )


def load_renderer(spec: ModelSpec) -> Renderer:
    """The model's token ids and text, without its weights.

    Raises:
        InputError: Its tokenizer or its thinking format cannot be used.
    """
    options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    path = fetch(spec)
    with as_one_line(spec, "its tokenizer cannot be loaded", "check the checkpoint's tokenizer files"):
        tokenizer = load_tokenizer(path, options)
    return Renderer(tokenizer, resolve_format(spec.thinking_format, tokenizer), spec.system)


def load_tokenizer(path: str, options: dict[str, Any]) -> Any:
    """The checkpoint's own tokenizer: its ``tokenizer.json`` as it stands, where it has one.

    ``AutoTokenizer`` rebuilds the tokenizers of some model types by rules of the type and drops the file's own (seen
    with a Qwen2 model whose tokenizer is not Qwen2's, as in local copies of R1 distils): the ids change, silently.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils.hub import cached_file

    remote_code = options["trust_remote_code"]
    own = cached_file(path, "tokenizer.json", revision=options["revision"], _raise_exceptions_for_missing_entries=False)
    if own and not remote_code:
        return PreTrainedTokenizerFast.from_pretrained(path, revision=options["revision"])
    return AutoTokenizer.from_pretrained(path, **options)


def check_adapter(folder: Path) -> None:
    """Fail early where a folder holds no adapter that can be loaded.

    Raises:
        InputError: Says what is missing.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            remedy = "give the folder of a PEFT adapter saved as safetensors"
            raise InputError("models.adapter", folder, f"holds no {name}", remedy)


def find_blocks(model: Any, name: str) -> nn.ModuleList:
    """The decoder blocks, by structure: the one list of as many modules as the config counts layers.

    Raises:
        InputError: There is no such list, or more than one.
    """
    count = int(_text_config(model).num_hidden_layers)
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    lists = [m for m in lists if all(any(True for _ in block.children()) for block in m)]
    if len(lists) != 1:
        problem = f"has {len(lists)} lists of {count} blocks where one is expected"
        raise InputError("models.path", name, problem, "use a decoder-only architecture")
    return lists[0]


@torch.inference_mode()
def check_blocks(loaded: LoadedModel) -> None:
    """Check on a real forward pass that hooks see the residual stream that the model itself reports.

    Raises:
        InputError: A captured state has the wrong shape or differs from the model's own ``hidden_states``.
    """
    ids = torch.tensor([loaded.renderer.prompt_ids([{"role": "user", "content": "hello"}])], device=loaded.device)
    got: dict[int, torch.Tensor] = {}
    layers = range(len(loaded.blocks))
    with capture(loaded.blocks, layers, lambda layer, hidden: got.__setitem__(layer, hidden)):
        output = loaded.body(input_ids=ids, use_cache=False, output_hidden_states=True)
    # The model's list starts with the embeddings and ends with the normed last state, which is left out here.
    for layer, own in enumerate(output.hidden_states[1:-1]):
        if not torch.isfinite(own).all():
            problem = f"yields numbers that are not finite (residual states after block {layer})"
            raise InputError("models.path", loaded.spec.path, problem, "use dtype float32, or check the checkpoint")
        same = got[layer].shape == (1, ids.shape[1], loaded.d_model) and torch.equal(got[layer].to(own.device), own)
        if not same:
            problem = f"the state after block {layer} is not the model's own residual stream"
            raise InputError("models.path", loaded.spec.path, problem, "this architecture is not supported")


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    stop: set[int] = set()
    for value in (tokenizer.eos_token_id, getattr(model.generation_config, "eos_token_id", None)):
        stop.update([value] if isinstance(value, int) else value or [])
    return frozenset(stop)


def _hub_commit(spec: ModelSpec) -> str:
    from huggingface_hub import HfApi
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        return str(HfApi().model_info(spec.path, revision=spec.revision, timeout=10).sha)
    except Exception:  # noqa: BLE001, S110 - the client's errors change with its version; the cache is asked next
        pass
    try:
        config = cached_file(spec.path, "config.json", revision=spec.revision, local_files_only=True)
        commit = extract_commit_hash(config, None)
    except (OSError, ValueError):
        commit = None
    if commit is None:
        remedy = "give a checkpoint folder, or check the hub id, the network and the login"
        raise InputError("models.path", spec.path, "no such folder, and not to be had from the hub", remedy)
    return str(commit)
