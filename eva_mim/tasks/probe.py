"""Linear probes: one or several linear layers on the same frozen features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from eva_mim.core.batches import FeatureBatch, LabelledBatch
from eva_mim.core.contracts import Task
from eva_mim.core.losses import LossTerm, StepOutput
from eva_mim.core.timing import phase


def logits_of(student: Callable[..., Any], batch: LabelledBatch | FeatureBatch) -> Tensor:
    """Returns [B, K, layers] logits of a probe, in fp32, from images or from their features."""
    logits: Tensor = student(features=batch.features) if isinstance(batch, FeatureBatch) else student(batch.images)
    return logits.float()


class ProbeTask(Task):
    """Training of all layers of a probe on the same features. The loss is the sum of the layers' losses, so that each layer has
    the gradient of its own loss."""

    def __init__(self, student: nn.Module, names: Sequence[str], smoothing: float):
        self.student, self.names, self.smoothing = student, names, smoothing

    def loss(self, student: Callable[..., Any], batch: LabelledBatch | FeatureBatch) -> StepOutput:
        """Returns a loss term for each layer by its name: the mean cross entropy of the batch."""
        with phase("student"):
            logits = logits_of(student, batch)
        labels = batch.labels[:, None].expand(-1, logits.shape[2])
        losses = nn.functional.cross_entropy(logits, labels, label_smoothing=self.smoothing, reduction="none").mean(0)
        return StepOutput({name: LossTerm(loss) for name, loss in zip(self.names, losses.unbind(), strict=True)}, {})
