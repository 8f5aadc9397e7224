"""Networks without memory, built for their names, shapes and widths alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FILLING = frozenset(
    f"{name}_" for name in ("fill", "zero", "constant", "normal", "trunc_normal", "uniform", "kaiming_uniform", "xavier_uniform",
                            "erfinv", "mul", "div", "add", "clamp")
)
"""Names of torch's functions that fill a tensor, for its initialisation."""


class Unfilled(TorchFunctionMode):
    """Skips functions that fill a tensor on the meta device: torch runs some of them there as a chain of Python functions, which
    takes most of the time of building (`clamp_` 8 ms a tensor, as often as a network has layers)."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in FILLING and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return function(*args, **(kwargs or {}))


@contextmanager
def meta_device() -> Iterator[None]:
    """Within it, what is built lies on torch's meta device: no memory for weights, no time for their initial values."""
    with torch.device("meta"), Unfilled():
        yield


def multiply_adds(trunk: Any, side: int, channels: int = 3) -> int:
    """Returns the number of multiply-adds of a trunk on the meta device for an image with this side in pixels: those of all
    matrix products and convolutions, the products of attention among them."""
    from torch.utils.flop_counter import FlopCounterMode

    training = trunk.training
    with meta_device(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        trunk.eval()(torch.zeros(1, channels, side, side))
    trunk.train(training)
    return int(counter.get_total_flops()) // 2
