"""Zero-shot accuracy and retrieval of a CLIP student on held-out pairs. Images and texts are divided among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from eva_mim.core.batches import ImageTextBatch
from eva_mim.core.contracts import Autocast
from eva_mim.core.distributed import all_gather_rows, rank, world_size
from eva_mim.data.prompts import filled, prompt_templates
from eva_mim.evaluate.counts import TopCounts
from eva_mim.evaluate.features import CHUNK
from eva_mim.evaluate.retrieval import retrieval

PROMPTS = 256
"""Texts encoded at once. The number bounds the memory of activations, and still divides a thousand captions among a few ranks."""


class ClipEvaluator:
    """Evaluator of a CLIP student: zero-shot accuracy if there are classes, and retrieval in both directions."""

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
        """Returns percentages: `zeroshot_top1`, `zeroshot_top5`, and those of `retrieval`. Captions with equal tokens count as
        one text, which is correct for each of its images; images are never merged."""
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
    """Returns [K, C], the mean of each class's prompt features, renormalised (CLIP, section 3.1.4). `encode_text` returns unit
    rows. Every rank must call, since the prompts are divided among the ranks."""

    def encode(names: Sequence[str]) -> Tensor:
        prompts = tokenize([filled(template, name) for name in names for template in templates])
        with autocast():
            parts = [encode_text(part.to(device)).float() for part in torch.split(prompts, PROMPTS)]
        return F.normalize(torch.stack(torch.chunk(torch.cat(parts), len(names))).mean(1), dim=-1)

    step = max(1, PROMPTS // len(templates))
    return by_rank([classes[start : start + step] for start in range(0, len(classes), step)], encode)


G = TypeVar("G", bound=Sized)


def by_rank(groups: Sequence[G], rows_of: Callable[[G], Tensor]) -> Tensor:
    """Returns the rows that `rows_of` computes for every group, one row for each member, in the groups' order. The groups are
    divided among the ranks, and no group is split, so the rows do not depend on the number of ranks. Every rank must call."""
    own = groups[rank() :: world_size()]
    made = torch.cat([rows_of(group) for group in own or groups[:1]])  # a rank without groups contributes 0 rows of this width
    gathered = all_gather_rows(made[: sum(map(len, own))])
    places = torch.split(torch.arange(len(gathered), device=gathered.device), [len(group) for group in groups])
    turns = [place for first in range(world_size()) for place in places[first :: world_size()]]
    return torch.empty_like(gathered).index_copy_(0, torch.cat(turns), gathered)


def zero_shot(image: Tensor, labels: Tensor, weights: Tensor) -> dict[str, float]:
    """Returns `zeroshot_top1` and `zeroshot_top5`: percentage of all ranks' images whose class is the nearest, or among the five
    nearest. `image`: [I, C] of this rank; `labels`: [I]; `weights`: [K, C]. Every rank must call."""
    counts = TopCounts(image.device)
    for rows, truth in zip(torch.split(image, CHUNK), torch.split(labels, CHUNK), strict=True):
        counts.add(rows @ weights.T, truth)
    found = counts.figures()
    return {f"zeroshot_{name}": found[name] for name in ("top1", "top5")}
