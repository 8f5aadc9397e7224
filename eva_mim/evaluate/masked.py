"""Held-out figures of masked pretraining. Every rank measures its own samples; sums are taken over all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eva_mim.core.contracts import Autocast, LabelledBatch, MaskedBatch
from eva_mim.core.distributed import all_gather_rows, all_reduce_sum
from eva_mim.core.log import say
from eva_mim.evaluate import features
from eva_mim.tasks.masked import MaskedFeatures


class MaskedFeatureEvaluator:
    """Evaluator of masked pretraining: held-out cosine of prediction and target, and figures of the features of unmasked
    images."""

    headline = "cosine"

    def __init__(
        self, task: MaskedFeatures, val: Iterable[MaskedBatch], bank: Iterable[LabelledBatch], *, labelled: bool,
        device: torch.device,
    ):
        self.task, self.val, self.bank, self.labelled, self.device = task, val, bank, labelled, device

    def __call__(self, student: Any, autocast: Autocast) -> dict[str, float]:
        """Returns figures by name. `cosine`: mean cosine of prediction and target with the held-out masks, which are drawn by the
        law of training. `cosine_stripes`: the same with every other patch masked, as the original validates
        (EVA-01/eva/engine_for_pretraining.py), for students that accept any mask. `cosine_of_mean`: cosine of the best constant
        prediction. `feature_std`, `effective_rank`: see `features.py`. `knn_top1`, `ridge_top1` (on the mean of the patches) and
        `knn_class_top1` (on the class token): percent, if labels exist."""
        found = _Sums(self.device)
        rows, labels = [], []
        for batch in (batch.to(self.device) for batch in self.val):
            with autocast():
                targets, index = self.task.spatial(batch), self.task.index(batch)
                found.cosines("cosine", self.task.predictions(student, batch, batch.masked, index), targets, index)
                if batch.masked is not None and student.any_mask:
                    stripes, striped = _stripes(batch)
                    found.cosines("cosine_stripes", self.task.predictions(student, batch, stripes, striped), targets, striped)
                rows.append(_both(student.features(self.task.images(batch))))
            found.directions(targets, index)
            if batch.labels is not None:
                labels.append(batch.labels)
        result = found.means()
        mean, token = (_gathered([row[kind] for row in rows]) for kind in (0, 1))
        assert mean is not None
        result |= found.lengths_of_means() | {
            "feature_std": features.spread(mean),
            "effective_rank": features.effective_rank(mean),
        }
        if features.collapsed(result["feature_std"], result["effective_rank"]):
            say(f"  alarm: the features have collapsed (feature_std {result['feature_std']:.3f}, "
                f"effective_rank {result['effective_rank']:.1f})")
        if self.labelled:
            result |= self._labelled(student, autocast, mean, token, all_gather_rows(torch.cat(labels)))
        return result

    def _labelled(
        self, student: Any, autocast: Autocast, mean: Tensor, token: Tensor | None, labels: Tensor
    ) -> dict[str, float]:
        rows, owned = [], []
        for batch in (batch.to(self.device) for batch in self.bank):
            with autocast():
                rows.append(_both(student.features(batch.images)))
            owned.append(batch.labels)
        bank, bank_token = (_gathered([row[kind] for row in rows]) for kind in (0, 1))
        assert bank is not None
        bank_labels = all_gather_rows(torch.cat(owned))
        result = {
            "knn_top1": features.knn_accuracy(mean, labels, bank, bank_labels),
            "ridge_top1": features.ridge_accuracy(mean, labels, bank, bank_labels),
        }
        if token is not None and bank_token is not None:
            result["knn_class_top1"] = features.knn_accuracy(token, labels, bank_token, bank_labels)
        return result


class _Sums:
    """Sums of cosines over patches, by figure and teacher; reduced over ranks when they are returned as means."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[tuple[str, str], Tensor] = {}
        self._directions: dict[str, Tensor] = {}

    def cosines(self, figure: str, predictions: dict[str, Tensor], targets: dict[str, Tensor], index: Tensor) -> None:
        """Adds the cosines of each teacher's [M, C] predictions and the rows `index` of its [B * N, C] targets to the sums of a
        figure."""
        for name, prediction in predictions.items():
            cosine = F.cosine_similarity(prediction.float(), targets[name][index].float(), dim=-1).double()
            part = torch.stack([cosine.sum(), cosine.new_tensor(len(cosine))])
            self.sums[figure, name] = self.sums.get((figure, name), 0) + part

    def directions(self, targets: dict[str, Tensor], index: Tensor) -> None:
        """Adds the unit vectors of the rows `index` of each teacher's [B * N, C] targets to their sum."""
        for name, target in targets.items():
            part = F.normalize(target[index].float(), dim=-1).double().sum(0)
            self._directions[name] = self._directions[name] + part if name in self._directions else part

    def means(self) -> dict[str, float]:
        """Returns the mean cosines by figure, over all ranks."""
        keys = sorted(self.sums)
        total = all_reduce_sum(torch.stack([self.sums[key] for key in keys]))
        found = {key: float(row[0] / row[1]) for key, row in zip(keys, total, strict=True)}
        self._count = float(total[[figure for figure, _ in keys].index("cosine"), 1])
        figures = {figure: {name: value for (of, name), value in found.items() if of == figure} for figure, _ in keys}
        return {name: value for figure, each in figures.items() for name, value in _by_teacher(figure, each).items()}

    def lengths_of_means(self) -> dict[str, float]:
        """Returns `cosine_of_mean`, over all ranks: the best constant prediction is the mean unit target, and its mean cosine is
        the length of that vector."""
        lengths = {name: float(all_reduce_sum(one).norm() / self._count) for name, one in sorted(self._directions.items())}
        return _by_teacher("cosine_of_mean", lengths)


def _by_teacher(figure: str, values: dict[str, float]) -> dict[str, float]:
    """Returns the mean over teachers as FIGURE; of several teachers also each one's own value as FIGURE_NAME."""
    if len(values) == 1:
        return {figure: next(iter(values.values()))}
    return {figure: sum(values.values()) / len(values)} | {f"{figure}_{name}": value for name, value in values.items()}


def _stripes(batch: MaskedBatch) -> tuple[Tensor, Tensor]:
    """Returns [B, N] masks of all patches with even numbers, and the positions of these patches in [B * N]."""
    assert batch.masked is not None
    hidden = torch.zeros_like(batch.masked)
    hidden[:, ::2] = True
    return hidden, torch.arange(hidden.numel(), device=hidden.device)[hidden.flatten()]


def _both(pair: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Returns the features of patch mean and class token as unit rows in fp32; None without a class token."""
    mean, token = pair
    return F.normalize(mean.float(), dim=-1), None if token is None else F.normalize(token.float(), dim=-1)


def _gathered(parts: list[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return all_gather_rows(torch.cat(known)) if known else None
