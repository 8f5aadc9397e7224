"""Classification: soft labels of mixed images, against their definition."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from eva_mim.core.batches import LabelledBatch
from eva_mim.tasks import MixSettings
from eva_mim.tasks.labels import Labels

CLASSES = 5


class Told(nn.Module):
    """Answers with logits of its own, and keeps the images."""

    def __init__(self, rows: int):
        super().__init__()
        self.logits = torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images = images
        return self.logits


def batch(rows: int) -> LabelledBatch:
    """Image number i is full of the value 40 i, and has label i."""
    images = torch.stack([torch.full((3, 8, 8), 40 * row, dtype=torch.uint8) for row in range(rows)])
    return LabelledBatch(torch.arange(rows), images, torch.arange(rows) % CLASSES)


def loss(settings: MixSettings, student: Told, rows: int = 4) -> float:
    term = Labels(student, CLASSES, settings).loss(student, batch(rows)).terms["labels"]
    return float(term.mean)


def soft(labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    return F.one_hot(labels, CLASSES) * (1 - smoothing) + smoothing / CLASSES


def test_without_mixing_labels_are_smoothed() -> None:
    student = Told(4)
    expected = -(soft(torch.arange(4), 0.3) * student.logits.log_softmax(1)).sum(1).mean()
    assert abs(loss(MixSettings(smoothing=0.3), student) - float(expected)) < 1e-6
    assert student.images.dtype == torch.uint8


def test_mixup_mixes_images_and_smoothed_labels_alike() -> None:
    """The share of the other image is read off the pixels; timm pairs a batch with itself in reverse."""
    for smoothing in (0.0, 0.3):
        np.random.seed(3)  # timm draws from numpy's generator
        student = Told(4)
        found = loss(MixSettings(mixup=0.8, smoothing=smoothing), student)
        values = student.images[:, 0, 0, 0]  # row i: 40 (share i + (1 - share) (3 - i))
        share = (float(values[3]) / 40 - 0) / 3
        assert 0 < share < 1
        labels = torch.arange(4)
        target = share * soft(labels, smoothing) + (1 - share) * soft(labels.flip(0), smoothing)
        expected = -(target * student.logits.log_softmax(1)).sum(1).mean()
        assert abs(found - float(expected)) < 1e-5


def test_cutmix_shares_labels_by_area() -> None:
    np.random.seed(5)
    student = Told(4)
    found = loss(MixSettings(cutmix=1.0, smoothing=0.1), student)
    share = float((student.images[3, 0] == 120).float().mean())
    assert 0 < share < 1
    labels = torch.arange(4)
    target = share * soft(labels, 0.1) + (1 - share) * soft(labels.flip(0), 0.1)
    expected = -(target * student.logits.log_softmax(1)).sum(1).mean()
    assert abs(found - float(expected)) < 1e-5
