"""Masked feature prediction: a student predicts a teacher's features of patches that it does not see (EVA: cosine; MAE: MSE)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.contracts import Grid, MaskedBatch, StepOutput, Task, Teacher
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

    def loss(self, student: Callable[..., Any], batch: MaskedBatch) -> StepOutput:
        """The objective, a mean over the M predicted patches."""
        index = self.index(batch)
        with phase("teacher"):
            target = self.spatial(batch)[index]
        with phase("student"):
            return self.objective(student(self.images(batch), batch.masked, index), target)

    def images(self, batch: MaskedBatch) -> Tensor:
        """[B, channels, H, W] the view that the student sees."""
        return batch.views[self.student.image_size]  # type: ignore[index]

    def spatial(self, batch: MaskedBatch) -> Tensor:
        """[B * N, C] teacher features of every patch."""
        return self.teacher(batch.views[self.teacher.image_size]).spatial.flatten(0, 1)

    def index(self, batch: MaskedBatch) -> Tensor:
        """[M] positions of the predicted patches in the flattened [B * N]."""
        if batch.target_index is not None:
            return batch.target_index
        return torch.arange(self._patches(batch), device=batch.index.device)

    def terms(self, batch: MaskedBatch) -> Tensor:
        """M, which may differ from batch to batch."""
        predicted = self._patches(batch) if batch.target_index is None else len(batch.target_index)
        return torch.tensor(float(predicted), device=batch.index.device)

    def _patches(self, batch: MaskedBatch) -> int:
        rows, columns = self.teacher.grid
        return batch.size * rows * columns


def check_grids(grid: Grid, image_size: int, teacher: Teacher) -> None:
    """Raises UserError, with the sizes that would fit, when student and teacher do not share one patch grid."""
    if grid != teacher.grid:
        raise UserError(
            f"student grid {grid[0]}x{grid[1]} ({image_size} px) does not match teacher grid "
            f"{teacher.grid[0]}x{teacher.grid[1]} ({teacher.image_size} px); set student.image_size="
            f"{image_size // grid[0] * teacher.grid[0]}, or set teacher.image_size="
            f"{round(teacher.image_size / teacher.grid[0] * grid[0])} where the teacher allows it"
        )
