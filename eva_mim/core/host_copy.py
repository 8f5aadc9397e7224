"""Copies of tensors in the host's memory, from a GPU through pinned memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

PINNED = 2**28
"""Bytes of pinned memory. A copy to other memory waits for each tensor, and runs at 2 to 6 GB/s (an estimate: `tools/gpu_check`
measures both)."""


def to_host(values: Iterable[Tensor], pinned: int = PINNED) -> list[Tensor]:
    """Returns copies of the tensors in the host's memory, which later changes do not reach. At any time one tensor of `values` is
    held."""
    copies, turns = list[Tensor](), None
    for value in values:
        if value.device.type != "cuda":
            copies.append(value.to("cpu", copy=True))
            continue
        turns = turns or _Turns(pinned)
        copies.append(turns.copy(value))
    if turns is not None:
        turns.finish()
    return copies


class _Turns:
    """Two halves of pinned memory that take turns: the GPU fills one while the host empties the other."""

    def __init__(self, size: int):
        self._halves = torch.empty(2, size // 2, dtype=torch.uint8, pin_memory=True).unbind()
        self._filling: tuple[Any, Tensor, Tensor] | None = None
        """Event after which the half is full, the half, and the place of its bytes."""

    def copy(self, value: Tensor) -> Tensor:
        """Returns a tensor whose last bytes may come with `finish`."""
        made = torch.empty(value.shape, dtype=value.dtype)
        source, target = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (value, made))
        size = len(self._halves[0])
        for part, place in zip(torch.split(source, size), torch.split(target, size), strict=True):
            half = self._halves[0][: len(part)]
            half.copy_(part, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self.finish()
            self._filling, self._halves = (event, half, place), self._halves[::-1]
        return made

    def finish(self) -> None:
        """Empties the half that was filled last."""
        if self._filling is not None:
            event, half, place = self._filling
            event.synchronize()
            place.copy_(half)
            self._filling = None
