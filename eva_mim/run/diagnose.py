"""Largest values of each layer in a step that is not finite: a dump records them, and a replay prints them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eva_mim.core.batches import Batch
from eva_mim.core.contracts import Task

Layers = dict[str, dict[str, float]]
"""Layer -> {"weight", "output", "gradient"} -> largest absolute value (NaN if any is NaN), in order of computation."""


@dataclass
class Finding:
    """Loss and largest values of a forward (and backward) pass."""

    loss: float
    layers: Layers


def most(values: Iterable[float]) -> float:
    """Returns the largest of the values, at least 0; NaN if one of them is NaN."""
    return float(torch.tensor([0.0, *values], dtype=torch.float64).max())


def _largest(tensors: Iterable[Tensor]) -> float:
    return most(float(tensor.detach().abs().max()) for tensor in tensors if tensor.numel())


def largest_of(findings: Iterable[Layers]) -> Layers:
    """Returns the largest values of each layer over several passes."""
    merged: Layers = {}
    for layers in findings:
        for name, row in layers.items():
            known = merged.setdefault(name, {})
            known |= {what: most([known.get(what, 0.0), value]) for what, value in row.items()}
    return merged


def first_bad(layers: Layers, what: str = "output") -> str | None:
    """Returns the first layer, in order of computation, whose `what` is not finite; None if all are."""
    return next((name for name, row in layers.items() if not math.isfinite(row.get(what, 0.0))), None)


@contextmanager
def _watched(module: nn.Module, layers: Layers) -> Iterator[None]:
    def note(name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            row = layers.setdefault(name, {})
            row["output"] = most([row.get("output", 0.0), _largest([output])])

    handles = [layer.register_forward_hook(partial(note, name)) for name, layer in module.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def diagnose(
    task: Task, module: nn.Module, batch: Batch, autocast: Callable[[], Any], loss_scale: float | None = None
) -> Finding:
    """Runs one micro-batch forward, and with `loss_scale` also backward (gradients accumulate in the module); returns its loss
    and largest values."""
    layers: Layers = {}
    with _watched(module, layers), autocast(), torch.set_grad_enabled(loss_scale is not None):
        loss = task.loss(module, batch).loss
    if loss_scale is not None:
        torch.autograd.backward(loss * loss_scale)
    for name, layer in module.named_modules():
        own = list(layer.parameters(recurse=False))
        if own:
            row = layers.setdefault(name or "(own parameters)", {})
            row["weight"] = _largest(own)
            if grads := [p.grad for p in own if p.grad is not None]:
                row["gradient"] = _largest(grads)
    return Finding(float(loss.detach()), layers)
