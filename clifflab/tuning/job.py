"""A whole tuning of one model: rows in, weights and figures out; or the tuned model for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from clifflab.config import TuneConfig
from clifflab.models.loading import LoadedModel
from clifflab.tuning.adapter import attach, detach
from clifflab.tuning.examples import Encoded, encode, hold_out
from clifflab.tuning.group import Alone, Group
from clifflab.tuning.loop import Data, Listen, train
from clifflab.tuning.state import Progress


@dataclass(frozen=True)
class Prepared:
    """Examples that are ready to be learnt.

    Attributes:
        data: Split into training and validation.
        encoded: All usable ones, and the rejects.
    """

    data: Data
    encoded: Encoded


def prepare(loaded: LoadedModel, rows: Sequence[Mapping[str, Any]], settings: TuneConfig, seed: int) -> Prepared:
    """Render rows and hold some out; see :func:`clifflab.tuning.examples.encode`."""
    encoded = encode(rows, loaded.renderer, loaded.stop_ids, loaded.context, settings)
    training, held = hold_out(encoded.examples, settings.validation, seed)
    return Prepared(Data(training, held, loaded.pad_id), encoded)


@contextmanager
def trainable(loaded: LoadedModel, settings: TuneConfig, seed: int) -> Iterator[Any]:
    """Make a model ready for training, for a while: with a new adapter, or as a whole.

    A model that is trained as a whole has float32 weights meanwhile, whatever it was loaded as. At the end its modules,
    weights and flags are what they were, bit for bit.

    Returns:
        The PEFT model, or ``None`` where there is no adapter.
    """
    model = loaded.model
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    peft, kept = None, []
    try:
        if settings.method == "lora":
            peft = attach(loaded, settings, seed)
        else:
            kept = [(parameter, parameter.data, parameter.data.float().clone()) for parameter in model.parameters()]
            for parameter, _, master in kept:
                parameter.data = master
            model.requires_grad_(True)
        yield peft
    finally:
        if peft is not None:
            detach(peft)
        for parameter, own, _ in kept:
            parameter.data = own
        for parameter, flag in flags:
            parameter.grad = None
            parameter.requires_grad_(flag)


@contextmanager
def adapted(
    loaded: LoadedModel,
    data: Data,
    settings: TuneConfig,
    seed: int,
    *,
    group: Group | None = None,
    listen: Listen | None = None,
) -> Iterator[Progress]:
    """Tune a model in place for a while, with the adapter merged: it answers at its usual speed.

    At the end its modules, weights and flags are what they were, bit for bit, and no hook is left.

    Args:
        loaded: The model; within the ``with`` it is the tuned one.
        data: What it learns (see :func:`prepare`).
        settings: The recipe.
        seed: Of the adapter's weights and the order of the examples.
        group: The workers; this one alone by default, without checkpoints.
        listen: Told of each step's entry of the curve.

    Returns:
        The training's course.

    Raises:
        ClifflabError: See :func:`clifflab.tuning.loop.train`.
    """
    with trainable(loaded, settings, seed) as peft:
        progress = train(loaded.model, data, settings, seed, group or Alone(), listen=listen)
        with _merged(peft):
            yield progress


@contextmanager
def _merged(peft: Any) -> Iterator[None]:
    """The adapter inside its layers' weights, and the layers in their old places; afterwards as before."""
    from peft.tuners.lora import LoraLayer

    if peft is None:
        yield
        return
    places: list[tuple[Any, str, Any, torch.Tensor]] = []
    parents: dict[str, Any] = dict(peft.base_model.model.named_modules())
    try:
        for name, layer in parents.items():
            if isinstance(layer, LoraLayer):
                parent, _, child = name.rpartition(".")
                base: Any = layer.get_base_layer()
                places.append((parents[parent], child, layer, base.weight.data))
                # Merged into a copy: what the layer holds now stays untouched.
                base.weight.data = base.weight.data + _delta(layer).to(base.weight.dtype)
                setattr(parents[parent], child, base)
        yield
    finally:
        for parent, child, layer, weight in places:
            layer.get_base_layer().weight.data = weight
            setattr(parent, child, layer)


def _delta(layer: Any) -> torch.Tensor:
    delta: torch.Tensor = layer.get_delta_weight("default").detach()
    return delta
