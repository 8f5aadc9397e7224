"""Figures on held-out data. Every rank measures its own samples; counts are summed, so nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.contracts import FeatureBatch, ImageTextBatch, LabelledBatch, MaskedBatch
from eva_mim.core.distributed import all_gather_rows, all_reduce_sum, rank, world_size
from eva_mim.core.log import say
from eva_mim.data.prompts import filled, prompt_templates
from eva_mim.evaluate import features
from eva_mim.evaluate.counts import TopCounts
from eva_mim.evaluate.features import CHUNK
from eva_mim.evaluate.retrieval import retrieval
from eva_mim.tasks.masked import MaskedFeatures
from eva_mim.tasks.probe import logits_of

Autocast = Callable[[], Any]
PROMPTS = 256
"""Texts encoded at once: their activations are bounded, and a thousand captions still divide among a few ranks."""


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


class ClipEvaluator:
    """Zero-shot accuracy where labels exist, and retrieval both ways."""

    def __init__(
        self,
        val: Iterable[ImageTextBatch],
        *,
        tokenize: Callable[[list[str]], Tensor],
        classes: Sequence[str] | None,
        templates: str | Sequence[str],
        device: torch.device,
    ):
        self.val, self.tokenize, self.classes, self.device = val, tokenize, classes, device
        self.templates = prompt_templates(templates)
        self.headline = "zeroshot_top1" if classes else "image_to_text_r1"

    def __call__(self, student: Any, autocast: Autocast) -> dict[str, float]:
        """Percentages: `zeroshot_top1`, `zeroshot_top5`, and those of `retrieval`. Captions that are equal as tokens count as one
        text, which is right for each of its images; images are never merged."""
        images, labels, places, texts, owners = [], list[Tensor](), [], list[Tensor](), []
        for batch in (batch.to(self.device) for batch in self.val):
            with autocast():
                images.append(student.encode_image(batch.images).float())
            places.append(batch.index)
            texts.append(batch.texts)
            owners.append(batch.index[batch.text_owner])
            if batch.labels is not None:
                labels.append(batch.labels)
        found = {}
        if self.classes:
            encoded = class_features(student.encode_text, self.tokenize, self.classes, self.templates, autocast, self.device)
            found = zero_shot(torch.cat(images), torch.cat(labels), encoded)
        place, order = all_gather_rows(torch.cat(places)).sort()
        image = all_gather_rows(torch.cat(images))[order]
        owner = torch.searchsorted(place, all_gather_rows(torch.cat(owners)))
        unique, text = torch.unique(all_gather_rows(torch.cat(texts)), dim=0, return_inverse=True)

        def encode(rows: Tensor) -> Tensor:
            with autocast():
                features: Tensor = student.encode_text(rows).float()
            return features

        return found | retrieval(image, by_rank(torch.split(unique, PROMPTS), encode), owner, text)


def class_features(
    encode_text: Callable[[Tensor], Tensor], tokenize: Callable[[list[str]], Tensor], classes: Sequence[str],
    templates: Sequence[str], autocast: Autocast, device: torch.device,
) -> Tensor:
    """[K, C] mean of each class's prompts, renormalised (CLIP, section 3.1.4). `encode_text` gives unit rows. Every rank must
    call: they share the prompts."""

    def encode(names: Sequence[str]) -> Tensor:
        prompts = tokenize([filled(template, name) for name in names for template in templates])
        with autocast():
            parts = [encode_text(part.to(device)).float() for part in torch.split(prompts, PROMPTS)]
        return F.normalize(torch.stack(torch.chunk(torch.cat(parts), len(names))).mean(1), dim=-1)

    step = max(1, PROMPTS // len(templates))
    return by_rank([classes[start : start + step] for start in range(0, len(classes), step)], encode)


G = TypeVar("G", bound=Sized)


def by_rank(groups: Sequence[G], rows_of: Callable[[G], Tensor]) -> Tensor:
    """The rows that `rows_of` makes of every group, one for each of its members, in the groups' order. Ranks take turns, and a
    group is always worked on whole, so that the rows do not depend on the number of ranks. Every rank must call."""
    own = groups[rank() :: world_size()]
    made = torch.cat([rows_of(group) for group in own or groups[:1]])  # a rank without a group shows the shape of no rows
    gathered = all_gather_rows(made[: sum(map(len, own))])
    places = torch.split(torch.arange(len(gathered), device=gathered.device), [len(group) for group in groups])
    turns = [place for first in range(world_size()) for place in places[first :: world_size()]]
    return torch.empty_like(gathered).index_copy_(0, torch.cat(turns), gathered)


def zero_shot(image: Tensor, labels: Tensor, weights: Tensor) -> dict[str, float]:
    """Percent of this rank's images [I, C] and all others' whose class [K, C] is the nearest, or among the five nearest."""
    counts = TopCounts(image.device)
    for rows, truth in zip(torch.split(image, CHUNK), torch.split(labels, CHUNK), strict=True):
        counts.add(rows @ weights.T, truth)
    found = counts.figures()
    return {f"zeroshot_{name}": found[name] for name in ("top1", "top5")}


class ClassifierEvaluator:
    """Accuracy over exactly the held-out samples."""

    headline = "top1"

    def __init__(self, val: Iterable[LabelledBatch], device: torch.device):
        self.val, self.device = val, device

    def __call__(self, student: nn.Module, autocast: Autocast) -> dict[str, float]:
        """`top1` and `top5` in percent, `loss` without smoothing."""
        counts = TopCounts(self.device)
        for batch in (batch.to(self.device) for batch in self.val):
            with autocast():
                logits = student(batch.images).float()
            counts.add(logits, batch.labels, F.cross_entropy(logits, batch.labels, reduction="sum"))
        return counts.figures()


class ProbeEvaluator:
    """Accuracy of a probe's layers over exactly the held-out samples. Which of several is the result, `select` decides."""

    headline = "top1"

    def __init__(
        self,
        val: Iterable[LabelledBatch | FeatureBatch],
        select: Iterable[LabelledBatch | FeatureBatch],
        names: Sequence[str],
        *,
        fixed: dict[str, float],
        device: torch.device,
    ):
        self.val, self.select, self.names, self.fixed, self.device = val, select, names, fixed, device

    def __call__(self, student: Any, autocast: Autocast) -> dict[str, float]:
        """`top1` and `top5` in percent and `loss` of the chosen layer; of several also `chosen` (its place from 0), and
        `top1_NAME` and `select_top1_NAME` of each: on the held-out images, and on those that the choice is made on. `fixed` is
        added."""
        found = {}
        if len(self.names) > 1:
            measured = self._measure(student, autocast, self.select)
            best = max(range(len(self.names)), key=lambda layer: (measured["top1"][layer], -measured["loss"][layer]))
            student.chosen.fill_(best)
            found = {f"select_top1_{name}": value for name, value in zip(self.names, measured["top1"], strict=True)}
        chosen = int(student.chosen)
        measured = self._measure(student, autocast, self.val)
        result = {name: values[chosen] for name, values in measured.items()}
        if len(self.names) > 1:
            result["chosen"] = float(chosen)
            result |= {f"top1_{name}": value for name, value in zip(self.names, measured["top1"], strict=True)}
        return result | found | self.fixed

    def _measure(
        self, student: Any, autocast: Autocast, batches: Iterable[LabelledBatch | FeatureBatch]
    ) -> dict[str, list[float]]:
        """Figures of each layer, over all ranks."""
        counts = TopCounts(self.device, len(self.names))
        for batch in (batch.to(self.device) for batch in batches):
            with autocast():
                logits = logits_of(student, batch)
            labels = batch.labels[:, None].expand(-1, len(self.names))
            counts.add(logits, batch.labels, F.cross_entropy(logits, labels, reduction="none").sum(0))
        return counts.figures()
