"""Semantic segmentation: figures of a confusion matrix, and an image's map from windows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    class_accuracy: float
    """Mean over the classes that are there of the share of their pixels that is right."""
    ious: list[float]
    """By class; NaN for one that is neither there nor said."""
    accuracies: list[float]
    """By class; NaN for one that is not there."""


def figures(matrix: Tensor) -> Segmented:
    """Returns the figures of a confusion matrix [K, K]."""
    matrix = matrix.double()
    right, union = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    ious, accuracies = 100 * right / union, 100 * right / matrix.sum(1)
    pixels = float(100 * right.sum() / matrix.sum())
    means = (float(values[~values.isnan()].mean()) for values in (ious, accuracies))
    miou, class_accuracy = means
    return Segmented(miou, pixels, class_accuracy, ious.tolist(), accuracies.tolist())


def starts(length: int, side: int, stride: float = STRIDE) -> list[int]:
    """Returns the first pixels of windows along an edge: `stride` of a side apart, the last one at the end."""
    step = max(1, round(side * stride))
    return [*range(0, length - side, step), length - side]


def slid(
    images: Sequence[Tensor], side: int, map_of: Callable[[Tensor], Tensor], stride: float = STRIDE, most: int = 1,
) -> Iterator[Tensor]:
    """Yields the scores [K, H, W] of each image [channels, H, W], both sides at least `side`: each pixel's mean over the windows
    that hold it. `map_of` returns the scores [B, K, h, w] of windows [B, channels, side, side], at most `most` at once, on a grid
    of its own."""
    places = [(number, top, left) for number, image in enumerate(images)
              for top in starts(image.shape[1], side, stride) for left in starts(image.shape[2], side, stride)]
    scores, counts = dict[int, Tensor](), dict[int, Tensor]()
    for first in range(0, len(places), most):
        chosen = places[first : first + most]
        windows = torch.stack([images[number][:, top : top + side, left : left + side] for number, top, left in chosen])
        found = F.interpolate(map_of(windows).float(), (side, side), mode="bilinear")
        for (number, top, left), one in zip(chosen, found, strict=True):
            if number not in scores:
                yield from (scores.pop(before) / counts.pop(before) for before in list(scores))
                scores[number] = one.new_zeros(len(one), *images[number].shape[1:])
                counts[number] = one.new_zeros(images[number].shape[1:])
            scores[number][:, top : top + side, left : left + side] += one
            counts[number][top : top + side, left : left + side] += 1
    yield from (scores[last] / counts[last] for last in scores)
