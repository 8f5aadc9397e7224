"""Figures of frozen features: their spread, and the accuracy of k-NN and ridge classifiers on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eva_mim.data.store.rows import Stacked

KNN_TEMPERATURE = 0.07
"""Temperature of the votes: a neighbour's weight is exp(cosine / 0.07) (Wu et al. 2018, section 3.4; used by DINO and RADIO
alike)."""
CHUNK = 1024
"""Rows of a similarity matrix held at once."""
RIDGES = tuple(10.0**power for power in range(-5, 3))
"""Ridge penalties to choose from, as multiples of the mean eigenvalue of the features' covariance."""
LEAST_SPREAD, LEAST_RANK = 0.02, 2.0
"""Minimum `spread` and `effective_rank`; below one of them, features count as collapsed to (nearly) one direction."""


def spread(rows: Tensor) -> float:
    """Returns the standard deviation of unit features [R, D] over rows, times sqrt(D): 1 if they fill the sphere evenly, 0 if
    they have collapsed to a point."""
    return float(rows.std(0).mean() * rows.shape[1] ** 0.5)


def effective_rank(rows: Tensor) -> float:
    """Returns the exponential of the entropy of the normalised singular values of centred features [R, D] (RankMe, Garrido et al.
    2023, section 3.1): 1 to min(R, D)."""
    centred = (rows - rows.mean(0)).double()
    # By the smaller Gram matrix: a singular value decomposition of 5,000 rows takes seconds on a GPU.
    gram = centred.T @ centred if rows.shape[0] >= rows.shape[1] else centred @ centred.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = values / values.sum().clamp(min=1e-300)
    return float(torch.exp(-(share * share.clamp(min=1e-300).log()).sum()))


def collapsed(spread: float, rank: float) -> bool:
    """Returns True if the features have lost (nearly) all directions, by their `spread` and `effective_rank`."""
    return spread < LEAST_SPREAD or rank < LEAST_RANK


def knn_accuracy(queries: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, k: int = 20) -> float:
    """Returns the percentage of unit queries [Q, D] whose label wins the vote of their k nearest rows in the unit bank [R, D]."""
    classes = int(torch.cat([labels, bank_labels]).max()) + 1
    right = 0
    for rows, truth in zip(torch.split(queries, CHUNK), torch.split(labels, CHUNK), strict=True):
        similarity, nearest = (rows @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(rows), classes, device=rows.device)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / KNN_TEMPERATURE).exp())
        right += int((votes.argmax(1) == truth).sum())
    return 100.0 * right / len(queries)


Total = Callable[[Tensor], Tensor]
"""Function that sums a tensor over ranks with different rows."""


class LinearMap(NamedTuple):
    """Affine map (x - centre) @ weights + offset, in float64."""

    centre: Tensor
    """[D] mean of the training rows."""
    weights: Tensor
    """[D, K] weights of the classes."""
    offset: Tensor
    """[K] share of each class among the training rows."""


def ridge_accuracy(
    queries: Tensor | Stacked,
    labels: Tensor,
    bank: Tensor | Stacked,
    bank_labels: Tensor,
    *,
    classes: int | None = None,
    device: torch.device | None = None,
    total: Total = lambda part: part,
) -> float:
    """Returns the percentage of queries [Q, D] that `fit_ridge` on the bank [R, D] classifies correctly. `classes`: number of
    classes, default the largest label + 1; `device`: where to compute, default the bank's."""
    classes = int(torch.cat([labels, bank_labels]).max()) + 1 if classes is None else classes
    device = bank_labels.device if device is None else device
    centre, weights, offset = fit_ridge(bank, bank_labels, classes, device=device, total=total)
    right = torch.zeros(2, dtype=torch.float64, device=device)
    for rows, truth in _chunks(queries, labels, device):
        right += torch.stack([(((rows - centre) @ weights + offset).argmax(1) == truth).sum(), truth.new_tensor(len(truth))])
    hits, count = total(right).tolist()
    return float(100.0 * hits / count)


def fit_ridge(bank: Tensor | Stacked, labels: Tensor, classes: int, *, device: torch.device, total: Total) -> LinearMap:
    """Returns the ridge regression on one-hot labels, solved in closed form.

    The penalty is the one of `RIDGES` with the best leave-one-out accuracy on the bank (residuals divided by one minus the
    leverage), so it does not depend on queries. Rows are read in chunks, three times, since the bank may be a file larger
    than memory; D x D and `len(RIDGES)` times D x K numbers are held in memory.
    """
    centre, counts = torch.zeros(bank.shape[1], device=device).double(), torch.zeros(classes, device=device).double()
    for rows, truth in _chunks(bank, labels, device):
        centre += rows.sum(0)
        counts += torch.bincount(truth, minlength=classes)
    counts = total(counts)
    count = counts.sum()
    centre, offset = total(centre) / count, counts / count
    squares, products = centre.new_zeros(len(centre), len(centre)), centre.new_zeros(classes, len(centre))
    for rows, truth in _chunks(bank, labels, device):
        known = rows - centre
        squares.addmm_(known.T, known)
        products.index_add_(0, truth, known)
    values, vectors = torch.linalg.eigh(total(squares))
    projected = vectors.T @ total(products).T
    inverses = [1.0 / (values.clamp(min=0) + ridge * values.mean()) for ridge in RIDGES]
    maps = [inverse[:, None] * projected for inverse in inverses]
    right = torch.zeros(len(RIDGES), dtype=torch.float64, device=device)
    for rows, truth in _chunks(bank, labels, device):
        rotated, wanted = (rows - centre) @ vectors, F.one_hot(truth, classes).double()
        for number, (inverse, inner) in enumerate(zip(inverses, maps, strict=True)):
            leverage = (rotated.square() @ inverse)[:, None] + 1 / count
            alone = wanted - (wanted - (rotated @ inner + offset)) / (1 - leverage).clamp(min=1e-9)
            right[number] += (alone.argmax(1) == truth).sum()
    scores = total(right).tolist()
    return LinearMap(centre, vectors @ maps[scores.index(max(scores))], offset)


def _chunks(rows: Tensor | Stacked, labels: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(labels), CHUNK):
        chosen = slice(start, start + CHUNK)
        yield rows[chosen].to(device, torch.float64), labels[chosen].to(device)
