"""Held-out accuracy of a classifier, of images or videos. Every rank measures its own samples, and the counts are summed over all
ranks, so no sample counts twice."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from eva_mim.core.batches import LabelledBatch, VideoBatch
from eva_mim.core.contracts import Autocast
from eva_mim.evaluate.counts import TopCounts


class ClassifierEvaluator:
    """Evaluator of a classifier: accuracy over exactly the held-out samples."""

    headline = "top1"

    def __init__(self, val: Iterable[LabelledBatch], device: torch.device):
        self.val, self.device = val, device

    def __call__(self, student: nn.Module, autocast: Autocast) -> dict[str, float]:
        """Returns `top1` and `top5` in percent, and `loss` without label smoothing."""
        counts = TopCounts(self.device)
        for batch in (batch.to(self.device) for batch in self.val):
            with autocast():
                logits = student(batch.images).float()
            counts.add(logits, batch.labels, F.cross_entropy(logits, batch.labels, reduction="sum"))
        return counts.figures()


class VideoEvaluator:
    """Evaluator of a classifier of videos: accuracy of the mean probabilities of all clips and crops."""

    headline = "top1"

    def __init__(self, val: Iterable[VideoBatch], device: torch.device):
        self.val, self.device = val, device

    def __call__(self, student: nn.Module, autocast: Autocast) -> dict[str, float]:
        """Returns `top1` and `top5` in percent, and `loss` without label smoothing."""
        counts = TopCounts(self.device)
        for batch in (batch.to(self.device) for batch in self.val):
            videos, views = batch.images.shape[:2]
            with autocast():
                logits = student(batch.images.flatten(0, 1)).float()
            means = logits.softmax(-1).view(videos, views, -1).mean(1).log()
            counts.add(means, batch.labels, F.nll_loss(means, batch.labels, reduction="sum"))
        return counts.figures()
