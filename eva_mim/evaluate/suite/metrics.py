"""Metrics of test sets, in percent, of the answers to all images. Labels and answers are class numbers [N]."""

from __future__ import annotations

import torch
from torch import Tensor


def top1(labels: Tensor, answers: Tensor) -> float:
    """Returns the share of images whose answer is their label."""
    return _percent((answers == labels).double().mean())


def top5(labels: Tensor, five: Tensor) -> float:
    """Returns the share of images whose label is one of five answers [N, 5]."""
    return _percent((five == labels[:, None]).any(1).double().mean())


def mean_per_class(labels: Tensor, answers: Tensor) -> float:
    """Returns the mean over the classes that have images of their share of right answers (balanced accuracy)."""
    there, right, _ = _counts(labels, answers)
    return _percent((right / there)[there > 0].mean())


def macro_f1(labels: Tensor, answers: Tensor) -> float:
    """Returns the mean over the classes that have images of their F1 score, as WILDS has it."""
    there, right, said = _counts(labels, answers)
    return _percent((2 * right / (there + said))[there > 0].mean())


def worst_group(right: Tensor, groups: Tensor) -> float:
    """Returns the share of right answers, [N] bool, in the group where it is lowest; `groups`: [N], any numbers."""
    _, group = torch.unique(groups, return_inverse=True)
    return _percent((torch.bincount(group, right.double()) / torch.bincount(group)).min())


def jaccard(scores: Tensor, correct: Tensor) -> float:
    """Returns the Jaccard index of the correct candidates of a problem, [N] bool, and the as many with the largest scores [N]."""
    chosen = torch.zeros_like(correct)
    chosen[scores.topk(int(correct.sum())).indices] = True
    return _percent((chosen & correct).sum().double() / (chosen | correct).sum())


def _counts(labels: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns [K] numbers by class: of images, of right answers, and of answers."""
    classes = int(torch.maximum(labels, answers).max()) + 1
    rows = (labels, labels[answers == labels], answers)
    there, right, said = (torch.bincount(row, minlength=classes).double() for row in rows)
    return there, right, said


def _percent(share: Tensor) -> float:
    return 100.0 * float(share)
