"""Normalisation of pixels with a network's mean and std."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Returns float32 (x / 255 - mean) / std of [B, channels, H, W] uint8 or float in 0..255, channels last in memory (the faster
    layout for convolutions, on CPUs by a quarter)."""
    scale, shift = _scale_and_shift(mean, std, images.device)
    pixels = images.to(memory_format=torch.channels_last).float()
    return pixels / scale - shift


@cache  # computed once for each network and device, since a copy to a GPU in every step would make the host wait
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    scale = torch.tensor([255.0 * s for s in std], device=device)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)
