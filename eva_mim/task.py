"""The training steps: each task joins teacher, student and objective, and nothing else knows what a stage learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eva_mim.config import UserError
from eva_mim.contracts import Batch, StepOutput, Teacher
from eva_mim.objectives import MixSettings
from eva_mim.objectives.masked_cosine import masked_cosine


class MaskedFeatures:
    """The student predicts the teacher's features of the patches that it does not see."""

    def __init__(self, student: nn.Module, teacher: Teacher):
        grid: tuple[int, int] = student.grid  # type: ignore[assignment]
        if grid != teacher.grid:
            size: int = student.image_size  # type: ignore[assignment]
            patch = size // grid[0]
            raise UserError(
                f"student grid {grid[0]}x{grid[1]} ({size} px) does not match teacher grid "
                f"{teacher.grid[0]}x{teacher.grid[1]} ({teacher.image_size} px); set student.image_size="
                f"{patch * teacher.grid[0]}, or set teacher.image_size="
                f"{round(teacher.image_size / teacher.grid[0] * grid[0])} where the teacher allows it"
            )
        self.student, self.teacher = student, teacher

    def loss(self, student: Callable[..., Any], batch: Batch) -> StepOutput:
        """Minus the mean cosine over the M masked patches."""
        target = self.targets(batch)
        return masked_cosine(student(batch.images, batch.masked, batch.masked_index), target)

    def targets(self, batch: Batch) -> Tensor:
        """[M, C] teacher features of the masked patches."""
        view = batch.images if batch.teacher_images is None else batch.teacher_images
        return self.teacher(view).spatial.flatten(0, 1)[batch.masked_index]

    def terms(self, batch: Batch) -> Tensor:
        """M, which differs from batch to batch."""
        assert batch.masked_index is not None
        return torch.tensor(float(len(batch.masked_index)), device=batch.images.device)


class ImageText:
    """Both towers learn to find each other's half of a pair."""

    def __init__(self, student: nn.Module, objective: Callable[[Tensor, Tensor, Tensor], StepOutput]):
        self.student, self.objective = student, objective

    def loss(self, student: Callable[..., Any], batch: Batch) -> StepOutput:
        """Mean of both cross entropies."""
        return self.objective(*student(batch.images, batch.texts))

    def terms(self, batch: Batch) -> None:
        """Every batch has the same size."""


class Labels:
    """Cross entropy with label smoothing; with mixup or cutmix against soft labels."""

    def __init__(self, student: nn.Module, classes: int, settings: MixSettings):
        self.student, self.settings, self._mix = student, settings, None
        if settings.mixup or settings.cutmix:
            from timm.data import Mixup

            self._mix = Mixup(
                settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=classes
            )

    def loss(self, student: Callable[..., Any], batch: Batch) -> StepOutput:
        """Mean cross entropy of the batch, in fp32."""
        images, target = batch.images, batch.labels
        assert target is not None
        if self._mix is not None:
            images, target = self._mix(images.float(), target)
        logits: Tensor = student(images)
        smoothing = 0.0 if self._mix is not None else self.settings.smoothing
        return StepOutput(nn.functional.cross_entropy(logits.float(), target, label_smoothing=smoothing), {})

    def terms(self, batch: Batch) -> None:
        """Every batch has the same size."""
