"""Segmentation by a linear map of patch features, in closed form: a figure of dense features while a trunk is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eva_mim.core.batches import WholeImages
from eva_mim.core.contracts import Autocast
from eva_mim.core.distributed import all_reduce_sum
from eva_mim.evaluate.features import LinearMap, fit_ridge
from eva_mim.evaluate.segmentation import confusion, figures


class PatchProbe:
    """Probe of a masked student's patches: ridge regression from a patch's features to its most frequent class, fitted on some
    images and measured, pixel by pixel, on others. Each is seen once, as a square."""

    def __init__(self, bank: Iterable[WholeImages], val: Iterable[WholeImages], classes: int, device: torch.device):
        self.bank, self.val, self.classes, self.device = bank, val, classes, device

    def __call__(self, student: Any, autocast: Autocast) -> dict[str, float]:
        """Returns `segmentation_miou` and `segmentation_accuracy` (of pixels) in percent. Every rank must call."""
        rows, labels = [], []
        for batch in (batch.to(self.device) for batch in self.bank):
            features = self._features(student, batch, autocast)
            for one, truth in zip(features, batch.segmentations, strict=True):
                found = patch_classes(truth, (one.shape[0], one.shape[1]), self.classes).flatten()
                rows.append(one.flatten(0, 1)[found >= 0])
                labels.append(found[found >= 0])
        probe = fit_ridge(torch.cat(rows), torch.cat(labels), self.classes, device=self.device, total=all_reduce_sum)
        return self._measured(student, autocast, probe)

    def _measured(self, student: Any, autocast: Autocast, probe: LinearMap) -> dict[str, float]:
        matrix = torch.zeros(self.classes, self.classes, dtype=torch.int64, device=self.device)
        for batch in (batch.to(self.device) for batch in self.val):
            features = self._features(student, batch, autocast)
            scores = (((features.double() - probe.centre) @ probe.weights) + probe.offset).float().permute(0, 3, 1, 2)
            for one, truth in zip(scores, batch.segmentations, strict=True):
                said = F.interpolate(one[None], truth.shape, mode="bilinear")[0].argmax(0)
                matrix += confusion(truth, said, self.classes)
        found = figures(all_reduce_sum(matrix))
        return {"segmentation_miou": found.miou, "segmentation_accuracy": found.pixel_accuracy}

    def _features(self, student: Any, batch: WholeImages, autocast: Autocast) -> Tensor:
        """Returns [B, rows, columns, D] features of the patches, in fp32."""
        images = torch.stack(batch.images)
        with autocast():
            tokens: Tensor = student.tokens(images)[:, student.prefix :]
        return tokens.float().reshape(len(tokens), *student.grid, -1)


def patch_classes(truth: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """Returns [rows, columns], the most frequent class of the labelled pixels of a map [H, W] in each cell of a grid; -1 for a
    cell without any. Of several equally frequent ones it is the first."""
    height, width = truth.shape
    row = torch.arange(height, device=truth.device) * grid[0] // height
    column = torch.arange(width, device=truth.device) * grid[1] // width
    cell = (row[:, None] * grid[1] + column).flatten()
    known = truth.flatten() >= 0
    places = cell[known] * classes + truth.flatten()[known].long()
    counts = torch.bincount(places, minlength=grid[0] * grid[1] * classes).view(*grid, classes)
    return torch.where(counts.sum(-1) > 0, counts.argmax(-1), -1)
