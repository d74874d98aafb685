"""The last probed block at just the tokens that are read.

Its keys and values are needed of all tokens, but its queries, its output projection and its MLP only of those that the
probe reads. Each of these modules treats every token alone, so it is given the read tokens, and its output is put back
among zeros: what the block makes of the other tokens is wrong, and nobody looks at it.

Shape suffixes: B rows, T tokens of a row, K read tokens of all rows, D, E widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from clifflab.models.heads import PROJECTIONS
from clifflab.models.loading import LoadedModel

_ATTENTION = ("q_proj", *PROJECTIONS)
_MLPS = ("mlp", "feed_forward", "block_sparse_moe")
_MOST = 0.75  # of the tokens: with more of them read, picking costs more than it saves


class Trim:
    """The modules of one block that need not see all tokens.

    Args:
        loaded: The model.
        layer: The block.
    """

    def __init__(self, loaded: LoadedModel, layer: int) -> None:
        block = loaded.blocks[layer]
        self._modules: list[nn.Module] = []
        for path, module in block.named_modules():
            *above, name = path.split(".")
            if not set(above) & set(_MLPS) and name in (*_MLPS, *_ATTENTION):
                self._modules.append(module)

    @contextmanager
    def to(self, kept_K: torch.Tensor, tokens: int) -> Iterator[None]:
        """Run the modules at some tokens as long as the ``with`` is open.

        Args:
            kept_K: Their places among the tokens of all rows.
            tokens: How many these are, B x T.
        """
        chosen = self._modules if len(kept_K) <= _MOST * tokens else []
        shapes: dict[nn.Module, torch.Size] = {}

        def pick(module: nn.Module, inputs: Any) -> Any:
            shapes[module] = inputs[0].shape[:-1]
            return (inputs[0].flatten(0, 1).index_select(0, kept_K.to(inputs[0].device))[None], *inputs[1:])

        def put_back(module: nn.Module, _inputs: Any, output: Any) -> Any:
            first_1KE, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            places_K = kept_K.to(first_1KE.device)
            whole = first_1KE.new_zeros(tokens, first_1KE.shape[-1]).index_copy_(0, places_K, first_1KE[0])
            whole = whole.view(*shapes[module], -1)
            return whole if rest is None else (whole, *rest)

        handles = [module.register_forward_pre_hook(pick) for module in chosen]
        handles += [module.register_forward_hook(put_back) for module in chosen]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
