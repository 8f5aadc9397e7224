"""Batch norm with the statistics of all ranks, against torch's own: values, gradients, statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva_mim.core.distributed import rank
from eva_mim.students.norms import GlobalNorm
from tests.ranks import on_ranks


def test_rows_are_standardised_in_doubles() -> None:
    torch.manual_seed(0)
    ours, torchs = GlobalNorm(5, eps=1e-6, affine=False), torch.nn.BatchNorm1d(5, eps=1e-6, affine=False, dtype=torch.float64)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for step in range(4):
        rows = torch.randn(9, 5) * torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e3]) + 7 * step
        torch.testing.assert_close(ours(rows).double(), torchs(rows.double()), atol=1e-6, rtol=1e-6)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(torchs, name), rtol=1e-6, atol=0)
    rows = torch.randn(3, 5)
    torch.testing.assert_close(ours.eval()(rows).double(), torchs.eval()(rows.double()), rtol=1e-4, atol=1e-4)


def pair(width: int, shape: tuple[int, ...]) -> tuple[nn.Module, GlobalNorm, Tensor]:
    """torch's norm, ours with the same weights, and an input."""
    torch.manual_seed(0)
    theirs = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(width)
    ours = GlobalNorm(width)
    for parameter in theirs.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, 3 + 2 * torch.randn(shape)


@pytest.mark.parametrize("shape", [(8, 5), (8, 5, 6, 7)])
def test_batch_norm_against_torchs(shape: tuple[int, ...]) -> None:
    theirs, ours, given = pair(5, shape)
    inputs = [given.clone().requires_grad_() for _ in range(2)]
    weights = torch.randn(shape)
    for module, one in zip((theirs, ours), inputs, strict=True):
        (module(one) * weights).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-4)
    for (name, one), other in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4, msg=name)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.eval()(given), theirs.eval()(given))


def halves(shape: tuple[int, ...]) -> dict[str, Any]:
    """This rank's outputs, gradients and statistics of its half of a batch."""
    _, ours, given = pair(5, shape)
    torch.manual_seed(1)
    weights = torch.randn(shape)
    rows = slice(rank() * len(given) // 2, (rank() + 1) * len(given) // 2)
    own = given[rows].clone().requires_grad_()
    found = ours(own)
    (found * weights[rows]).sum().backward()
    return {"out": found.detach(), "gradient": own.grad, "weight": ours.weight.grad, "mean": ours.running_mean,
            "var": ours.running_var}


@pytest.mark.parametrize("shape", [(8, 5), (8, 5, 6, 7)])
def test_batch_norm_of_two_ranks_is_that_of_the_whole_batch(shape: tuple[int, ...]) -> None:
    theirs, _, given = pair(5, shape)
    torch.manual_seed(1)
    weights = torch.randn(shape)
    whole = given.clone().requires_grad_()
    found = theirs(whole)
    (found * weights).sum().backward()
    first, second = on_ranks(2, halves, shape)
    torch.testing.assert_close(torch.cat([first["out"], second["out"]]), found.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([first["gradient"], second["gradient"]]), whole.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first["weight"] + second["weight"], theirs.weight.grad, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]
    for name, one in (("mean", "running_mean"), ("var", "running_var")):
        torch.testing.assert_close(first[name], getattr(theirs, one))
        assert torch.equal(first[name], second[name])
