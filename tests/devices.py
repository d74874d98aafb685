"""Several devices on a machine that has one: tensors that say where they are, and refuse to meet across devices.

The numbers lie in the machine's memory and every operation is the CPU's own; only the places are pretended. What is
asked of real GPUs is asked here too: operands lie on one device, except numbers without dimension on the CPU, indices
on the CPU, and the source of a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

KIND = "pretend"
_ATEN = torch.ops.aten
_COPIES = {_ATEN.copy_.default, _ATEN._to_copy.default}
_ITEMS = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_INDEXED = {_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN.index_put.default, _ATEN._index_put_impl_.default}


class Placed(torch.Tensor):
    """A tensor that pretends to lie on a device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Any:
        if isinstance(real, Placed):  # accelerate makes a parameter of the kind that a parameter is
            return torch.nn.Parameter(real, requires_grad)
        made: Placed = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            device=device, requires_grad=False,
        )  # fmt: skip
        made.inner = real
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Placed({self.inner!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """While it is on, tensors can be made on pretended devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class Making(TorchFunctionMode):
    """``torch.tensor`` makes its result where no mode looks: it is moved there instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and place is not None and torch.device(place).type == KIND:
            return func(*args, **{**kwargs, "device": "cpu"}).to(place)
        if func is torch.Tensor.tolist and isinstance(args[0], Placed):
            return args[0].inner.tolist()
        if func in _ITEMS and isinstance(args[0], Placed):
            where = args[1] if isinstance(args[1], tuple) else (args[1],)
            where = tuple(torch.tensor(part) if isinstance(part, list) else part for part in where)
            args = (args[0], where if isinstance(args[1], tuple) else where[0], *args[2:])
        return func(*args, **kwargs)


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [part for part in leaves if isinstance(part, torch.Tensor)]
    named = next((part for part in (kwargs.get("device"), *leaves) if isinstance(part, torch.device)), None)
    place = named or _common(func, args, tensors)
    own = {id(part.inner): part for part in tensors if isinstance(part, Placed)}
    args, kwargs = tree_map_only(Placed, lambda part: part.inner, (args, kwargs))
    args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    result = func(*args, **kwargs)

    def placed(part: torch.Tensor) -> torch.Tensor:
        before = own.get(id(part))
        if before is not None and before.device == place:
            return before
        if place.type != KIND:
            return part if before is None else part.clone()
        return Placed(part if named is None else part.clone(), place)

    return tree_map_only(torch.Tensor, placed, result)


def _common(func: Any, args: Any, tensors: list[torch.Tensor]) -> torch.device:
    """The device of an operation's result, if all that it takes lies there."""
    if func in _COPIES:
        return tensors[0].device
    if func in _INDEXED:
        indices = {id(part) for part in tree_flatten(args[1])[0]}
        for index in tensors:
            if id(index) in indices and index.device not in (torch.device("cpu"), tensors[0].device):
                raise RuntimeError(f"{func}: indices on {index.device} into a tensor on {tensors[0].device}")
        tensors = [part for part in tensors if id(part) not in indices]
    places = {part.device for part in tensors if part.dim() > 0 or part.device.type == KIND}
    if len(places) > 1:
        raise RuntimeError(f"{func}: operands on {sorted(map(str, places))}")
    return next(iter(places), torch.device("cpu"))


def register() -> None:
    """Make the device known to torch, with what autograd asks of one; it cannot be undone."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(KIND)


def device(index: int) -> torch.device:
    return torch.device(KIND, index)


@contextmanager
def spread(model: Any, device_map: dict[str, int]) -> Iterator[None]:
    """Put modules of a model on pretended devices, with the hooks that transformers' ``device_map`` puts there."""
    from accelerate.hooks import attach_align_device_hook_on_blocks

    with Pretending(), Making():
        places: dict[str, Any] = {name: device(index) for name, index in device_map.items()}
        attach_align_device_hook_on_blocks(
            model, execution_device={"": device(0), **places}, offload=dict.fromkeys(places, False),
            skip_keys=model._skip_keys_device_placement,
        )  # fmt: skip
        model.hf_device_map = device_map
        yield
