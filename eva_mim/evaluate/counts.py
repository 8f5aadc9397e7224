"""Counts of correct answers on held-out images, summed on the device over batches and then over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva_mim.core.distributed import all_reduce_sum

TOP = 5
"""Number of largest scores that `top5` considers; all scores if there are fewer classes."""


def hits(scores: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two tensors [B, ...] bool: whether the largest of an image's scores [B, K, ...] is one of its answers [B, A]
    (classes, padded with -1), and whether one of the five largest is. An image with a score that is NaN has no answer right."""
    top = scores.topk(min(TOP, scores.shape[1]), dim=1).indices.unsqueeze(2)
    right = (top == answers.reshape(len(answers), 1, -1, *[1] * (scores.ndim - 2))).any(2) & ~scores.isnan().any(1, keepdim=True)
    return right[:, 0], right.any(1)


class TopCounts:
    """Top-1 and top-5 accuracy and mean loss of one classifier, or of several in parallel (`shape`). Only `figures` waits for the
    device."""

    def __init__(self, device: torch.device, *shape: int):
        self._sums = torch.zeros(4, *shape, dtype=torch.float64, device=device)

    def add(self, scores: Tensor, labels: Tensor, loss: Tensor | None = None) -> None:
        """Counts the correct answers of scores [B, K, *shape] of images with labels [B]; `loss` [*shape] is the sum over these
        images."""
        first, five = hits(scores, labels[:, None])
        images = torch.full_like(self._sums[0], len(labels))
        self._sums += torch.stack([first.sum(0), five.sum(0), torch.zeros_like(images) if loss is None else loss, images])

    def figures(self) -> dict[str, Any]:
        """Returns `top1` and `top5` in percent and the mean `loss`, over the images of all ranks: numbers, or lists of `shape`.
        Every rank must call."""
        first, five, loss, images = all_reduce_sum(self._sums.clone())
        return {"top1": (100 * first / images).tolist(), "top5": (100 * five / images).tolist(), "loss": (loss / images).tolist()}
