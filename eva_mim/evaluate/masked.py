"""Held-out figures of masked pretraining. Every rank measures its own samples; sums are taken over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eva_mim.core.batches import LabelledBatch, MaskedBatch
from eva_mim.core.contracts import Autocast, Features
from eva_mim.core.distributed import all_gather_rows, all_reduce_sum
from eva_mim.core.log import say
from eva_mim.evaluate import features
from eva_mim.evaluate.contrastive import zero_shot
from eva_mim.evaluate.patches import PatchProbe
from eva_mim.students.heads import SUMMARY
from eva_mim.targets.cached import chosen
from eva_mim.tasks.masked import MaskedFeatures

Pairs = dict[str, tuple[Tensor, Tensor]]
"""Prediction and target [rows, C] by the teacher's name, in its own space."""


class Prompts(NamedTuple):
    """A zero-shot classifier of what a student predicts of a CLIP model's summary."""

    teacher: str
    """Name of that teacher."""
    vectors: Tensor
    """[K, C], a unit vector a class by the teacher's text tower."""


class MaskedFeatureEvaluator:
    """Evaluator of masked pretraining: held-out cosine of prediction and target, and figures of the features of unmasked
    images."""

    def __init__(
        self, task: MaskedFeatures, val: Sequence[Iterable[MaskedBatch]], bank: Iterable[LabelledBatch], *, labelled: bool,
        device: torch.device, prompts: Prompts | None = None, probe: PatchProbe | None = None,
    ):
        """`val`: held-out batches of each group of teachers; those of the first give the figures of features. `bank`: labelled
        training images at its size. `probe`: of its patches by segmentation maps."""
        self.task, self.val, self.bank, self.labelled, self.device = task, val, bank, labelled, device
        self.prompts, self.probe = prompts, probe
        self.headline = "cosine" if any(lesson.spatial for lesson in task.lessons.values()) else "summary_cosine"

    def __call__(self, student: Any, autocast: Autocast) -> dict[str, float]:
        """Returns figures by name. `cosine`: mean cosine of prediction and target with the held-out masks, which are drawn by the
        law of training. `cosine_stripes`: the same with every other patch masked, as the original validates
        (EVA-01/eva/engine_for_pretraining.py), for students that accept any mask. `cosine_of_mean`: cosine of the best constant
        prediction. `error`: squared error / variance of the targets (1: as good as their mean), where the loss fixes the scale.
        `summary_cosine`: of summaries. Of several teachers the mean, and each one's as FIGURE_NAME. `feature_std`,
        `effective_rank`: see `features.py`. `knn_top1`, `ridge_top1` (on the mean of the patches) and `knn_class_top1` (on the
        class tokens): percent, if labels exist. `segmentation_miou`: see `PatchProbe`."""
        found = _Sums(self.device)
        rows, labels, said = [], [], []
        for first, batch in self._batches():
            with autocast():
                targets, index = self.task.targets(batch, self.task.taught(batch)), self.task.index(batch)
                predictions = self.task.predictions(student, batch, batch.masked, index)
                pairs = self._pairs(batch, predictions, targets, index)
                found.cosines("cosine", pairs)
                found.errors({name: pair for name, pair in pairs.items() if self.task.lessons[name].scaled})
                found.cosines("summary_cosine", self._summaries(predictions, targets))
                if batch.masked is not None and student.any_mask:
                    stripes, striped = _stripes(batch)
                    striped_predictions = self.task.predictions(student, batch, stripes, striped)
                    found.cosines("cosine_stripes", self._pairs(batch, striped_predictions, targets, striped))
                if first:
                    rows.append(_both(student.features(self.task.images(batch))))
            found.directions(pairs)
            if self.prompts is not None and self.prompts.teacher in targets:
                assert batch.labels is not None
                said.append((F.normalize(predictions[self.prompts.teacher + SUMMARY].float(), dim=-1), batch.labels))
            if first and batch.labels is not None:
                labels.append(batch.labels)
        result = found.means()
        mean, token = (_gathered([row[kind] for row in rows]) for kind in (0, 1))
        assert mean is not None
        result |= found.lengths_of_means() | found.relative_errors() | {
            "feature_std": features.spread(mean),
            "effective_rank": features.effective_rank(mean),
        }
        if features.collapsed(result["feature_std"], result["effective_rank"]):
            say(f"  alarm: the features have collapsed (feature_std {result['feature_std']:.3f}, "
                f"effective_rank {result['effective_rank']:.1f})")
        if self.prompts is not None:
            summaries, truth = (torch.cat(part) for part in zip(*said, strict=True))
            result |= zero_shot(summaries, truth, self.prompts.vectors)
        if self.probe is not None:
            result |= self.probe(student, autocast)
        if self.labelled:
            result |= self._labelled(student, autocast, mean, token, all_gather_rows(torch.cat(labels)))
        return result

    def _batches(self) -> Iterator[tuple[bool, MaskedBatch]]:
        """Yields whether a batch is of the first group, and the batch."""
        for number, loader in enumerate(self.val):
            for batch in loader:
                yield not number, batch.to(self.device)

    def _pairs(
        self, batch: MaskedBatch, predictions: dict[str, Tensor], targets: dict[str, Features], index: Tensor
    ) -> Pairs:
        """Returns predictions and targets of the patches of `index`."""
        found = {}
        for name, cells in self.task.cells(batch, index).items():
            if (lesson := self.task.lessons[name]).spatial is not None:
                found[name] = lesson.native(predictions[name]), chosen(targets[name].spatial, targets[name].grid, cells)
        return found

    def _summaries(self, predictions: dict[str, Tensor], targets: dict[str, Features]) -> Pairs:
        return {name: (predictions[name + SUMMARY], features.summary) for name, features in targets.items()
                if self.task.lessons[name].summary is not None}

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
    """Sums over patches or images, by figure and teacher; reduced over ranks when they are returned as means."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[tuple[str, str], Tensor] = {}
        self._directions: dict[str, Tensor] = {}
        self._errors: dict[str, Tensor] = {}

    def cosines(self, figure: str, pairs: Pairs) -> None:
        """Adds the cosines of pairs to the sums of a figure."""
        for name, (prediction, target) in pairs.items():
            cosine = F.cosine_similarity(prediction.float(), target.float(), dim=-1).double()
            part = torch.stack([cosine.sum(), cosine.new_tensor(len(cosine))])
            self.sums[figure, name] = self.sums.get((figure, name), 0) + part

    def errors(self, pairs: Pairs) -> None:
        """Adds squared errors, and what gives the variance of the targets: number, squares and sums."""
        for name, (prediction, target) in pairs.items():
            exact = target.double()
            error = (prediction.double() - exact).square().sum()
            part = torch.cat([torch.stack([error, exact.new_tensor(len(exact)), exact.square().sum()]), exact.sum(0)])
            self._errors[name] = self._errors.get(name, 0) + part

    def directions(self, pairs: Pairs) -> None:
        """Adds the unit vectors of each teacher's targets to their sum."""
        for name, (_, target) in pairs.items():
            part = F.normalize(target.float(), dim=-1).double().sum(0)
            self._directions[name] = self._directions[name] + part if name in self._directions else part

    def relative_errors(self) -> dict[str, float]:
        """Returns `error`, over all ranks."""
        found = {}
        for name, part in sorted(self._errors.items()):
            error, count, squares, *_ = total = all_reduce_sum(part)
            found[name] = float(error / (squares - total[3:].square().sum() / count))
        return _by_teacher("error", found) if found else {}

    def means(self) -> dict[str, float]:
        """Returns the mean cosines by figure, over all ranks."""
        keys = sorted(self.sums)
        total = all_reduce_sum(torch.stack([self.sums[key] for key in keys]))
        found = {key: float(row[0] / row[1]) for key, row in zip(keys, total, strict=True)}
        self._counts = {name: float(row[1]) for (figure, name), row in zip(keys, total, strict=True) if figure == "cosine"}
        figures = {figure: {name: value for (of, name), value in found.items() if of == figure} for figure, _ in keys}
        return {name: value for figure, each in figures.items() for name, value in _by_teacher(figure, each).items()}

    def lengths_of_means(self) -> dict[str, float]:
        """Returns `cosine_of_mean`, over all ranks: the best constant prediction is the mean unit target, and its mean cosine is
        the length of that vector."""
        lengths = {name: float(all_reduce_sum(one).norm() / self._counts[name])
                   for name, one in sorted(self._directions.items())}
        return _by_teacher("cosine_of_mean", lengths) if lengths else {}


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
