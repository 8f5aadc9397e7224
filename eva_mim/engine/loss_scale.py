"""Dynamic loss scale of fp16, kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_START, SCALE_LEAST, SCALE_WINDOW, SCALE_HYSTERESIS = 2.0**16, 1.0, 500, 2
"""fp16 loss scale of EVA's DeepSpeed configuration (facts of EVA-01/eva/utils.py create_ds_config)."""


class LossScale:
    """The dynamic loss scale of fp16, on the device: nothing waits for it.

    DeepSpeed's rule: the first overflow is forgiven, each further one halves the scale, and a window of steps without one
    doubles it and forgives again. Other precisions have a scale of 1 that never moves.
    """

    def __init__(self, precision: str, device: torch.device):
        self.dynamic = precision == "fp16"
        self.value = torch.tensor(SCALE_START if self.dynamic else 1.0, device=device)
        self._good = torch.tensor(0, device=device)
        self._left = torch.tensor(SCALE_HYSTERESIS, device=device)

    def update(self, bad: Tensor) -> None:
        """After a step; `bad` is a scalar bool."""
        if not self.dynamic:
            return
        halve = bad & (self._left <= 1)
        double = ~bad & (self._good > 0) & (self._good % SCALE_WINDOW == 0)
        self._left = torch.where(double, SCALE_HYSTERESIS, torch.where(bad & ~halve, self._left - 1, self._left))
        self._good = torch.where(bad, 0, self._good + 1)
        lower = torch.clamp(self.value / 2, min=SCALE_LEAST)
        self.value = torch.where(halve, lower, torch.where(double, self.value * 2, self.value))

    def state(self) -> list[float]:
        """For a checkpoint."""
        return [float(self.value), float(self._good), float(self._left)]

    def restore(self, state: list[float]) -> None:
        """Put back a state that `state` returned."""
        value, good, left = state
        self.value, self._good, self._left = (
            torch.full_like(own, number)
            for own, number in zip((self.value, self._good, self._left), (value, good, left), strict=True)
        )
