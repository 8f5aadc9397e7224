"""Figures on held-out data. Every rank measures its own samples; counts are summed, so nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim import features
from eva_mim.contracts import Batch
from eva_mim.distributed import all_gather_rows, all_reduce_sum
from eva_mim.features import CHUNK
from eva_mim.log import say
from eva_mim.task import MaskedFeatures

Autocast = Callable[[], Any]


class MaskedFeatureEvaluator:
    """Whether masked pretraining works: held-out cosine, and what can be read off the features of whole images."""

    headline = "cosine"

    def __init__(
        self, task: MaskedFeatures, val: Iterable[Batch], bank: Iterable[Batch], *, labelled: bool, device: torch.device
    ):
        self.task, self.val, self.bank, self.labelled, self.device = task, val, bank, labelled, device
        self._mean_target: float | None = None

    def __call__(self, student: Any, autocast: Autocast) -> dict[str, float]:
        """`cosine`: with the held-out masks, which are of the training's kind; `cosine_stripes`: with every other patch hidden,
        as the original validates (EVA-01/eva/engine_for_pretraining.py), for students that take any mask; `cosine_of_mean`:
        that of always predicting the best constant; `feature_std`, `effective_rank`: see `features.py`; `knn_top1`,
        `knn_class_top1`, `ridge_top1`: percent, by the mean of the patches and by the class token, where labels exist."""
        found = _Sums(self.device)
        rows, labels = [], []
        for batch in (batch.to(self.device) for batch in self.val):
            with autocast():
                target = self.task.spatial(batch)
                index = self.task.index(batch)
                found.cosine("cosine", student(batch.images, batch.masked, index), target[index])
                if batch.masked is not None and student.any_mask:
                    stripes, striped = _stripes(batch)
                    found.cosine("cosine_stripes", student(batch.images, stripes, striped), target[striped])
                rows.append(_both(student.features(batch.images)))
            if self._mean_target is None:
                found.direction(target[index])
            if batch.labels is not None:
                labels.append(batch.labels)
        result = found.means()
        if self._mean_target is None:
            self._mean_target = found.length_of_mean()
        mean, token = (_gathered([row[kind] for row in rows]) for kind in (0, 1))
        assert mean is not None
        result |= {
            "cosine_of_mean": self._mean_target,
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
            assert batch.labels is not None
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
    """Cosines over patches and ranks."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self._direction: Tensor | None = None

    def cosine(self, name: str, prediction: Tensor, target: Tensor) -> None:
        """Add the cosines of [M, C] rows to the mean called `name`."""
        cosine = F.cosine_similarity(prediction.float(), target.float(), dim=-1).double()
        part = torch.stack([cosine.sum(), cosine.new_tensor(len(cosine))])
        self.sums[name] = self.sums.get(name, 0) + part

    def direction(self, target: Tensor) -> None:
        """Add [M, C] targets to the mean unit target."""
        part = F.normalize(target.float(), dim=-1).double().sum(0)
        self._direction = part if self._direction is None else self._direction + part

    def means(self) -> dict[str, float]:
        """Mean cosine by name."""
        names = sorted(self.sums)
        total = all_reduce_sum(torch.stack([self.sums[name] for name in names]))
        self._count = float(total[names.index("cosine"), 1])
        return {name: float(row[0] / row[1]) for name, row in zip(names, total, strict=True)}

    def length_of_mean(self) -> float:
        """The constant with the best mean cosine is the mean unit target; its mean cosine is that vector's length."""
        assert self._direction is not None
        return float(all_reduce_sum(self._direction).norm() / self._count)


