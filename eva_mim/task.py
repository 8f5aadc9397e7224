"""The training steps: each task joins teacher, student and objective, and nothing else knows what a stage learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from eva_mim.config import UserError
from eva_mim.contracts import Batch, Grid, StepOutput, Task, Teacher, WholeStep
from eva_mim.objectives import MixSettings
from eva_mim.phases import phase

Objective = Callable[..., StepOutput]


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


class ImageText(Task):
    """Both towers learn to find each other's half of a pair, among the pairs of the global batch."""

    def __init__(self, student: nn.Module, objective: Objective):
        self.student, self.objective = student, objective

    def prepare(self, student: Callable[..., Any], batches: list[Batch]) -> list[Batch]:
        """With several micro-batches, a first pass without gradients says the features of all. The loss and its gradient by
        these features are computed once; each micro-batch then passes its part back (GradCache, Gao et al. 2021)."""
        if len(batches) == 1:
            return batches
        with phase("student"):
            image, text, *scalars = zip(*self._first_pass(student, batches), strict=True)
            said = [torch.cat(image), torch.cat(text), *(same[0] for same in scalars)]
            leaves = [tensor.detach().float().requires_grad_() for tensor in said]
            with torch.autocast(leaves[0].device.type, enabled=False):
                loss, metrics = self.objective(*leaves)
                by_image, by_text, *by_scalars = torch.autograd.grad(loss, leaves)
        # The engines take the mean over micro-batches. A row of features is in one of them, a scalar in each.
        count = len(batches)
        rows = zip(batches, (by_image * count).chunk(count), (by_text * count).chunk(count), strict=True)
        whole = StepOutput(loss.detach(), metrics)
        return [replace(batch, whole=WholeStep(whole, (image, text, *by_scalars))) for batch, image, text in rows]

    @torch.no_grad()
    def _first_pass(self, student: Callable[..., Any], batches: list[Batch]) -> list[tuple[Tensor, ...]]:
        """What the student says of each micro-batch. The second pass draws the same random numbers, and moves what buffers
        hold (running means of batch norms)."""
        device = batches[0].images.device
        before = [buffer.clone() for buffer in self.student.buffers()]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            said = [student(batch.images, batch.texts) for batch in batches]
        for buffer, old in zip(self.student.buffers(), before, strict=True):
            buffer.copy_(old)
        return said

    def loss(self, student: Callable[..., Any], batch: Batch) -> StepOutput:
        """The contrastive loss of this pass, or its part of the whole step's: then the value is the whole step's."""
        with phase("student"):
            said = student(batch.images, batch.texts)
            if batch.whole is None:
                return self.objective(*said)
            (loss, metrics), gradients = batch.whole
            inner = sum((one.float() * gradient).sum() for one, gradient in zip(said, gradients, strict=True))
            return StepOutput(loss + (inner - inner.detach()), metrics)

    def terms(self, batch: Batch) -> None:
        """Every batch has the same size."""


class Labels(Task):
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
        smoothing = 0.0 if self._mix is not None else self.settings.smoothing
        with phase("student"):
            logits: Tensor = student(images)
        return StepOutput(nn.functional.cross_entropy(logits.float(), target, label_smoothing=smoothing), {})

    def terms(self, batch: Batch) -> None:
        """Every batch has the same size."""


class Heads(Task):
    """Every layer of a probe learns from the same features. The loss is the sum of theirs, so each has the gradient that it would
    have alone."""

    def __init__(self, student: nn.Module, names: Sequence[str], smoothing: float):
        self.student, self.names, self.smoothing = student, names, smoothing

    def loss(self, student: Callable[..., Any], batch: Batch) -> StepOutput:
        """Sum over layers of the batch's mean cross entropies; with several, each under its name."""
        assert batch.labels is not None
        with phase("student"):
            logits: Tensor = student(batch.images).float()
        labels = batch.labels[:, None].expand(-1, logits.shape[2])
        losses = nn.functional.cross_entropy(logits, labels, label_smoothing=self.smoothing, reduction="none").mean(0)
        named = {f"loss_{name}": loss.detach() for name, loss in zip(self.names, losses, strict=True)}
        return StepOutput(losses.sum(), named if len(named) > 1 else {})

    def terms(self, batch: Batch) -> None:
        """Every batch has the same size."""
