"""What a task hands to an engine: the loss of a forward pass or of a step, term by term."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class LossTerm(NamedTuple):
    """One summand of a loss: a mean over some number of patches, images or pairs, which `Task.counts` says."""

    mean: Tensor
    """Differentiable scalar. Where the count is 0 it is a finite number that all of the student's outputs enter."""
    weight: float = 1.0
    """Factor of the term in the loss."""
    metrics: Mapping[str, Tensor] = {}
    """Detached scalars to log that are means over the same number."""


class StepOutput(NamedTuple):
    """The loss of a forward pass or of a step, term by term, and detached scalars to log."""

    terms: dict[str, LossTerm]
    """By name; the same names on every rank and in every micro-batch."""
    metrics: dict[str, Tensor]
    """Means over passes, however many patches or images each has."""

    @property
    def loss(self) -> Tensor:
        """Sum of the terms' means, each times its weight."""
        first, *others = (term.mean * term.weight for term in self.terms.values())
        return sum(others, first)

    def with_metrics(self, **more: Tensor | None) -> StepOutput:
        """The same loss with more metrics; None is left out."""
        return StepOutput(self.terms, self.metrics | {name: value for name, value in more.items() if value is not None})


class GradCacheStep(NamedTuple):
    """The loss of a whole step, and what one of its micro-batches passes back."""

    output: StepOutput
    """Without a gradient; the same for every micro-batch of a process."""
    gradients: tuple[Tensor, ...]
    """Of the loss by each tensor that the student says of this micro-batch, such that the mean over micro-batches is right."""
