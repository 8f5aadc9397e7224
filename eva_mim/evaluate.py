"""Figures on held-out data. Every rank measures its own samples; counts are summed, so nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.contracts import Batch
from eva_mim.distributed import all_gather_rows, all_reduce_sum
from eva_mim.task import MaskedFeatures

Autocast = Callable[[], Any]
KNN_TEMPERATURE = 0.07
"""Weight of a neighbour is exp(cosine / 0.07) (Wu et al. 2018, section 3.4; used by DINO and RADIO alike)."""
CHUNK = 1024
"""Rows of a similarity matrix held at once."""


class MaskedFeatureEvaluator:
    """Held-out cosine with fixed masks, k-NN accuracy where labels exist, and the spread of features."""

    headline = "cosine"

    def __init__(
        self, task: MaskedFeatures, val: Iterable[Batch], bank: Iterable[Batch], *, labelled: bool, device: torch.device
    ):
        self.task, self.val, self.bank, self.labelled, self.device = task, val, bank, labelled, device
        self._mean_target: float | None = None

    def __call__(self, student: nn.Module, autocast: Autocast) -> dict[str, float]:
        """`cosine`; `cosine_of_mean`: that of always predicting the best constant; `feature_std`: 1 when unit features
        fill the sphere evenly, 0 when they have collapsed; `knn_top1` in percent."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        direction: Tensor | None = None
        summaries, labels = [], []
        for batch in (batch.to(self.device) for batch in self.val):
            with autocast():
                prediction = student(batch.images, batch.masked, batch.masked_index)
                target = self.task.targets(batch) if self._mean_target is None else None
                known = target if target is not None else self.task.targets(batch)
                summaries.append(student.summary(batch.images).float())  # type: ignore[operator]
            cosine = F.cosine_similarity(prediction.float(), known.float(), dim=-1)
            total += torch.tensor([cosine.double().sum(), len(cosine)], dtype=torch.float64, device=self.device)
            if target is not None:
                part = F.normalize(target.float(), dim=-1).double().sum(0)
                direction = part if direction is None else direction + part
            if batch.labels is not None:
                labels.append(batch.labels)
        count = all_reduce_sum(total)
        if direction is not None:
            # The constant with the best mean cosine is the mean unit target; its mean cosine is that vector's length.
            self._mean_target = float(all_reduce_sum(direction).norm() / count[1])
        features = F.normalize(all_gather_rows(torch.cat(summaries)), dim=-1)
        result = {
            "cosine": float(count[0] / count[1]),
            "cosine_of_mean": self._mean_target or 0.0,
            "feature_std": float(features.std(0).mean() * features.shape[1] ** 0.5),
        }
        if self.labelled:
            bank, bank_labels = self._bank(student, autocast)
            result["knn_top1"] = knn_accuracy(features, all_gather_rows(torch.cat(labels)), bank, bank_labels)
        return result

    def _bank(self, student: nn.Module, autocast: Autocast) -> tuple[Tensor, Tensor]:
        features, labels = [], []
        for batch in (batch.to(self.device) for batch in self.bank):
            with autocast():
                features.append(student.summary(batch.images).float())  # type: ignore[operator]
            assert batch.labels is not None
            labels.append(batch.labels)
        return F.normalize(all_gather_rows(torch.cat(features)), dim=-1), all_gather_rows(torch.cat(labels))


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
