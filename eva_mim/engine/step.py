"""Functions of a step for both engines: weights of micro-batches, loss scaling, and skipping a step that is not finite."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from eva_mim.core.batches import Batch
from eva_mim.core.contracts import Rates, Task
from eva_mim.core.distributed import all_reduce_sum, world_size
from eva_mim.core.losses import LossTerm, StepOutput
from eva_mim.engine.loss_scale import LossScale
from eva_mim.optim.optimizers import SkippableOptimizer

Shares = dict[str, Tensor]
"""Factor of a micro-batch's mean by the loss term's name; 1 where a name is missing."""


def loss_shares(task: Task, batches: list[Batch]) -> list[Shares]:
    """Returns for each micro-batch the factor on each loss term's mean: its count / mean count of all micro-batches and ranks.
    With these factors the mean over micro-batches and ranks is the mean over the global batch; without them the loss would
    depend on how the batch is cut, since masks hide different numbers of patches. A term of count 0 everywhere has factors 0."""
    counts = [task.counts(batch) for batch in batches]
    names = list(counts[0])
    if not names:
        return [{} for _ in batches]
    local = torch.stack([torch.stack([count[name] for name in names]) for count in counts])
    mean = all_reduce_sum(local.sum(0)) / (len(batches) * world_size())
    return [dict(zip(names, row, strict=True)) for row in local / mean.where(mean > 0, 1.0)]


def scaled_loss(output: StepOutput, shares: Shares, scale: Tensor | float, divisor: int) -> Tensor:
    """Returns the scalar that is backpropagated for a micro-batch: the sum of its terms' means, each times
    weight * share * scale / divisor. Its gradient is NaN if a mean is not finite."""
    first, *others = (
        nan_gradient_if_not_finite(term.mean) * (term.weight * shares.get(name, 1.0) * scale / divisor)
        for name, term in output.terms.items()
    )
    return sum(others, first)


def autocast(device: torch.device, precision: str) -> Any:
    """Returns a context with the precision of a forward pass; for fp32 it does nothing."""
    dtype = low_precision(precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def low_precision(precision: str) -> torch.dtype | None:
    """Returns the data type of autocast; None for fp32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def placed(student: nn.Module, engine: str, device: torch.device) -> nn.Module:
    """Returns the student on the device, in the memory layout of an engine, on which figures depend by rounding: channels last
    for "local"; DeepSpeed flattens parameters and keeps their layout."""
    layout = {"memory_format": torch.channels_last} if engine == "local" else {}
    moved: nn.Module = student.to(device, **layout)  # type: ignore[call-overload]
    return moved


def slowdown(precision: str, device: torch.device) -> float:
    """Returns the time of a matrix product in `precision` / its time in fp32, measured in about 10 ms; 1 if not on a CPU.

    A processor without bf16 or fp16 units computes them in software, 50 times as slowly as fp32 on AVX2.
    """
    dtype = low_precision(precision)
    if dtype is None or device.type != "cpu":
        return 1.0

    def seconds(dtype: torch.dtype) -> float:
        matrix, times = torch.ones(256, 256, dtype=dtype), []
        for _ in range(3):
            started = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - started)
        return min(times)

    return seconds(dtype) / seconds(torch.float32)


def nan_gradient_if_not_finite(loss: Tensor) -> Tensor:
    """Returns the loss; if it is not finite its gradient is NaN, so that the reduced gradient is NaN on every rank."""
    return loss * torch.where(loss.isfinite(), 1.0, float("nan"))


def set_rates(groups: list[dict[str, Any]], rates: Rates) -> None:
    """Sets learning rate and weight decay of each parameter group for the next step."""
    for group in groups:
        group["lr"] = rates.lr * group["lr_scale"] if group.get("head") or not rates.heads_alone else 0.0
        group["weight_decay"] = rates.weight_decay * group["decays"]


def reduce_outputs(
    outputs: list[StepOutput], shares: list[Shares], norm: Tensor, scale: LossScale, update_ratio: Tensor | None
) -> StepOutput:
    """Returns this rank's loss and metrics of the step (detached), averaged over micro-batches, and updates the loss scale; see
    `contracts.Engine.step`. With several loss terms the metrics have the mean of each as `loss_NAME`, and what it adds to the
    loss, as a share of the sum of all absolute values, as `share_NAME`."""
    used, bad = scale.value, ~norm.isfinite()
    scale.update(bad)
    terms = {name: _reduced(name, outputs, shares) for name in outputs[0].terms}
    metrics = {name: _mean([output.metrics[name] for output in outputs]) for name in outputs[0].metrics}
    whole = sum(((term.mean * term.weight).abs() for term in terms.values()), torch.zeros_like(norm))
    for name, term in terms.items():
        metrics |= term.metrics
        if len(terms) > 1:
            metrics[f"loss_{name}"] = term.mean
            metrics[f"share_{name}"] = (term.mean * term.weight).abs() / whole
    return StepOutput(terms, metrics).with_metrics(
        grad_norm=norm, skipped=bad.float(), update_ratio=update_ratio, loss_scale=used if scale.dynamic else None
    )


def _reduced(name: str, outputs: list[StepOutput], shares: list[Shares]) -> LossTerm:
    """Returns a loss term and its metrics, averaged over micro-batches, each times its share."""
    terms, factors = [output.terms[name] for output in outputs], [share.get(name, 1.0) for share in shares]

    def mean(values: list[Tensor]) -> Tensor:
        return _mean([value * factor for value, factor in zip(values, factors, strict=True)])

    metrics = {metric: mean([term.metrics[metric] for term in terms]) for metric in terms[0].metrics}
    return LossTerm(mean([term.mean.detach().float() for term in terms]), terms[0].weight, metrics)


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum() / len(values)


def clip_and_step(
    optimizer: SkippableOptimizer, parameters: Iterable[nn.Parameter], clip: float | None, scale: LossScale
) -> Tensor:
    """Clips the gradient to the global norm `clip` and updates the weights; skips the update if the gradient is not finite.

    Returns the norm of the unscaled gradient before clipping (a scalar), without a host sync.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip is not None and gradients:  # as `clip_grad_norm_`, which waits for the device to read a limit that is a tensor
        torch._foreach_mul_(gradients, ((norm + 1e-6).reciprocal() * (clip * scale.value)).clamp(max=1.0))
    norm = norm / scale.value
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.grad_scale = scale.value if scale.dynamic else None
    optimizer.step()
    return norm.detach()
