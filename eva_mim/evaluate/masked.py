"""Held-out figures of masked pretraining. Every rank measures its own samples; sums are taken over all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eva_mim.core.contracts import LabelledBatch, MaskedBatch
from eva_mim.core.distributed import all_gather_rows, all_reduce_sum
from eva_mim.core.log import say
from eva_mim.evaluate import features
from eva_mim.tasks.masked import MaskedFeatures

Autocast = Callable[[], Any]


class MaskedFeatureEvaluator:
    """Whether masked pretraining works: held-out cosine, and what can be read off the features of whole images."""

    headline = "cosine"

    def __init__(
        self, task: MaskedFeatures, val: Iterable[MaskedBatch], bank: Iterable[LabelledBatch], *, labelled: bool,
        device: torch.device,
    ):
        self.task, self.val, self.bank, self.labelled, self.device = task, val, bank, labelled, device
        self._mean_target: dict[str, float] | None = None

    def __call__(self, student: Any, autocast: Autocast) -> dict[str, float]:
        """`cosine`: with the held-out masks, which are of the training's kind; `cosine_stripes`: with every other patch hidden,
        as the original validates (EVA-01/eva/engine_for_pretraining.py), for students that take any mask; `cosine_of_mean`:
        that of always predicting the best constant; `feature_std`, `effective_rank`: see `features.py`; `knn_top1`,
        `knn_class_top1`, `ridge_top1`: percent, by the mean of the patches and by the class token, where labels exist."""
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
            if self._mean_target is None:
                found.directions(targets, index)
            if batch.labels is not None:
                labels.append(batch.labels)
        result = found.means()
        if self._mean_target is None:
            self._mean_target = found.lengths_of_means()
        mean, token = (_gathered([row[kind] for row in rows]) for kind in (0, 1))
        assert mean is not None
        result |= self._mean_target | {
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
    """Cosines over patches and ranks, by figure and teacher."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[tuple[str, str], Tensor] = {}
        self._directions: dict[str, Tensor] = {}

    def cosines(self, figure: str, predictions: dict[str, Tensor], targets: dict[str, Tensor], index: Tensor) -> None:
        """Add to each teacher's mean the cosines of its [M, C] predictions and the rows `index` of its [B * N, C] targets."""
        for name, prediction in predictions.items():
            cosine = F.cosine_similarity(prediction.float(), targets[name][index].float(), dim=-1).double()
            part = torch.stack([cosine.sum(), cosine.new_tensor(len(cosine))])
            self.sums[figure, name] = self.sums.get((figure, name), 0) + part

    def directions(self, targets: dict[str, Tensor], index: Tensor) -> None:
        """Add the rows `index` of each teacher's [B * N, C] targets to its mean unit target."""
        for name, target in targets.items():
            part = F.normalize(target[index].float(), dim=-1).double().sum(0)
            self._directions[name] = self._directions[name] + part if name in self._directions else part

    def means(self) -> dict[str, float]:
        """Mean cosines by figure."""
        keys = sorted(self.sums)
        total = all_reduce_sum(torch.stack([self.sums[key] for key in keys]))
        found = {key: float(row[0] / row[1]) for key, row in zip(keys, total, strict=True)}
        self._count = float(total[[figure for figure, _ in keys].index("cosine"), 1])
        figures = {figure: {name: value for (of, name), value in found.items() if of == figure} for figure, _ in keys}
        return {name: value for figure, each in figures.items() for name, value in _by_teacher(figure, each).items()}

    def lengths_of_means(self) -> dict[str, float]:
        """The constant with the best mean cosine is the mean unit target; its mean cosine is that vector's length."""
        lengths = {name: float(all_reduce_sum(one).norm() / self._count) for name, one in sorted(self._directions.items())}
        return _by_teacher("cosine_of_mean", lengths)


def _by_teacher(figure: str, values: dict[str, float]) -> dict[str, float]:
    """The mean over teachers, and of several each teacher's own as FIGURE_NAME."""
    if len(values) == 1:
        return {figure: next(iter(values.values()))}
    return {figure: sum(values.values()) / len(values)} | {f"{figure}_{name}": value for name, value in values.items()}


def _stripes(batch: MaskedBatch) -> tuple[Tensor, Tensor]:
    """[B, N] masks that hide every patch of even number, and their positions in [B * N]."""
    assert batch.masked is not None
    hidden = torch.zeros_like(batch.masked)
    hidden[:, ::2] = True
    return hidden, torch.arange(hidden.numel(), device=hidden.device)[hidden.flatten()]


def _both(pair: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Unit rows in fp32."""
    mean, token = pair
    return F.normalize(mean.float(), dim=-1), None if token is None else F.normalize(token.float(), dim=-1)


def _gathered(parts: list[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return all_gather_rows(torch.cat(known)) if known else None
