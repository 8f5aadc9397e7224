"""Semantic segmentation: cross entropy of each labelled pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.batches import SegmentedBatch
from eva_mim.core.contracts import Task
from eva_mim.core.losses import LossTerm, StepOutput
from eva_mim.core.timing import phase
from eva_mim.data.sources.masks import IGNORED
from eva_mim.students.segmenter import AUXILIARY, MAIN


class Segmentation(Task):
    """Segmentation by cross entropy at the size of the map, to which scores are resized bilinearly (mmsegmentation)."""

    def __init__(self, student: nn.Module, auxiliary: float):
        """`auxiliary`: factor on the loss of the auxiliary head; 0 if there is none."""
        self.student, self._weights = student, {MAIN: 1.0} | ({AUXILIARY: auxiliary} if auxiliary else {})

    def counts(self, batch: SegmentedBatch) -> dict[str, Tensor]:
        """Returns the number of labelled pixels, for each term."""
        return dict.fromkeys(self._weights, (batch.segmentation != IGNORED).sum())

    def loss(self, student: Callable[..., Any], batch: SegmentedBatch) -> StepOutput:
        """Returns the mean cross entropy of the labelled pixels, in fp32, and the share of them that is right."""
        with phase("student"):
            scores = student(batch.images)
        truth = batch.segmentation.long()
        count = (truth != IGNORED).sum().clamp(min=1)
        terms = {}
        for name, weight in self._weights.items():
            sized = F.interpolate(scores[name].float(), truth.shape[1:], mode="bilinear")
            right = ((sized.detach().argmax(1) == truth).sum() / count)
            loss = F.cross_entropy(sized, truth, ignore_index=IGNORED, reduction="sum") / count
            terms[name] = LossTerm(loss, weight, {"pixel_accuracy": 100 * right} if name == MAIN else {})
        return StepOutput(terms, {})
