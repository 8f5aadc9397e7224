"""Semantic segmentation: figures of a confusion matrix, and an image's map from windows of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

STRIDE = 2 / 3
"""Distance of windows as a share of their side (mmsegmentation's 341 of 512 px; EVA-02 and DINO alike)."""


def confusion(truth: Tensor, said: Tensor, classes: int) -> Tensor:
    """Returns [K, K] numbers of pixels by true and said class, of class numbers of any equal shape; truth -1 is left out."""
    there = truth >= 0
    return torch.bincount(truth[there].long() * classes + said[there], minlength=classes**2).view(classes, classes)


class Segmented(NamedTuple):
    """Figures of a confusion matrix over a whole set, in percent."""

    miou: float
    """Mean over the classes that are there or said of intersection over union."""
    pixel_accuracy: float
    ious: list[float]
    """By class; NaN for one that is neither there nor said."""


def figures(matrix: Tensor) -> Segmented:
    """Returns the figures of a confusion matrix [K, K]."""
    matrix = matrix.double()
    right, union = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    ious = 100 * right / union
    return Segmented(float(ious[union > 0].mean()), float(100 * right.sum() / matrix.sum()), ious.tolist())


def starts(length: int, side: int) -> list[int]:
    """Returns the first pixels of windows along an edge: `STRIDE` of a side apart, the last one at the end."""
    step = max(1, round(side * STRIDE))
    return [*range(0, length - side, step), length - side]


def slid(image: Tensor, side: int, map_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns the scores [K, H, W] of an image [channels, H, W], both sides at least `side`: each pixel's mean over the windows
    that hold it. `map_of` returns the scores [B, K, h, w] of windows [B, channels, side, side], on a grid of its own."""
    height, width = image.shape[1:]
    places = [(top, left) for top in starts(height, side) for left in starts(width, side)]
    scores: Tensor | None = None
    counts = image.new_zeros(height, width, dtype=torch.float32)
    for top, left in places:
        window = map_of(image[None, :, top : top + side, left : left + side])
        found = F.interpolate(window.float(), (side, side), mode="bilinear")[0]
        if scores is None:
            scores = found.new_zeros(len(found), height, width)
        scores[:, top : top + side, left : left + side] += found
        counts[top : top + side, left : left + side] += 1
    assert scores is not None
    return scores / counts
