"""Figures of frozen features against brute force and closed forms."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eva_mim.evaluate.features import CHUNK, RIDGES, collapsed, effective_rank, fit_ridge, knn_accuracy, ridge_accuracy, spread


def unit(count: int, width: int, seed: int) -> Tensor:
    """Random unit rows."""
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def clusters(count: int, classes: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Unit rows around one centre a class, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    rows = unit(classes, 12, 0)[labels] + noise * torch.randn(count, 12, generator=generator)
    return F.normalize(rows, dim=-1), labels


def brute_ridge(queries: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor) -> float:
    """Every sample really left out once for every penalty, with numpy's solver."""
    x, y = bank.double().numpy(), np.eye(int(max(labels.max(), bank_labels.max())) + 1)[bank_labels.numpy()]
    values = np.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0)))

    def fit(rows: np.ndarray, wanted: np.ndarray, penalty: float, centre: np.ndarray) -> np.ndarray:
        # The penalty does not touch the offset.
        design = np.hstack([rows - centre, np.ones((len(rows), 1))])
        weights = np.eye(design.shape[1]) * penalty
        weights[-1, -1] = 0
        return np.linalg.solve(design.T @ design + weights, design.T @ wanted)

    def ask(rows: np.ndarray, solution: np.ndarray, centre: np.ndarray) -> np.ndarray:
        return np.hstack([rows - centre, np.ones((len(rows), 1))]) @ solution

    best, chosen = -1.0, 0.0
    for ridge in RIDGES:
        penalty, right = ridge * values.mean(), 0
        for out in range(len(x)):
            keep = np.arange(len(x)) != out
            solution = fit(x[keep], y[keep], penalty, x.mean(0))
            right += ask(x[out : out + 1], solution, x.mean(0)).argmax() == int(bank_labels[out])
        if right / len(x) > best:
            best, chosen = right / len(x), penalty
    solution = fit(x, y, chosen, x.mean(0))
    answers = ask(queries.double().numpy(), solution, x.mean(0)).argmax(1)
    return 100 * float((answers == labels.numpy()).mean())


@pytest.mark.parametrize("noise", [0.3, 0.6])
def test_ridge_probe_is_leave_one_out_by_brute_force(noise: float) -> None:
    bank, bank_labels = clusters(60, 4, noise, 1)
    queries, labels = clusters(200, 4, noise, 2)
    found = ridge_accuracy(queries, labels, bank, bank_labels)
    assert found == pytest.approx(brute_ridge(queries, labels, bank, bank_labels))
    assert 45 < found < 100


