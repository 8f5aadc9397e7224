"""What both engines do alike in a step: weigh micro-batches so that the loss is one mean over the global batch."""

from __future__ import annotations

import torch
from torch import Tensor

from eva_mim.contracts import Batch, StepOutput, Task
from eva_mim.distributed import all_reduce_sum, world_size


def loss_weights(task: Task, batches: list[Batch]) -> list[Tensor | float]:
    """Factor of each micro-batch's mean loss, such that the plain mean over micro-batches and ranks is the mean over
    all terms of the global batch. Masks hide different numbers of patches; without this the loss would depend on how
    the batch is cut."""
    terms = [task.terms(batch) for batch in batches]
    counted = [term for term in terms if term is not None]
    if not counted:
        return [1.0] * len(batches)
    local = torch.stack(counted)
    mean = all_reduce_sum(local.sum()) / (len(batches) * world_size())
    return list(local / mean)


def combine(outputs: list[StepOutput], weights: list[Tensor | float]) -> StepOutput:
    """This rank's share of the step's loss and metrics (detached)."""
    count = len(outputs)
    loss = torch.stack([output.loss.detach().float() * w for output, w in zip(outputs, weights, strict=True)]).sum()
    metrics = {
        name: torch.stack([o.metrics[name] * w for o, w in zip(outputs, weights, strict=True)]).sum() / count
        for name in outputs[0].metrics
    }
    return StepOutput(loss / count, metrics)
