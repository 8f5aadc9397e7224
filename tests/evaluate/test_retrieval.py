"""Retrieval against loops, its memory, and the same figures from one process and from two."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eva_mim.core.contracts import Sample
from eva_mim.data.loader import EvalLoader
from eva_mim.data.preparation import ImageTextPreparation
from eva_mim.data.source_settings import SceneSettings
from eva_mim.data.sources.scenes import SceneSource
from eva_mim.data.views import EvalView
from eva_mim.evaluate import retrieval as module
from eva_mim.evaluate.contrastive import ClipEvaluator
from eva_mim.evaluate.retrieval import nearest, retrieval
from eva_mim.students import ClipSettings, TextSettings
from eva_mim.students.clip import ClipStudent
from tests.ranks import on_ranks


def unit(count: int, seed: int, width: int = 8) -> Tensor:
    """Random unit rows."""
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def loop_recall(scores: Tensor, pairs: set[tuple[int, int]], k: int) -> float:
    """Percent of rows with one of their pairs among the k highest scores, one row at a time."""
    right = 0
    for row, values in enumerate(scores.tolist()):
        ranked = sorted(range(len(values)), key=values.__getitem__, reverse=True)[:k]
        right += any((row, place) in pairs for place in ranked)
    return 100 * right / len(scores)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 queries and 40 candidates, so that small cases cross them."""
    monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(module, "BANK", 40)


def case(images: int, texts: int, shared: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each image with texts of its own near it, and `shared` texts that a second image has as well."""
    owner = torch.arange(texts) % images
    text = unit(texts, 2)
    image = F.normalize(torch.zeros(images, 8).index_add_(0, owner, text) + 1.2 * unit(images, 3), dim=-1)
    more = torch.arange(shared)
    order = torch.randperm(texts + shared, generator=torch.Generator().manual_seed(4))
    owners, right = torch.cat([owner, (owner[:shared] + 1) % images]), torch.cat([torch.arange(texts), more])
    return image, text, owners[order], right[order]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("images", "texts", "shared"), [(30, 30, 0), (50, 250, 7), (16, 40, 3), (17, 41, 0), (4, 4, 1), (3, 90, 0)]
)
def test_retrieval_is_a_loop(images: int, texts: int, shared: int) -> None:
    image, text, owner, right = case(images, texts, shared)
    found = retrieval(image, text, owner, right)
    pairs = set(zip(owner.tolist(), right.tolist(), strict=True))
    scores = image @ text.T
    for k in (1, 5, 10):
        for name, matrix, both in (("image_to_text", scores, pairs), ("text_to_image", scores.T, {(t, i) for i, t in pairs})):
            if k == 1 or k < matrix.shape[1]:
                assert found[f"{name}_r{k}"] == pytest.approx(loop_recall(matrix, both, k))
            else:  # every candidate is among the k nearest
                assert f"{name}_r{k}" not in found
                assert loop_recall(matrix, both, k) == 100
    assert images < 10 or found["text_to_image_r1"] < found["text_to_image_r10"]


@pytest.mark.usefixtures("small_chunks")
def test_the_nearest_of_all_chunks_are_those_of_the_whole_matrix() -> None:
    queries, bank = unit(20, 1), unit(203, 2)
    assert torch.equal(nearest(queries, bank, 10), (queries @ bank.T).topk(10, dim=1).indices)
    assert torch.equal(nearest(queries, bank[:6], 10), (queries @ bank[:6].T).sort(dim=1, descending=True).indices)


class Largest(TorchDispatchMode):
    """The most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_no_tensor_grows_with_images_times_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor is one chunk of similarities, or the data itself, however many there are."""
    assert module.CHUNK * module.BANK * 4 <= 64 * 2**20
    monkeypatch.setattr(module, "CHUNK", 64)
    monkeypatch.setattr(module, "BANK", 512)
    for images, texts in ((400, 2000), (800, 4000)):
        image, text, owner, right = case(images, texts, 10)
        with Largest() as seen:
            retrieval(image, text, owner, right)
        assert seen.elements == 64 * 512
        assert seen.elements < images * texts / 20


class Several(SceneSource):
    """One to three captions an image."""

    def read(self, index: int) -> Sample:
        sample = super().read(index)
        return sample._replace(captions=tuple(f"{word} {sample.captions[0]}" for word in "abc"[: index % 3 + 1]))


def figures_of_this_rank() -> dict[str, float]:
    """Of a student with random weights, on 31 images."""
    torch.manual_seed(0)
    text = TextSettings(width=16, layers=1, heads=2, context_length=24)
    student = ClipStudent(ClipSettings(name="convnet_nano_32", embed_dim=12, text=text)).eval()
    source = Several(SceneSettings(size=32, val=31), "val")
    tokenize = student.tokenizer()
    val = EvalLoader(source, ImageTextPreparation(EvalView([32]), 0, tokenize, ("{}",), training=False), 4, 0)
    device = torch.device("cpu")
    evaluator = ClipEvaluator(val, tokenize=tokenize, classes=source.classes, templates="simple", device=device)
    with torch.no_grad():
        return evaluator(student, nullcontext)


@pytest.mark.slow
def test_two_processes_find_what_one_finds() -> None:
    """31 images with 1 to 3 captions: retrieval and zero-shot, the same figures to the last digit."""
    (alone,) = on_ranks(1, figures_of_this_rank)
    assert on_ranks(2, figures_of_this_rank) == [alone, alone]
    assert 0 < alone["text_to_image_r10"] < 100
    assert {"zeroshot_top1", "zeroshot_top5", "image_to_text_r1"} <= alone.keys()
