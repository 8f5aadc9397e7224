"""Classification: cross entropy with label smoothing, mixup and cutmix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from eva_mim.core.batches import LabelledBatch, VideoBatch
from eva_mim.core.contracts import Task
from eva_mim.core.losses import LossTerm, StepOutput
from eva_mim.core.timing import phase
from eva_mim.tasks import MixSettings


class Labels(Task):
    """Classification by cross entropy with label smoothing; with mixup or cutmix, against soft labels."""

    def __init__(self, student: nn.Module, classes: int, settings: MixSettings):
        self.student, self.settings, self._mix = student, settings, None
        if settings.mixup or settings.cutmix:
            from timm.data import Mixup

            self._mix = Mixup(
                settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=classes
            )

    def loss(self, student: Callable[..., Any], batch: LabelledBatch | VideoBatch) -> StepOutput:
        """Returns the mean cross entropy of the batch, in fp32."""
        images, target = batch.images, batch.labels
        if self._mix is not None:
            mixed, target = self._mix(images.float().flatten(1, -3), target)  # of a video all frames alike
            images = mixed.view(images.shape)
        smoothing = 0.0 if self._mix is not None else self.settings.smoothing
        with phase("student"):
            logits: Tensor = student(images)
        loss = nn.functional.cross_entropy(logits.float(), target, label_smoothing=smoothing)
        return StepOutput({"labels": LossTerm(loss)}, {})
