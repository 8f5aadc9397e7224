"""Figures of frozen features: how far they spread, and what can be read off them without training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

KNN_TEMPERATURE = 0.07
"""Weight of a neighbour is exp(cosine / 0.07) (Wu et al. 2018, section 3.4; used by DINO and RADIO alike)."""
CHUNK = 1024
"""Rows of a similarity matrix held at once."""
RIDGES = tuple(10.0**power for power in range(-5, 3))
"""Penalties that are tried, as multiples of the mean eigenvalue of the features' covariance."""
LEAST_SPREAD, LEAST_RANK = 0.02, 2.0
"""Below one of these, features count as collapsed: one direction, or next to none, is left."""


def spread(rows: Tensor) -> float:
    """Standard deviation of unit features [R, D] over rows, times sqrt(D): 1 when they fill the sphere evenly, 0 when
    they have collapsed to a point."""
    return float(rows.std(0).mean() * rows.shape[1] ** 0.5)


def effective_rank(rows: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of centred features [R, D] (RankMe, Garrido et al. 2023,
    section 3.1): 1 to min(R, D)."""
    values = torch.linalg.svdvals((rows - rows.mean(0)).double())
    share = values / values.sum().clamp(min=1e-300)
    return float(torch.exp(-(share * share.clamp(min=1e-300).log()).sum()))


def collapsed(spread: float, rank: float) -> bool:
    """The features have lost (nearly) all directions."""
    return spread < LEAST_SPREAD or rank < LEAST_RANK


def knn_accuracy(queries: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, k: int = 20) -> float:
    """Percent of unit queries [Q, D] whose k nearest of the unit bank [R, D] vote for their label."""
    classes = int(torch.cat([labels, bank_labels]).max()) + 1
    right = 0
    for rows, truth in zip(torch.split(queries, CHUNK), torch.split(labels, CHUNK), strict=True):
        similarity, nearest = (rows @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(rows), classes, device=rows.device)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / KNN_TEMPERATURE).exp())
        right += int((votes.argmax(1) == truth).sum())
    return 100.0 * right / len(queries)


def ridge_accuracy(queries: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor) -> float:
    """Percent of queries [Q, D] that a linear map, fitted in closed form to the bank [R, D], classifies rightly.

    Ridge regression on one-hot labels; the penalty is the one of `RIDGES` with the best leave-one-out accuracy on the bank
    (residuals divided by one minus the leverage), so no query has a say in it.
    """
    classes = int(torch.cat([labels, bank_labels]).max()) + 1
    centre = bank.double().mean(0)
    known, asked = bank.double() - centre, queries.double() - centre
    wanted = F.one_hot(bank_labels, classes).double()
    offset = wanted.mean(0)
    values, vectors = torch.linalg.eigh(known.T @ known)
    rotated = known @ vectors
    projected = rotated.T @ (wanted - offset)
    best, weights = -1.0, projected
    for ridge in RIDGES:
        inverse = 1.0 / (values.clamp(min=0) + ridge * values.mean())
        fitted = rotated @ (inverse[:, None] * projected) + offset
        leverage = (rotated.square() * inverse).sum(1, keepdim=True) + 1 / len(bank)
        alone = wanted - (wanted - fitted) / (1 - leverage).clamp(min=1e-9)
        accuracy = float((alone.argmax(1) == bank_labels).double().mean())
        if accuracy > best:
            best, weights = accuracy, vectors @ (inverse[:, None] * projected)
    return 100.0 * float(((asked @ weights + offset).argmax(1) == labels).double().mean())
