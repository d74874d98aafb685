"""A model's sizes from its configuration alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass

from clifflab.config import ModelSpec
from clifflab.errors import ClifflabError, InputError
from clifflab.models.loading import fetch


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model.

    Attributes:
        layers: Decoder blocks.
        width: Of the residual stream.
        context: Longest sequence in tokens.
    """

    layers: int
    width: int
    context: int


def model_sizes(spec: ModelSpec) -> Sizes:
    """Sizes of the model of a resolved spec.

    Raises:
        InputError: Its configuration cannot be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            fetch(spec), revision=spec.revision, trust_remote_code=spec.trust_remote_code
        ).get_text_config()
        return Sizes(
            layers=int(config.num_hidden_layers),
            width=int(config.hidden_size),
            context=int(getattr(config, "max_position_embeddings", 1 << 20)),
        )
    except ClifflabError:
        raise
    except Exception as error:  # noqa: BLE001 - configurations check themselves, each with errors of its own
        lines = str(error).strip().splitlines() or [repr(error)]
        problem = f"its configuration cannot be read ({lines[0]})"
        raise InputError("models.path", spec.path, problem, "give a Hugging Face checkpoint") from None
