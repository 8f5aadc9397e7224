"""Masked feature prediction: a student predicts a teacher's features of patches that it does not see (EVA: cosine; MAE: MSE)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.contracts import Batch, Grid, StepOutput, Task, Teacher
from eva_mim.core.errors import UserError
from eva_mim.core.timing import phase

Objective = Callable[..., StepOutput]


def masked_cosine(prediction: Tensor, target: Tensor) -> StepOutput:
    """Loss over [M, C] predictions and targets, mean over patches (EVA-01/eva/engine_for_pretraining.py).

    Always in fp32: squares of half-precision features overflow or vanish. Finite for norms from 1e-8 to 1e4.
    """
    cosine = _cosine(prediction, target)
    return StepOutput(-cosine.mean(), _figures(cosine, target))


def masked_mse(prediction: Tensor, target: Tensor) -> StepOutput:
    """Mean squared error over [M, C] (MAE, section 3, for pixel targets), in fp32."""
    return StepOutput(F.mse_loss(prediction.float(), target.float()), _figures(_cosine(prediction, target), target))


def _cosine(prediction: Tensor, target: Tensor) -> Tensor:
    return (F.normalize(prediction.float(), dim=-1) * F.normalize(target.float(), dim=-1)).sum(-1)


def _figures(cosine: Tensor, target: Tensor) -> dict[str, Tensor]:
    return {"cosine": cosine.detach().mean(), "target_norm": target.detach().float().norm(dim=-1).mean()}


class MaskedFeatures(Task):
    """The student predicts the teacher's features of the patches that it does not see."""

    def __init__(self, student: nn.Module, teacher: Teacher, objective: Objective):
        grid: tuple[int, int] = student.grid  # type: ignore[assignment]
        check_grids(grid, student.image_size, teacher)  # type: ignore[arg-type]
        self.student, self.teacher, self.objective = student, teacher, objective

    def loss(self, student: Callable[..., Any], batch: Batch) -> StepOutput:
        """The objective, a mean over the M predicted patches."""
        with phase("teacher"):
            target = self.targets(batch)
        with phase("student"):
            return self.objective(student(batch.images, batch.masked, self.index(batch)), target)

    def targets(self, batch: Batch) -> Tensor:
        """[M, C] teacher features of the predicted patches."""
        return self.spatial(batch)[self.index(batch)]

    def spatial(self, batch: Batch) -> Tensor:
        """[B * N, C] teacher features of every patch."""
        view = batch.images if batch.teacher_images is None else batch.teacher_images
        return self.teacher(view).spatial.flatten(0, 1)

    def index(self, batch: Batch) -> Tensor:
        """[M] positions of the predicted patches in the flattened [B * N]."""
        if batch.target_index is not None:
            return batch.target_index
        rows, columns = self.teacher.grid
        return torch.arange(len(batch.images) * rows * columns, device=batch.images.device)

    def terms(self, batch: Batch) -> Tensor:
        """M, which may differ from batch to batch."""
        return torch.tensor(float(len(self.index(batch))), device=batch.images.device)


def check_grids(grid: Grid, image_size: int, teacher: Teacher) -> None:
    """Raises UserError, with the sizes that would fit, when student and teacher do not share one patch grid."""
    if grid != teacher.grid:
        raise UserError(
            f"student grid {grid[0]}x{grid[1]} ({image_size} px) does not match teacher grid "
            f"{teacher.grid[0]}x{teacher.grid[1]} ({teacher.image_size} px); set student.image_size="
            f"{image_size // grid[0] * teacher.grid[0]}, or set teacher.image_size="
            f"{round(teacher.image_size / teacher.grid[0] * grid[0])} where the teacher allows it"
        )
