"""Loading a checkpoint, checking that clifflab can look inside it, and naming it exactly."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clifflab.config import ModelSpec
from clifflab.errors import InputError
from clifflab.models.hooks import capture
from clifflab.text.formats import resolve_format
from clifflab.text.render import Renderer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WHOLE_HASH_BYTES = 2 << 30


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

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device


def resolve_path(spec: ModelSpec) -> str:
    """The checkpoint folder or hub id that a model spec names.

    Raises:
        InputError: An unknown ``organism:`` name, or a path-like value that is no folder with a config.
    """
    if spec.path.startswith("organism:"):
        from clifflab.organism import planted_path

        if spec.path != "organism:planted":
            raise InputError("models.path", spec.path, "no such shipped model", "use organism:planted, or build one")
        return str(planted_path())
    folder = Path(spec.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError("models.path", spec.path, "folder holds no config.json", "give a Hugging Face checkpoint")
        return str(folder)
    if folder.is_absolute() or spec.path.startswith((".", "~")) or spec.path.count("/") > 1:
        raise InputError("models.path", spec.path, "no such folder", "give a checkpoint folder or a hub id")
    return spec.path


def model_identity(spec: ModelSpec) -> dict[str, Any]:
    """What makes the model what it is: a hash of its files, or the hub's commit.

    Weights over 2 GiB enter by their size and their first and last MiB (safetensors headers included), which the
    ``files`` field says.
    """
    path = resolve_path(spec)
    folder = Path(path)
    common = {"dtype": spec.dtype, "thinking_format": spec.thinking_format, "system": spec.system}
    if not folder.is_dir():
        return {"hub": path, "revision": _hub_commit(spec), **common}
    files = sorted(
        f
        for f in folder.iterdir()
        if f.is_file() and f.suffix in (".json", ".safetensors", ".jinja", ".txt", ".model", ".py")
    )
    files = [f for f in files if f.name != "ground_truth.json"]
    whole = sum(f.stat().st_size for f in files) <= _WHOLE_HASH_BYTES
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as handle:
            if whole or size <= 2 << 20:
                while block := handle.read(1 << 20):
                    digest.update(block)
            else:
                digest.update(handle.read(1 << 20))
                handle.seek(-(1 << 20), 2)
                digest.update(handle.read())
    return {"sha256": digest.hexdigest(), "files": "whole" if whole else "ends", **common}


def load(spec: ModelSpec) -> LoadedModel:
    """Load a model and its tokenizer and check them.

    Raises:
        InputError: The model is not there, is no causal language model, has no safetensors, or its blocks cannot be
            found.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = resolve_path(spec)
    cuda = torch.cuda.is_available()
    dtype = _DTYPES.get(spec.dtype, torch.bfloat16 if cuda else torch.float32)
    options: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    try:
        tokenizer = load_tokenizer(path, options)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        problem = f"cannot be loaded ({str(error).strip().splitlines()[0] if str(error).strip() else error!r})"
        raise InputError(
            "models.path", spec.path, problem, "give a folder or hub id of a safetensors checkpoint"
        ) from None
    model = model.to("cuda" if cuda else "cpu").eval()  # type: ignore[arg-type]
    form = resolve_format(spec.thinking_format, tokenizer)
    loaded = LoadedModel(
        spec=spec,
        model=model,
        body=model.base_model,
        blocks=find_blocks(model, spec.path),
        renderer=Renderer(tokenizer, form, spec.system),
        stop_ids=_stop_ids(model, tokenizer),
        pad_id=int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0),
        context=int(getattr(_text_config(model), "max_position_embeddings", 1 << 20)),
        d_model=int(_text_config(model).hidden_size),
    )
    check_blocks(loaded)
    return loaded


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
        if got[layer].shape != (1, ids.shape[1], loaded.d_model) or not torch.equal(got[layer], own):
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
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        return str(HfApi().model_info(spec.path, revision=spec.revision, timeout=10).sha)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
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
