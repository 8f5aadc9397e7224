"""Loss of a forward pass or of a step by term: a task returns it to an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class LossTerm(NamedTuple):
    """One summand of a loss: a mean over patches, images or pairs, whose number `Task.counts` returns."""

    mean: Tensor
    """Differentiable scalar. If the count is 0 it is a finite number that still depends on all outputs of the student."""
    weight: float = 1.0
    """Factor of the term in the loss."""
    metrics: Mapping[str, Tensor] = {}
    """Detached scalars to log: means over the same patches, images or pairs."""


class StepOutput(NamedTuple):
    """Loss of a forward pass or of a step by term, and detached scalars to log."""

    terms: dict[str, LossTerm]
    """Loss terms by name; the same names on every rank and in every micro-batch."""
    metrics: dict[str, Tensor]
    """Metrics by name, averaged over forward passes with equal weights, whatever number of patches or images each has."""

    @property
    def loss(self) -> Tensor:
        """Scalar: sum of the terms' means, each times its weight."""
        first, *others = (term.mean * term.weight for term in self.terms.values())
        return sum(others, first)

    def with_metrics(self, **more: Tensor | None) -> StepOutput:
        """Returns the same loss with more metrics; those that are None are left out."""
        return StepOutput(self.terms, self.metrics | {name: value for name, value in more.items() if value is not None})


class GradCacheStep(NamedTuple):
    """Loss of a whole step, and its gradients by the features of one micro-batch."""

    output: StepOutput
    """Loss and metrics without a gradient; the same for every micro-batch of a process."""
    gradients: tuple[Tensor, ...]
    """Gradient of the loss by each tensor that the student returns for this micro-batch, scaled so that the mean over
    micro-batches is the gradient of the step."""
