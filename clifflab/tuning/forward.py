"""One forward pass of a micro-batch, and the loss of each of its examples.

Shape suffixes: B rows, T tokens of a row, K positions whose next token is predicted, E examples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from clifflab.errors import InputError
from clifflab.tuning.examples import Example

_IGNORED = -100
_SAME = {torch.float32: 1e-4, torch.float64: 1e-6}  # losses of packed examples, relative; half precision rounds more


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads.

    Attributes:
        tokens_BT: Token ids. Padding stands on the right, where under causal attention nothing sees it.
        positions_BT: Positions; in a packed row they begin anew with each example, which keeps them apart.
        kept_K: Columns whose next token some row learns.
        labels_BK: The next tokens; ignored where they are not learnt.
        owners_BK: Which example of the micro-batch a position belongs to.
        count: Number of examples.
    """

    tokens_BT: torch.Tensor  # noqa: N815
    positions_BT: torch.Tensor  # noqa: N815
    kept_K: torch.Tensor  # noqa: N815
    labels_BK: torch.Tensor  # noqa: N815
    owners_BK: torch.Tensor  # noqa: N815
    count: int


def make_batch(examples: Sequence[Example], pad_id: int, device: torch.device, *, packed: bool) -> MicroBatch:
    """Put examples into rows: one a row, or (``packed``) all into one."""
    labels = [[t if on else _IGNORED for t, on in zip(e.ids, e.learnt, strict=True)] for e in examples]
    if packed:
        rows = [[token for example in examples for token in example.ids]]
        positions = [[place for example in examples for place in range(len(example.ids))]]
        # The first token of an example is never learnt (a chat prefix stands before), so nothing crosses a border.
        next_tokens = [[*[token for row in labels for token in row][1:], _IGNORED]]
        owners = [[number for number, example in enumerate(examples) for _ in example.ids]]
    else:
        width = max(len(example.ids) for example in examples)
        rows = [[*example.ids, *[pad_id] * (width - len(example.ids))] for example in examples]
        positions = [list(range(width)) for _ in examples]
        next_tokens = [[*row[1:], *[_IGNORED] * (width - len(row) + 1)] for row in labels]
        owners = [[number] * width for number in range(len(examples))]
    labels_BT, owners_BT = torch.tensor(next_tokens), torch.tensor(owners)
    kept_K = (labels_BT != _IGNORED).any(0).nonzero().squeeze(1)
    return MicroBatch(
        torch.tensor(rows, device=device),
        torch.tensor(positions, device=device),
        kept_K.to(device),
        labels_BT[:, kept_K].to(device),
        owners_BT[:, kept_K].to(device),
        len(examples),
    )


def example_losses(forward: Callable[..., Any], model: Any, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-probabilities of what a micro-batch learns, in nats.

    Args:
        forward: The model as it is called, wrapped for several workers or not.
        model: The model itself, whose signature tells whether it can leave out logits that nobody reads.
        batch: The micro-batch.

    Returns:
        Their sum, which carries the gradient, and the sum of each example ``[E]``, which does not.
    """
    inputs: dict[str, Any] = {"input_ids": batch.tokens_BT, "position_ids": batch.positions_BT, "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = batch.kept_K
    logits_BKV = forward(**inputs).logits
    if logits_BKV.shape[1] != len(batch.kept_K):
        logits_BKV = logits_BKV[:, batch.kept_K]
    losses = cross_entropy(
        logits_BKV.flatten(0, 1).float(), batch.labels_BK.flatten(), ignore_index=_IGNORED, reduction="none"
    )
    each_E = torch.zeros(batch.count, device=losses.device)
    each_E.index_add_(0, batch.owners_BK.flatten(), losses.detach())
    return losses.sum(), each_E


@torch.no_grad()
def check_packing(model: Any, examples: Sequence[Example], pad_id: int, device: torch.device) -> None:
    """Refuse a model whose packed examples see each other: their losses are compared with those of the examples alone.

    Args:
        model: The model.
        examples: Two or more to try; the shortest ones will do.
        pad_id: Any token id.
        device: Where the model is.

    Raises:
        InputError: The losses differ.
    """
    few = sorted(examples, key=lambda example: len(example.ids))[:3]
    together = example_losses(model, model, make_batch(few, pad_id, device, packed=True))[1]
    alone = [example_losses(model, model, make_batch([e], pad_id, device, packed=True))[1] for e in few]
    alone_E = torch.cat(alone)
    worst = float(((together - alone_E).abs() / alone_E.clamp_min(1e-3)).max())
    if not worst <= _SAME.get(next(model.parameters()).dtype, 0.05):
        problem = f"this architecture lets packed examples see each other (losses differ by {worst:.1%})"
        raise InputError("tune.batching", "packed", problem, "set tune.batching to grouped")
