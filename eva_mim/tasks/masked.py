"""Masked feature prediction: a student predicts teachers' features of masked patches (EVA: cosine; MAE: MSE)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.contracts import Grid, MaskedBatch, Targets, Task, Teacher
from eva_mim.core.errors import UserError
from eva_mim.core.losses import LossTerm, StepOutput
from eva_mim.core.timing import phase

Objective = Callable[[Tensor, Tensor], LossTerm]


def masked_cosine(prediction: Tensor, target: Tensor) -> LossTerm:
    """Returns minus the mean cosine of [M, C] predictions and targets (EVA-01/eva/engine_for_pretraining.py); 0 for M = 0.

    It is computed in fp32, because squares of half-precision features overflow or vanish. Finite for norms from 1e-8 to 1e4.
    """
    cosine = _cosine(prediction, target)
    return LossTerm(-_mean(cosine), metrics=_figures(cosine, target))


def masked_mse(prediction: Tensor, target: Tensor) -> LossTerm:
    """Returns the mean squared error over [M, C] (MAE, section 3, for pixel targets), in fp32; 0 for M = 0."""
    error = F.mse_loss(prediction.float(), target.float(), reduction="mean" if len(prediction) else "sum")
    return LossTerm(error, metrics=_figures(_cosine(prediction, target), target))


def _mean(values: Tensor) -> Tensor:
    return values.mean() if len(values) else values.sum()


def _cosine(prediction: Tensor, target: Tensor) -> Tensor:
    return (F.normalize(prediction.float(), dim=-1) * F.normalize(target.float(), dim=-1)).sum(-1)


def _figures(cosine: Tensor, target: Tensor) -> dict[str, Tensor]:
    return {"cosine": _mean(cosine.detach()), "target_norm": _mean(target.detach().float().norm(dim=-1))}


class MaskedFeatures(Task):
    """Masked feature prediction: the student has a head for each teacher, which predicts its features of the masked patches."""

    def __init__(self, student: nn.Module, targets: Targets, objective: Objective, weights: Mapping[str, float]):
        """`weights`: factor on each teacher's loss, by the teacher's name."""
        self.student, self.targets, self.objective, self.weights = student, targets, objective, dict(weights)

    def loss(self, student: Callable[..., Any], batch: MaskedBatch) -> StepOutput:
        """Returns a loss term for each teacher: the objective, a mean over the M predicted patches."""
        index = self.index(batch)
        targets = self.targets.patches(batch, index)
        with phase("student"):
            predictions = self.predictions(student, batch, batch.masked, index)
            return StepOutput({name: self._term(name, predictions[name], targets[name]) for name in self.weights}, {})

    def _term(self, name: str, prediction: Tensor, target: Tensor) -> LossTerm:
        """Returns the loss term of a teacher. With several teachers the names of its metrics end in the teacher's name."""
        mean, _, metrics = self.objective(prediction, target)
        if len(self.weights) > 1:
            metrics = {f"{metric}_{name}": value for metric, value in metrics.items()}
        return LossTerm(mean, self.weights[name], metrics)

    def predictions(
        self, student: Callable[..., Any], batch: MaskedBatch, masked: Tensor | None, index: Tensor
    ) -> dict[str, Tensor]:
        """Returns [M, C] predictions of the patches of `index` by the teacher's name; the patches of `masked` are hidden."""
        found = student(self.images(batch), masked, index)
        return found if isinstance(found, dict) else dict.fromkeys(self.weights, found)

    def images(self, batch: MaskedBatch) -> Tensor:
        """Returns the student's view, [B, channels, H, W]."""
        return batch.views[self.student.image_size]  # type: ignore[index]

    def spatial(self, batch: MaskedBatch) -> dict[str, Tensor]:
        """Returns the [B * N, C] targets of all patches by the teacher's name."""
        return {name: features.spatial.flatten(0, 1) for name, features in self.targets(batch).items()}

    def index(self, batch: MaskedBatch) -> Tensor:
        """Returns the [M] positions of the predicted patches in the flattened [B * N]."""
        if batch.target_index is not None:
            return batch.target_index
        return torch.arange(self._patches(batch), device=batch.index.device)

    def counts(self, batch: MaskedBatch) -> dict[str, Tensor]:
        """Returns M, the number of predicted patches (it may differ from batch to batch), by the teacher's name."""
        predicted = self._patches(batch) if batch.target_index is None else len(batch.target_index)
        return dict.fromkeys(self.weights, torch.full((), float(predicted), device=batch.index.device))

    def _patches(self, batch: MaskedBatch) -> int:
        rows, columns = cast(Grid, self.student.grid)
        return batch.size * rows * columns


def check_grids(grid: Grid, image_size: int, teacher: Teacher, path: str = "teacher") -> None:
    """Raises UserError, with the sizes that would fit, if student and teacher have different patch grids. `path`: path of the
    teacher's settings in the recipe."""
    if grid != teacher.grid:
        raise UserError(
            f"student grid {grid[0]}x{grid[1]} ({image_size} px) does not match {path} grid "
            f"{teacher.grid[0]}x{teacher.grid[1]} ({teacher.image_size} px); set student.image_size="
            f"{image_size // grid[0] * teacher.grid[0]}, or set {path}.image_size="
            f"{round(teacher.image_size / teacher.grid[0] * grid[0])} where the teacher allows it"
        )
