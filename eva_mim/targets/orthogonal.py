"""Orthogonal matrices that spread variance evenly over channels: Hadamard matrices, and for other widths rotations."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor | None:
    """Returns a Hadamard matrix [order, order]: entries 1 and -1 (float64), orthogonal rows. It is a product of Sylvester's
    doublings and one of Paley's matrices (R. Paley 1933, constructions I and II, for primes); None if none of these has the
    order."""
    core, doublings = order, 0
    while (found := _core(core)) is None:
        if core % 2:
            return None
        core, doublings = core // 2, doublings + 1
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(doublings):
        found = torch.kron(two, found)
    return found


def _core(order: int) -> Tensor | None:
    """Returns a Hadamard matrix of order 1 or by Paley; None if the order has none of these."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4 == 0 and _is_prime(order - 1):  # construction I: the prime is 3 modulo 4
        paley = _bordered(order - 1, below=-1.0)
        return paley + torch.eye(order, dtype=torch.float64)
    if order % 4 == 0 and order // 2 % 4 == 2 and _is_prime(order // 2 - 1):  # construction II: it is 1 modulo 4
        paley = _bordered(order // 2 - 1, below=1.0)
        plus, minus = ([[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]])
        eye = torch.eye(len(paley), dtype=torch.float64)
        return torch.kron(paley, torch.tensor(plus, dtype=torch.float64)) + torch.kron(
            eye, torch.tensor(minus, dtype=torch.float64))
    return None


def _bordered(prime: int, below: float) -> Tensor:
    """Returns the conference matrix [prime + 1, prime + 1]: quadratic characters of differences, with a first row of ones and a
    first column of `below`; 0 on the diagonal."""
    squares = torch.zeros(prime, dtype=torch.bool)
    squares[torch.arange(1, prime) ** 2 % prime] = True
    character = torch.where(squares, 1.0, -1.0).double()
    character[0] = 0.0
    places = torch.arange(prime)
    found = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    found[0, 1:], found[1:, 0] = 1.0, below
    found[1:, 1:] = character[(places[None] - places[:, None]) % prime]
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def spreading(variances: Tensor) -> Tensor:
    """Returns an orthogonal matrix R [C, C], float64, for which R diag(variances) R^T has one value on its diagonal, the mean.

    A Hadamard matrix / sqrt(C) does that for any variances. For a width without one it is the Hartley transform (entries
    cos + sin of 2 pi i j / C, over sqrt(C)), which does it nearly, followed by C - 1 plane rotations, which make each diagonal
    entry the mean in turn; they exist by the Schur-Horn theorem.
    """
    width = len(variances)
    if (found := hadamard(width)) is not None:
        return found.to(variances.device) / math.sqrt(width)
    angles = torch.arange(width, dtype=torch.float64)
    angles = 2 * math.pi / width * (angles[:, None] * angles[None] % width)
    return _levelled((angles.cos() + angles.sin()) / math.sqrt(width), variances.double().cpu()).to(variances.device)


def _levelled(matrix: Tensor, variances: Tensor) -> Tensor:
    """Returns an orthogonal matrix, rotated by pairs of rows until all rows have the same variance."""
    rows, mean = matrix.clone(), float(variances.mean())
    level = (rows.square() @ variances).tolist()
    left = set(range(len(rows)))
    for _ in range(len(rows) - 1):
        high, low = max(left, key=level.__getitem__), min(left, key=level.__getitem__)
        between = float((rows[high] * rows[low]) @ variances)
        # The variance of cos(t) high + sin(t) low goes from level[high] to level[low] as t goes from 0 to pi / 2: it is the mean
        # in between. With x = tan(t): (low - mean) x^2 + 2 between x + (high - mean) = 0, and the product of its roots is <= 0.
        a, c = level[low] - mean, level[high] - mean
        root = math.sqrt(max(between * between - a * c, 0.0))
        t = math.atan2(-c, between + math.copysign(root, between)) if c else 0.0
        pair = torch.stack([rows[high], rows[low]])
        rows[high] = math.cos(t) * pair[0] + math.sin(t) * pair[1]
        rows[low] = math.cos(t) * pair[1] - math.sin(t) * pair[0]
        level[low] += level[high] - mean
        left.remove(high)
    return rows
