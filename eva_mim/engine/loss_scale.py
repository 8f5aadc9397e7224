"""Dynamic loss scale of fp16, kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_START, SCALE_LEAST, SCALE_WINDOW, SCALE_HYSTERESIS = 2.0**16, 1.0, 500, 2
"""Constants of the fp16 loss scale in EVA's DeepSpeed configuration (facts of EVA-01/eva/utils.py create_ds_config)."""


class LossScale:
    """The dynamic loss scale of fp16, kept on the device so that no step waits for it.

    DeepSpeed's rule: the first overflow does not change the scale, each further one halves it, and a window of steps without an
    overflow doubles it and allows one overflow again. Other precisions have a constant scale of 1.
    """

    def __init__(self, precision: str, device: torch.device):
        self.dynamic = precision == "fp16"
        self.value = torch.tensor(SCALE_START if self.dynamic else 1.0, device=device)
        self._good = torch.tensor(0, device=device)
        self._left = torch.tensor(SCALE_HYSTERESIS, device=device)

    def update(self, bad: Tensor) -> None:
        """Updates the scale after a step; `bad` is a scalar bool, True after an overflow."""
        if not self.dynamic:
            return
        halve = bad & (self._left <= 1)
        double = ~bad & (self._good > 0) & (self._good % SCALE_WINDOW == 0)
        self._left = torch.where(double, SCALE_HYSTERESIS, torch.where(bad & ~halve, self._left - 1, self._left))
        self._good = torch.where(bad, 0, self._good + 1)
        lower = torch.clamp(self.value / 2, min=SCALE_LEAST)
        self.value = torch.where(halve, lower, torch.where(double, self.value * 2, self.value))

    def state(self) -> list[float]:
        """Returns the state for a checkpoint: scale, steps since the last overflow, overflows until the scale is halved."""
        return [float(self.value), float(self._good), float(self._left)]

    def restore(self, state: list[float]) -> None:
        """Restores a state that `state` returned."""
        value, good, left = state
        self.value, self._good, self._left = (
            torch.full_like(own, number)
            for own, number in zip((self.value, self._good, self._left), (value, good, left), strict=True)
        )