def _stripes(batch: Batch) -> tuple[Tensor, Tensor]:
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
        val: Iterable[Batch],
        *,
        tokenize: Callable[[list[str]], Tensor],
        classes: Sequence[str] | None,
        templates: Sequence[str],
        device: torch.device,
    ):
        self.val, self.tokenize, self.classes, self.templates, self.device = val, tokenize, classes, templates, device
        self.headline = "zeroshot_top1" if classes else "image_to_text_r1"

    def __call__(self, student: Any, autocast: Autocast) -> dict[str, float]:
        """Percentages. Captions that are equal count as one text; any image with that caption is right for it."""
        images, texts, labels = [], list[Tensor](), []
        for batch in (batch.to(self.device) for batch in self.val):
            with autocast():
                images.append(student.encode_image(batch.images).float())
            assert batch.texts is not None
            texts.append(batch.texts)
            if batch.labels is not None:
                labels.append(batch.labels)
        image = all_gather_rows(torch.cat(images))
        unique, owner = torch.unique(all_gather_rows(torch.cat(texts)), dim=0, return_inverse=True)
        with autocast():
            text = torch.cat([student.encode_text(rows).float() for rows in torch.split(unique, CHUNK)])
        result = retrieval(image, text, owner)
        if self.classes:
            weights = self._class_features(student, autocast)
            truth = all_gather_rows(torch.cat(labels))
            result["zeroshot_top1"] = 100.0 * float(((image @ weights.T).argmax(1) == truth).float().mean())
        return result

    def _class_features(self, student: Any, autocast: Autocast) -> Tensor:
        """[K, C] mean of each class's prompts, renormalised (CLIP, section 3.1.4)."""
        assert self.classes is not None
        rows = []
        for name in self.classes:
            prompts = self.tokenize([template.replace("{}", name) for template in self.templates]).to(self.device)
            with autocast():
                rows.append(student.encode_text(prompts).float().mean(0))
        return F.normalize(torch.stack(rows), dim=-1)


def retrieval(image: Tensor, text: Tensor, owner: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Recall at k in percent, both ways: image [I, C], text [T, C], owner [I] = row of each image's text."""
    result = {}
    to_text = torch.zeros(len(ks))
    for rows, own in zip(torch.split(image, CHUNK), torch.split(owner, CHUNK), strict=True):
        ranked = (rows @ text.T).topk(min(max(ks), len(text)), dim=1).indices == own[:, None]
        to_text += torch.tensor([float(ranked[:, :k].any(1).sum()) for k in ks])
    to_image = torch.zeros(len(ks))
    for start, rows in zip(range(0, len(text), CHUNK), torch.split(text, CHUNK), strict=True):
        found = owner[(rows @ image.T).topk(min(max(ks), len(image)), dim=1).indices]
        hits = found == torch.arange(start, start + len(rows), device=owner.device)[:, None]
        to_image += torch.tensor([float(hits[:, :k].any(1).sum()) for k in ks])
    for k, there, back in zip(ks, to_text, to_image, strict=True):
        result[f"image_to_text_r{k}"] = 100.0 * float(there) / len(image)
        result[f"text_to_image_r{k}"] = 100.0 * float(back) / len(text)
    return result


class ClassifierEvaluator:
    """Accuracy over exactly the held-out samples."""

    headline = "top1"

    def __init__(self, val: Iterable[Batch], device: torch.device):
        self.val, self.device = val, device

    def __call__(self, student: nn.Module, autocast: Autocast) -> dict[str, float]:
        """`top1` and `top5` in percent, `loss` without smoothing."""
        total = torch.zeros(4, dtype=torch.float64, device=self.device)
        for batch in (batch.to(self.device) for batch in self.val):
            with autocast():
                logits = student(batch.images).float()
            assert batch.labels is not None
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
            loss = F.cross_entropy(logits, batch.labels, reduction="sum")
            total += torch.stack([ranked[:, 0].sum(), ranked.any(1).sum(), loss, loss.new_tensor(len(logits))]).double()
        right, five, summed, count = (float(value) for value in all_reduce_sum(total))
        return {"top1": 100 * right / count, "top5": 100 * five / count, "loss": summed / count}
