"""Tensors that stay in their file until their values are used, and lazy results of operations on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eva_mim.core.errors import UserError

if TYPE_CHECKING:
    from eva_mim.weights.files.read import Checkpoint

_CHANGES = frozenset({
    "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__iand__", "__ior__",
    "__ixor__", "__ilshift__", "__irshift__", "__setitem__", "__set__", "__delete__",
})  # methods whose name ends in _ are in place, too
_DESCRIBES = frozenset({
    "__get__", "__len__", "__hash__", "size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "is_contiguous",
    "is_floating_point", "is_complex", "is_signed",
})  # these need shape and dtype alone; another function that returns no tensor reads the values (a meta tensor's `bool` is wrong)
_META = torch.device("meta")


class Deferred(Tensor):
    """A tensor on the CPU of which only shape and dtype are in memory; operations on it return another Deferred and compute
    nothing.

    `read()` computes the values, each time anew from the file: an expression that uses a tensor twice reads the file twice, and a
    random function draws again. Operations that need values (`torch.equal`, `bool`, `.item()`, a boolean index) read at once.
    In-place operations, `out=` and addresses raise RuntimeError, because there is no memory to change.
    """

    _like: Tensor
    _compute: Callable[[], Tensor]

    def __new__(cls, like: Tensor, compute: Callable[[], Tensor]) -> Deferred:
        """`like` is a meta tensor with the shape and dtype of the tensor that `compute` returns."""
        made = Tensor._make_subclass(cls, like)
        made._like, made._compute = like, compute
        return made

    @torch.no_grad()
    def read(self) -> Tensor:
        """Returns the values in memory of their own. Raises UserError if the file is missing or damaged."""
        value = self._compute()
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value  # a view keeps its storage

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device of the values: the CPU."""
        return torch.device("cpu")

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        """False: the tensor has values."""
        return False

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        """Returns the tensor itself."""
        return self

    def __iter__(self) -> Any:
        return iter(self.unbind())

    def __deepcopy__(self, memo: Any) -> Deferred:
        return self  # a Deferred never changes

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Deferred({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _each(lambda value: value, (args, kwargs or {}))  # copies lists, which belong to the caller
        name = function.__name__
        changing = name in _CHANGES or (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None
        if changing or name == "data_ptr":
            raise RuntimeError(f"{name}: a tensor that was not read yet cannot be changed and has no address; call read() first")

        def compute() -> Any:
            return function(*_each(_value, args), **_each(_value, kwargs))

        try:
            with torch._C.DisableTorchFunctionSubclass():
                found = function(*_each(_shadow, args), **_each(_shadow, kwargs))
        except (NotImplementedError, RuntimeError, TypeError, ValueError):  # the function needs values, or the call is a mistake
            return compute()
        if isinstance(found, Tensor):
            same = [value for value in args if isinstance(value, Deferred) and value._like is found]  # an argument came back
            return same[0] if same else cls(found, compute)
        if isinstance(found, (tuple, list)) and found and all(isinstance(part, Tensor) for part in found):
            return type(found)([cls(part, partial(_part, compute, index)) for index, part in enumerate(found)])
        return found if name in _DESCRIBES else compute()


def deferred(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Returns all tensors of a checkpoint by name, without reading any."""
    return {
        name: Deferred(torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device=_META), entry.load)
        for name, entry in checkpoint.entries.items()
    }


def materialise(value: Tensor) -> Tensor:
    """Returns the values of a `Deferred`, and any other tensor as it is."""
    return value.read() if isinstance(value, Deferred) else value


def finite(value: Tensor, name: str, where: str) -> Tensor:
    """Returns the values of a tensor as `materialise` does. Raises UserError, which names the tensor and `where` it was read, if
    one of them is NaN or infinite: training would go on with it and learn nothing."""
    found = materialise(value)
    if found.is_floating_point() and not bool(found.isfinite().all()):
        count = int((~found.isfinite()).sum())
        raise UserError(f"{where}: {count} of the {found.numel()} values of {name} are NaN or infinite")
    return found


def _value(value: Any) -> Any:
    return value._compute() if isinstance(value, Deferred) else value


def _shadow(value: Any) -> Any:
    """Returns a tensor's stand-in on the meta device, where torch computes shapes and dtypes; other values stay."""
    if isinstance(value, Tensor):
        return value._like if isinstance(value, Deferred) else value.to(_META)
    return _META if isinstance(value, (str, torch.device)) and str(value) == "cpu" else value


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """Returns nested lists, tuples and dicts with `change` applied to every leaf."""
    if isinstance(value, dict):
        return {name: _each(change, item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        made = [_each(change, item) for item in value]
        return tuple(made) if isinstance(value, tuple) else made
    return change(value)


def _part(compute: Callable[[], Sequence[Tensor]], index: int) -> Tensor:
    return compute()[index]
