"""The state dict of a module that torch.jit.save wrote. The archive's code is searched for names and never run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from eva_mim.core.errors import UserError
from eva_mim.weights.files.allowlist import Stored, Stub

MAX_DEPTH = 64
"""Depth of modules inside modules."""
MAX_VALUES = 1_000_000
"""Attributes of all modules; a module in two places counts twice."""
MAX_NAME = 500
"""Characters of a dotted name."""
_CLASS = re.compile(r"^class (\w+)\(Module\):$", re.MULTILINE)
_TENSORS = re.compile(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", re.MULTILINE)
_WORD = re.compile(r'"([^"]+)"')


def state_of(module: Any, source: Callable[[str], str]) -> dict[str, Stored]:
    """Returns parameters and buffers by dotted name, as `torch.jit.load(FILE).state_dict()` names them.

    `module` is the unpickled object. `source` returns the code below a dotted path, in which each class lists its parameters and
    buffers; other tensors among its attributes belong to no state dict. Raises UserError for an object that is no module, and for
    a module inside itself.
    """
    found: dict[str, Stored] = {}
    classes: dict[str, dict[str, set[str]]] = {}
    seen = 0

    def walk(inner: Stub, prefix: str, depth: int) -> None:
        nonlocal seen
        place, _, kind = inner.name.rpartition(".")
        if place.split(".")[0] != "__torch__" or not isinstance(inner.state, dict):
            return  # other objects (a path, a quantised weight, ...) are no modules
        if place not in classes:
            classes[place] = _classes(source(place))
        if kind not in classes[place]:
            return  # a script class that is no module has no state dict
        seen += len(inner.state)
        if depth > MAX_DEPTH or seen > MAX_VALUES:
            raise UserError(f"modules inside modules without end, or of more than {MAX_VALUES:,} attributes")
        for name, value in inner.state.items():
            if not isinstance(name, str) or len(prefix) + len(name) > MAX_NAME:
                raise UserError(f"an attribute of a module whose name is no text, or longer than {MAX_NAME} characters")
            if isinstance(value, Stored) and name in classes[place][kind]:
                found[f"{prefix}{name}"] = value
            elif isinstance(value, Stub):
                walk(value, f"{prefix}{name}.", depth + 1)

    if not isinstance(module, Stub) or module.name.split(".")[0] != "__torch__":
        raise UserError(f"a TorchScript archive, but it holds a {type(module).__name__} where its module should be")
    walk(module, "", 0)
    return found


def _classes(code: str) -> dict[str, set[str]]:
    """Returns the names of parameters and buffers of each module class in the code."""
    _, *parts = _CLASS.split(code)
    return {
        name: {word for names in _TENSORS.findall(body) for word in _WORD.findall(names)}
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }
