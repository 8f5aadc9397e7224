"""Allowlist of the globals that a foreign pickle may name, with their stand-ins. Every other global is refused."""

from __future__ import annotations

from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any, NamedTuple

from eva_mim.core.errors import UserError

HARMLESS = frozenset(
    {
        "argparse.Namespace",
        "builtins.set",
        "builtins.slice",
        "collections.Counter",
        "collections.defaultdict",
        "datetime.datetime",
        "datetime.timedelta",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "_codecs.encode",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "pathlib.PureWindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "torch.device",
        "torch.Tensor",
        "torch.jit._pickle.build_boollist",
        "torch.jit._pickle.build_doublelist",
        "torch.jit._pickle.build_intlist",
        "torch.jit._pickle.build_tensorlist",
        "torch.jit._pickle.restore_type_tag",
    }
)
"""Classes that training scripts save beside the weights (settings, folders, scores, DeepSpeed's records, lists of
TorchScript). An object of one is kept as a `Stub`."""
DTYPES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
    "complex64": 8, "complex128": 16,
}
"""torch's dtype name -> bytes per element."""
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}
"""torch's storage class -> dtype of its elements."""
RE_SAVE = "if you trust it, load it where it was made and save its tensors with safetensors.torch.save_file"
MAX_DIMENSIONS = 64
"""Largest number of dimensions of a tensor; torch's own limit."""


class Stub:
    """An object of a class that is not imported: class name, constructor arguments and attributes."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: Any = None):
        self.name, self.arguments, self.state = name, arguments, None


class Storage(NamedTuple):
    """The stored elements of one or several tensors; `key` names the archive record that holds them."""

    key: str
    dtype: str
    elements: int


class Stored(NamedTuple):
    """A tensor inside a storage; `offset` and `stride` count elements of `dtype`, which differs from the storage's if that
    holds bytes."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Rebuild:
    """Stand-in for a function of torch that rebuilds a tensor."""

    def __init__(self, build: Callable[..., Any]):
        self.build = build


def _dtype(value: Any) -> str:
    name = value.name.removeprefix("torch.") if isinstance(value, Stub) else ""
    if name not in DTYPES:
        raise UserError(f"tensors of type {name[:40]!r} are not supported")
    return name


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any, dtype: str | None = None, flags: Any = None) -> Stored:
    """Returns the described tensor. Raises UserError unless every element lies inside the storage."""
    dtype = dtype or storage.dtype
    shape, stride = sizes(shape), sizes(stride)
    if flags or len(shape) != len(stride) or type(offset) is not int or offset < 0:
        raise UserError("a kind of tensor that is not supported (conjugated, negated, or without strides)")
    last = -1 if 0 in shape else sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if (offset + last + 1) * DTYPES[dtype] > storage.elements * DTYPES[storage.dtype]:
        raise UserError(f"a tensor of shape {list(shape)} reaches behind its {storage.elements} stored elements")
    return Stored(storage, dtype, offset, shape, stride)


def sizes(value: Any) -> tuple[int, ...]:
    """Returns a shape or stride unchanged. Raises UserError unless it is a tuple of at most MAX_DIMENSIONS integers, none
    negative: a longer one, copied at each mention, would fill the memory."""
    if type(value) is not tuple or len(value) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in value):
        raise UserError("a tensor whose shape is not a list of sizes")
    return value


_REBUILD: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: {},
    "torch.Size": sizes,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": lambda s, o, size, stride, grad=0, hooks=0, flags=0: _tensor(
        s, o, size, stride, flags=flags
    ),
    "torch._utils._rebuild_tensor_v3": lambda s, o, size, stride, grad, hooks, dtype, flags=0: _tensor(
        s, o, size, stride, dtype=_dtype(dtype), flags=flags
    ),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.nn.parameter.Parameter": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, arguments, state: function.build(*arguments),
}
_NAMES: dict[str, Any] = (
    {name: Rebuild(build) for name, build in _REBUILD.items()}
    | {f"torch.{name}": dtype for name, dtype in STORAGES.items()}
    | {"torch.storage.UntypedStorage": "uint8"}
)
_DTYPES = frozenset(f"torch.{name}" for name in DTYPES)


def find_global(module: str, name: str) -> Any:
    """Returns the stand-in for a global. Raises UserError for a global outside the allowlist."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # protocol 2 has Python 2's names
    path = f"{module}.{name}"
    if path in _NAMES:
        return _NAMES[path]
    if path in HARMLESS or path in _DTYPES or path.startswith("__torch__."):  # names below __torch__ are TorchScript's classes
        return Stub(path)
    raise UserError(f"asks for {path[:100]!r}, which is refused: opening a checkpoint must not run code; {RE_SAVE}")