def whole_ridge(bank: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(weights, offset) of centred rows from whole matrices, with the hat matrix for the leverages."""
    x, y = bank.double() - bank.double().mean(0), F.one_hot(labels, classes).double()
    best, found = -1.0, x.new_zeros(0)
    for ridge in RIDGES:
        penalty = ridge * torch.linalg.eigvalsh(x.T @ x).mean()
        inverse = torch.linalg.inv(x.T @ x + penalty * torch.eye(x.shape[1]).double())
        hat = x @ inverse @ x.T + 1 / len(x)
        alone = y - (y - hat @ y) / (1 - hat.diagonal()[:, None])
        accuracy = float((alone.argmax(1) == labels).double().mean())
        if accuracy > best:
            best, found = accuracy, inverse @ x.T @ y
    return found, y.mean(0)


def test_ridge_probe_in_chunks_and_over_ranks_is_the_whole_formula() -> None:
    """Rows cross chunks; three ranks with 1, 700 and the other rows run in threads and sum what they have."""
    rows, labels = clusters(2 * CHUNK + 301, 5, 0.8, 1)
    rows = rows * torch.linspace(0.1, 20, 12) + 3
    weights, offset = whole_ridge(rows, labels, 6)
    whole = fit_ridge(rows, labels, 6, device=torch.device("cpu"), total=lambda part: part)
    torch.testing.assert_close(whole.weights, weights, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(whole.offset, offset, atol=1e-12, rtol=0)
    torch.testing.assert_close(whole.centre, rows.double().mean(0), atol=1e-12, rtol=0)
    parts, shown, barrier = [slice(0, 1), slice(1, 701), slice(701, None)], [torch.empty(0)] * 3, Barrier(3)

    def ranked(rank: int) -> tuple[Tensor, float]:
        def total(part: Tensor) -> Tensor:
            shown[rank] = part.clone()
            barrier.wait(60)
            result = torch.stack(shown).sum(0)
            barrier.wait(60)
            return result

        own, truth = rows[parts[rank]], labels[parts[rank]]
        shared = fit_ridge(own, truth, 6, device=torch.device("cpu"), total=total)
        return shared.weights, ridge_accuracy(own, truth, own, truth, classes=6, device=torch.device("cpu"), total=total)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(ranked, range(3)))
    for shared, accuracy in found:
        torch.testing.assert_close(shared, weights, atol=1e-10, rtol=1e-10)
        assert accuracy == ridge_accuracy(rows, labels, rows, labels)
    assert 40 < found[0][1] < 95


def test_ridge_probe_holds_no_copy_of_the_bank() -> None:
    """400,000 rows, of which one chunk at a time becomes float64 and one-hot."""
    rows, labels = torch.randn(400_000, 16), torch.arange(400_000) % 40
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                    largest = max(largest, tensor.numel())
            return result

    inputs = {rows.untyped_storage().data_ptr(), labels.untyped_storage().data_ptr()}
    with Watch():
        ridge_accuracy(rows, labels, rows, labels, classes=40)
    assert 16 * CHUNK <= largest <= 40 * CHUNK


def test_ridge_probe_reads_what_is_linear_and_not_what_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3000, 8, generator=generator)
    linear, parity = (rows[:, 0] > 0.2).long(), ((rows[:, 0] > 0) ^ (rows[:, 1] > 0)).long()
    assert ridge_accuracy(rows[2000:], linear[2000:], rows[:2000], linear[:2000]) > 93
    assert ridge_accuracy(rows[2000:], parity[2000:], rows[:2000], parity[:2000]) < 60


def test_effective_rank_counts_directions() -> None:
    """k orthogonal directions of equal strength: k. One direction: 1. Singular values 3 and 1: exp of their entropy."""
    signs = torch.tensor([[1.0], [-1.0]]).repeat(8, 1)
    for k in (1, 3, 7):
        rows = torch.zeros(16 * k, 10)
        for direction in range(k):
            rows[16 * direction : 16 * (direction + 1), direction] = signs[:, 0]
        assert effective_rank(rows + 5) == pytest.approx(k, abs=1e-4)
    rows = torch.cat([torch.eye(2)[:1] * 3, -torch.eye(2)[:1] * 3, torch.eye(2)[1:], -torch.eye(2)[1:]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(rows) == pytest.approx(math.exp(entropy), abs=1e-6)


def test_collapse_is_one_point_or_one_direction() -> None:
    full = unit(400, 32, 1)
    assert spread(full) == pytest.approx(1, abs=0.02)
    assert not collapsed(spread(full), effective_rank(full))
    point = F.normalize(torch.ones(400, 32) + 1e-3 * full, dim=-1)
    assert spread(point) < 0.01
    assert collapsed(spread(point), effective_rank(point))
    line = F.normalize(torch.randn(400, 1, generator=torch.Generator().manual_seed(2)) * torch.ones(1, 32) + 1e-4, dim=-1)
    assert spread(line) > 0.5
    assert collapsed(spread(line), effective_rank(line))


def test_knn_crosses_chunks() -> None:
    """Each query is its own nearest neighbour's class when the bank holds it."""
    rows, labels = unit(CHUNK + 70, 8, 3), torch.randint(0, 5, (CHUNK + 70,), generator=torch.Generator().manual_seed(4))
    assert knn_accuracy(rows, labels, rows, labels, k=1) == 100.0
