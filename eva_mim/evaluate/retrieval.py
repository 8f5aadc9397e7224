"""Retrieval among unit features, in both directions, without holding the matrix of all similarities in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eva_mim.core.distributed import all_reduce_sum, rank, world_size
from eva_mim.evaluate.features import CHUNK

BANK = 8192
"""Candidates that are compared with a chunk of queries at once: 32 MiB of similarities."""


def retrieval(image: Tensor, text: Tensor, owner: Tensor, right: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Returns recall at k in percent, in both directions, of images [I, C] and texts [T, C]. `owner` and `right` are pairs [P] in
    any order: text `right[p]` belongs to image `owner[p]`, and each image and each text is in at least one pair. An image is a
    hit if any of its texts is among the k nearest, a text if any of its images is. A recall that cannot be below 100 is left out:
    its k is not smaller than the number of candidates. The queries are divided among the ranks; every rank must call, with the
    same features."""
    found = dict[str, float]()
    for name, recall, bank in (("image_to_text", recalls(image, text, owner, right, ks), text),
                               ("text_to_image", recalls(text, image, right, owner, ks), image)):
        found |= {f"{name}_r{k}": value for k, value in zip(ks, recall, strict=True) if k < len(bank) or k == 1}
    return found


def recalls(queries: Tensor, bank: Tensor, query: Tensor, answer: Tensor, ks: Sequence[int]) -> list[float]:
    """Returns, for each k, the percentage of queries [Q, C] with an answer among the k nearest rows of the bank [R, C]; `query`
    and `answer` are pairs as in `retrieval`."""
    pairs = torch.unique(query * len(bank) + answer)
    hits = torch.zeros(len(ks), dtype=torch.float64, device=queries.device)
    for start in range(rank() * CHUNK, len(queries), world_size() * CHUNK):
        near = nearest(queries[start : start + CHUNK], bank, max(ks))
        said = torch.arange(start, start + len(near), device=near.device)[:, None] * len(bank) + near
        hit = pairs[torch.searchsorted(pairs, said).clamp(max=len(pairs) - 1)] == said
        hits += torch.stack([hit[:, :k].any(1).sum() for k in ks])
    return [100 * float(count) / len(queries) for count in all_reduce_sum(hits)]


def nearest(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Returns [Q, min(k, R)] row numbers of the bank [R, C], in falling order of the rows' product with each query [Q, C]."""
    best, rows = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), BANK):
        scores = queries @ bank[start : start + BANK].T
        values, places = scores.topk(min(k, scores.shape[1]), dim=1)
        best, rows = torch.cat([best, values], dim=1), torch.cat([rows, places + start], dim=1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, kept)
    return rows
