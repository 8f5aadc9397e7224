"""Two loss terms with counts of their own, cut in any way over ranks and micro-batches, are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva_mim.core.batches import FeatureBatch
from eva_mim.core.contracts import Rates, Task
from eva_mim.core.distributed import rank, setup, world_size
from eva_mim.core.losses import LossTerm, StepOutput
from eva_mim.engine import RunSettings, build_engine
from eva_mim.optim import OptimSettings
from tests.ranks import on_ranks

pytestmark = pytest.mark.slow
WEIGHTS = {"near": 1.0, "far": 0.25}
CUTS: dict[str, list[list[list[int]]]] = {
    "unequal counts": [[[0, 1], [2, 3]], [[4, 5], [6, 7]]],
    "one rank has none of a term": [[[0, 2], [3, 6]], [[1, 4], [5, 7]]],
}
"""Images of each micro-batch of each rank."""
OWNERS = {"near": [0, 1, 2, 3, 4, 5, 6], "far": [1, 4, 5, 7]}
"""Images that each term is a mean over."""


class TwoOutputs(nn.Linear):
    """A student without towers."""

    def towers(self) -> dict[str, Any]:
        return {}


class TwoTerms(Task):
    """Mean squares of two outputs, each over images of its own."""

    def __init__(self, student: nn.Module):
        self.student = student

    def loss(self, student: Any, batch: FeatureBatch) -> StepOutput:
        said = student(batch.features)
        terms = {}
        for column, name in enumerate(WEIGHTS):
            mine = said[_owned(batch, name), column].square()
            mean = mine.mean() if len(mine) else mine.sum()
            terms[name] = LossTerm(mean, WEIGHTS[name], {f"size_{name}": mean.detach().sqrt()})
        return StepOutput(terms, {})

    def counts(self, batch: FeatureBatch) -> dict[str, Tensor]:
        return {name: _owned(batch, name).sum().float() for name in WEIGHTS}


def _owned(batch: FeatureBatch, name: str) -> Tensor:
    return torch.isin(batch.index, torch.tensor(OWNERS[name]))


def step(cut: list[list[list[int]]], engine: str, zero_stage: int = 0) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights after a step, and this rank's share of its figures."""
    setup("cpu")
    torch.manual_seed(0)
    student, images = TwoOutputs(5, 2), torch.randn(8, 5)
    mine = cut[rank()]
    run = RunSettings(
        epochs=1, global_batch=8, micro_batch=len(mine[0]), precision="fp32", device="cpu", engine=engine, zero_stage=zero_stage
    )
    optim = OptimSettings(lr=0.1, optimizer="adamw", clip_grad=None)
    made = build_engine(student, run, optim, torch.device("cpu"))
    batches = [FeatureBatch(torch.tensor(part), images[part], torch.zeros(len(part))) for part in mine]
    output = made.step(TwoTerms(student), batches, Rates(0.1, 0.0))
    figures = {"loss": output.loss} | output.metrics
    return dict(made.weights()), {name: float(value) / world_size() for name, value in figures.items()}


@pytest.mark.parametrize("zero_stage", [0, 2])
@pytest.mark.parametrize("cut", CUTS)
def test_two_terms_over_two_ranks_are_those_of_one_process(cut: str, zero_stage: int) -> None:
    weights, figures = step([[list(range(8))]], "local")
    found = on_ranks(2, step, CUTS[cut], "deepspeed", zero_stage)
    for name, value in weights.items():
        torch.testing.assert_close(found[0][0][name], value, atol=1e-6, rtol=0)
    for name in ("loss", "loss_near", "loss_far", "grad_norm"):
        assert sum(each[name] for _, each in found) == pytest.approx(figures[name], abs=1e-6), name


@pytest.mark.parametrize("cut", CUTS)
def test_two_terms_over_micro_batches_are_those_of_one_batch(cut: str) -> None:
    weights, figures = step([[list(range(8))]], "local")
    parts, metrics = step([[part for mine in CUTS[cut] for part in mine]], "local")
    for name, value in weights.items():
        torch.testing.assert_close(parts[name], value, atol=1e-6, rtol=0)
    for name in ("loss", "loss_near", "loss_far", "grad_norm"):
        assert metrics[name] == pytest.approx(figures[name], abs=1e-6), name
