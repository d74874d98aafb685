"""Models with the sizes of well-known ones and random weights: for speed, which weights do not change.

Sizes are those of the models' published configurations.
"""

from __future__ import annotations

from typing import Any

import torch

from clifflab.config import ModelSpec
from clifflab.errors import InputError
from clifflab.models.loading import LoadedModel, find_blocks

PREFIX = "geometry:"
_LOUD = 8.0
_SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip
_QWEN25_15B = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}  # fmt: skip
_QWEN25_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip
_TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 2048,
}  # fmt: skip
GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": ("llama", _SMOLLM2),
    "qwen2.5-1.5b": ("qwen2", _QWEN25_15B),
    "qwen2.5-7b": ("qwen2", _QWEN25_7B),
    "tiny": ("llama", _TINY),
}


def random_model(path: str, dtype: str, seed: int) -> LoadedModel:
    """A model of one of :data:`GEOMETRIES` with random weights, on the GPU where there is one.

    Args:
        path: ``geometry:NAME``.
        dtype: Name of a torch dtype.
        seed: Of the weights.

    Raises:
        InputError: No such geometry.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = path.removeprefix(PREFIX)
    if name not in GEOMETRIES:
        raise InputError("--model", path, "no such geometry", f"choose from {', '.join(GEOMETRIES)}, or a checkpoint")
    kind, sizes = GEOMETRIES[name]
    config = AutoConfig.for_model(kind, **sizes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        make: Any = AutoModelForCausalLM.from_config
        model = make(config, dtype=getattr(torch, dtype)).eval()
        for name, parameter in model.named_parameters():
            if "o_proj.weight" in name:
                parameter.data.mul_(_LOUD)  # so that a head's effect stands out of the rounding
    spec = ModelSpec(name=name, path=path, dtype=dtype)  # type: ignore[arg-type]
    return LoadedModel(
        spec=spec,
        model=model,
        body=model.base_model,
        blocks=find_blocks(model, path),
        renderer=_Ids(config.vocab_size),  # type: ignore[arg-type]
        stop_ids=frozenset(),
        pad_id=0,
        context=int(config.max_position_embeddings),
        d_model=int(config.hidden_size),
    )


class _Ids:
    """Stands where a tokenizer's renderer does: random weights have no language."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def prompt_ids(self, _messages: Any) -> list[int]:
        """Ids for a check on a short sequence."""
        return [number % self._vocabulary for number in range(1, 200, 13)]
