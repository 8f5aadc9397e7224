"""Held-out figures against loops and brute force."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.batches import ImageTextBatch, LabelledBatch, MaskedBatch
from eva_mim.evaluate.contrastive import ClipEvaluator, by_rank
from eva_mim.evaluate.features import knn_accuracy, ridge_accuracy
from eva_mim.evaluate.labels import ClassifierEvaluator
from eva_mim.evaluate.masked import MaskedFeatureEvaluator
from eva_mim.students import ClipSettings, MaskedSettings, TextSettings
from eva_mim.students.clip import ClipStudent
from eva_mim.students.masked import MaskedStudent
from eva_mim.targets.live import LiveTargets
from eva_mim.tasks.masked import Lesson, MaskedFeatures
from eva_mim.tasks.objectives import masked_cosine
from eva_mim.teachers import TeacherSettings, build_teacher
from tests.evaluate.test_retrieval import loop_recall

CPU = torch.device("cpu")


def unit(count: int, width: int, seed: int) -> Tensor:
    """Random unit rows."""
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def batches(*, masked: bool = False, texts: Tensor | None = None, sizes: tuple[int, ...] = (5, 4)) -> list[Any]:
    """Random 32 px pictures with labels 0..2; with masks of different sizes on an 8 x 8 grid, or with texts."""
    generator, made, first = torch.Generator().manual_seed(3), list[Any](), 0
    for size in sizes:
        images = torch.randint(0, 256, (size, 3, 32, 32), generator=generator, dtype=torch.uint8)
        mask = torch.rand(size, 64, generator=generator) < 0.2 + 0.1 * first if masked else None
        index, labels = torch.arange(first, first + size), torch.randint(0, 3, (size,), generator=generator)
        if mask is not None:
            made.append(MaskedBatch(index, {32: images}, mask, mask.flatten().nonzero()[:, 0], labels=labels))
        elif texts is not None:
            made.append(ImageTextBatch(index, images, texts[first : first + size], torch.arange(size), labels=labels))
        else:
            made.append(LabelledBatch(index, images, labels))
        first += size
    return made


# ---- k nearest neighbours


def brute_knn(queries: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, k: int) -> float:
    """Percent right, one query and one neighbour at a time."""
    right = 0
    for query, label in zip(queries.double().tolist(), labels.tolist(), strict=True):
        scores = [math.fsum(a * b for a, b in zip(query, row, strict=True)) for row in bank.double().tolist()]
        votes: dict[int, float] = {}
        for place in sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:k]:
            vote = int(bank_labels[place])
            votes[vote] = votes.get(vote, 0.0) + math.exp(scores[place] / 0.07)
        right += max(votes, key=votes.__getitem__) == label
    return 100 * right / len(labels)


@pytest.mark.parametrize("k", [1, 5, 20, 500])
def test_knn_is_brute_force(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bank_labels, labels = torch.randint(0, 4, (60,), generator=generator), torch.randint(0, 4, (40,), generator=generator)
    centres = unit(4, 6, 9)
    bank = F.normalize(centres[bank_labels] + 0.8 * unit(60, 6, 1), dim=-1)
    queries = F.normalize(centres[labels] + 0.8 * unit(40, 6, 2), dim=-1)
    found = knn_accuracy(queries, labels, bank, bank_labels, k)
    assert found == pytest.approx(brute_knn(queries, labels, bank, bank_labels, k))
    assert 30 < found < 100


def test_knn_weighs_near_neighbours_more() -> None:
    """One near neighbour of class 1 outvotes two far ones of class 0."""
    bank = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 1.0], [1.0, 1.1]]), dim=-1)
    query = torch.tensor([[1.0, 0.0]])
    assert knn_accuracy(query, torch.tensor([1]), bank, torch.tensor([1, 0, 0]), k=3) == 100.0


# ---- retrieval and zero-shot


def tiny_clip() -> ClipStudent:
    """Random weights; 32 px."""
    torch.manual_seed(0)
    text = TextSettings(width=16, layers=1, heads=2, context_length=8)
    return ClipStudent(ClipSettings(name="convnet_nano_32", embed_dim=12, text=text)).eval()


@torch.no_grad()
def test_clip_figures_are_those_of_a_loop() -> None:
    """Zero-shot by class, with several templates; equal captions count as one text."""
    student, classes, templates = tiny_clip(), ("red ant", "bee", "cat"), ("a {}.", "the {} here", "{}")
    tokenize = student.tokenizer()
    captions = ["one", "two", "one", "three", "four", "two", "five", "six", "seven"]
    val = batches(texts=tokenize(captions))
    found = ClipEvaluator(val, tokenize=tokenize, classes=classes, templates=templates, device=CPU)(student, nullcontext)

    image = torch.cat([student.encode_image(batch.images) for batch in val])
    weights = []
    for name in classes:
        prompts = [F.normalize(student.model.encode_text(tokenize([t.replace("{}", name)])), dim=-1)[0] for t in templates]
        mean = sum(prompts[1:], prompts[0]) / len(prompts)
        weights.append(mean / mean.norm())
    labels = torch.cat([batch.labels for batch in val if batch.labels is not None])
    right = sum(
        max(range(3), key=lambda k: float(row @ weights[k])) == int(label) for row, label in zip(image, labels, strict=True)
    )
    assert found["zeroshot_top1"] == pytest.approx(100 * right / 9)

    scores = image @ torch.cat([F.normalize(student.model.encode_text(tokenize([c])), dim=-1) for c in dict.fromkeys(captions)]).T
    distinct = list(dict.fromkeys(captions))
    pairs = {(row, distinct.index(caption)) for row, caption in enumerate(captions)}
    assert_recalls(found, scores, pairs)
    assert image.norm(dim=1).sub(1).abs().max() < 1e-5


def assert_recalls(found: dict[str, float], scores: torch.Tensor, pairs: set[tuple[int, int]]) -> None:
    """Those that can be below 100 are a loop's, the others are left out."""
    expected = {}
    for name, matrix, both in (("image_to_text", scores, pairs), ("text_to_image", scores.T, {(t, i) for i, t in pairs})):
        expected |= {f"{name}_r{k}": loop_recall(matrix, both, k) for k in (1, 5, 10) if k < matrix.shape[1]}
    assert {name: value for name, value in found.items() if "_to_" in name} == pytest.approx(expected)


@torch.no_grad()
def test_all_captions_of_an_image_count_whatever_the_order_of_the_images() -> None:
    """Images come out of order, as from several ranks, each with another number of captions, some of them shared."""
    student = tiny_clip()
    tokenize = student.tokenizer()
    generator = torch.Generator().manual_seed(5)
    said = {4: ["a", "b"], 0: ["c"], 3: ["d", "a", "e"], 1: ["f"], 2: ["g", "g", "h"]}
    pixels = {index: torch.randint(0, 256, (3, 32, 32), generator=generator, dtype=torch.uint8) for index in said}
    val = [
        ImageTextBatch(
            index=torch.tensor(part),
            images=torch.stack([pixels[index] for index in part]),
            texts=tokenize([text for index in part for text in said[index]]),
            text_owner=torch.tensor([row for row, index in enumerate(part) for _ in said[index]]),
        )
        for part in ([4, 0], [3, 1, 2])
    ]
    found = ClipEvaluator(val, tokenize=tokenize, classes=None, templates=("{}",), device=CPU)(student, nullcontext)
    image = student.encode_image(torch.stack([pixels[index] for index in range(5)]))
    scores = image @ student.encode_text(tokenize(list("abcdefgh"))).T
    pairs = {(index, "abcdefgh".index(text)) for index, texts in said.items() for text in texts}
    assert_recalls(found, scores, pairs)


class Codes:
    """Stands for a CLIP student: a text's features are its first two tokens, an image's its first two pixels."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def encode_text(self, texts: Tensor) -> Tensor:
        self.sizes.append(len(texts))
        return F.normalize(texts[:, :2].float(), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(images.flatten(1)[:, :2].float(), dim=-1)


def test_openai_templates_make_eighty_prompts_a_class_in_bounded_chunks() -> None:
    """Seven classes: 560 prompts, never more than 256 at once. The features are the mean over open_clip's own templates."""
    seen: list[str] = []

    def tokenize(texts: list[str]) -> Tensor:
        seen.extend(texts)
        return torch.tensor([[len(text), sum(map(ord, text)) % 97] for text in texts])

    classes = [f"thing {number}" * (number + 1) for number in range(7)]
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    labels = torch.tensor([0, 3, 6])
    batch = ImageTextBatch(torch.arange(3), images, torch.arange(1, 7).view(3, 2), torch.arange(3), labels=labels)
    student = Codes()
    found = ClipEvaluator([batch], tokenize=tokenize, classes=classes, templates="openai", device=CPU)(student, nullcontext)
    expected = [make(name) for name in classes for make in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert seen == expected
    assert len(expected) == 560
    assert max(student.sizes) <= 256
    weights = []
    for name in classes:
        rows = [F.normalize(tokenize([make(name)])[0].float(), dim=0) for make in open_clip.OPENAI_IMAGENET_TEMPLATES]
        weights.append(F.normalize(torch.stack(rows).mean(0), dim=0))
    scores = student.encode_image(images) @ torch.stack(weights).T
    ranks = [int((row > row[label]).sum()) for row, label in zip(scores, labels, strict=True)]
    assert found["zeroshot_top1"] == pytest.approx(100 * sum(r < 1 for r in ranks) / 3)
    assert found["zeroshot_top5"] == pytest.approx(100 * sum(r < 5 for r in ranks) / 3)


@pytest.mark.parametrize(("world", "groups"), [(1, 3), (2, 5), (3, 4), (4, 2)])
def test_rows_shared_among_ranks_come_back_in_order(monkeypatch: pytest.MonkeyPatch, world: int, groups: int) -> None:
    """Groups of 1, 2, 3, ... members; with four ranks and two groups two ranks have nothing to do."""
    cut = [[10 * group + member for member in range(group + 1)] for group in range(groups)]
    done: list[Tensor] = []
    for rank in range(world):
        monkeypatch.setattr("eva_mim.evaluate.contrastive.world_size", lambda: world)
        monkeypatch.setattr("eva_mim.evaluate.contrastive.rank", lambda rank=rank: rank)
        sent: list[Tensor] = []

        def all_gather(rows: Tensor, sent: list[Tensor] = sent, rank: int = rank) -> Tensor:
            sent.append(rows)
            others = [value for other in range(world) for group in cut[other::world] for value in group]
            return torch.tensor(others).float().view(-1, 1)

        monkeypatch.setattr("eva_mim.evaluate.contrastive.all_gather_rows", all_gather)
        result = by_rank(cut, lambda group: torch.tensor(group).float().view(-1, 1))
        assert result[:, 0].tolist() == [value for group in cut for value in group]
        done += sent
    assert sorted(torch.cat(done)[:, 0].tolist()) == sorted(value for group in cut for value in group)  # each by one rank


def test_without_classes_there_is_no_zero_shot() -> None:
    student = tiny_clip()
    val = batches(texts=student.tokenizer()([str(number) for number in range(9)]))
    evaluator = ClipEvaluator(val, tokenize=student.tokenizer(), classes=None, templates=("{}",), device=CPU)
    with torch.no_grad():
        assert "zeroshot_top1" not in evaluator(student, nullcontext)
    assert evaluator.headline == "image_to_text_r1"


# ---- masked features


@torch.no_grad()
def test_masked_feature_figures_are_those_of_loops() -> None:
    torch.manual_seed(0)
    student = MaskedStudent(MaskedSettings(name="vit_nano_patch4_32"), 128).eval()
    teacher = build_teacher(TeacherSettings(kind="timm", name="convnet_nano_32"))
    val, bank = batches(masked=True), batches(sizes=(6, 3))
    task = MaskedFeatures(student, LiveTargets({"teacher": teacher}), {"teacher": Lesson(masked_cosine)})
    evaluator = MaskedFeatureEvaluator(task, [val], bank, labelled=True, device=CPU)
    found = evaluator(student, nullcontext)

    def loop(stripes: bool) -> tuple[list[float], list[Tensor]]:
        cosines, targets = [], []
        for batch in val:
            masked = batch.masked if not stripes else torch.tensor([[n % 2 == 0 for n in range(64)]] * batch.size)
            assert masked is not None
            prediction = iter(student(batch.views[32], masked, masked.flatten().nonzero()[:, 0]).double())
            spatial = teacher(batch.views[32]).spatial.double()
            for row in range(batch.size):
                for patch in range(64):
                    if masked[row, patch]:
                        p, t = next(prediction), spatial[row, patch]
                        cosines.append(float(p @ t / (p.norm() * t.norm())))
                        targets.append(t / t.norm())
        return cosines, targets

    cosines, targets = loop(stripes=False)
    assert found["cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found["cosine_stripes"] == pytest.approx(np.mean(loop(stripes=True)[0]), abs=1e-6)
    assert abs(found["cosine"] - found["cosine_stripes"]) > 1e-5

    stacked = torch.stack(targets)
    best = F.normalize(stacked.mean(0), dim=0)
    assert found["cosine_of_mean"] == pytest.approx(float((stacked @ best).mean()), abs=1e-6)
    rivals = F.normalize(best + 0.1 * torch.randn(200, 128, dtype=torch.float64), dim=-1)
    assert (stacked @ rivals.T).mean(0).max() < found["cosine_of_mean"]

    seen = [batch.views[32] for batch in val], [batch.images for batch in bank]
    features = [F.normalize(torch.cat([student.summary(images) for images in side]), dim=-1) for side in seen]
    labels = [torch.cat([b.labels for b in side if b.labels is not None]) for side in (val, bank)]
    assert found["knn_top1"] == pytest.approx(brute_knn(features[0], labels[0], features[1], labels[1], 20))
    assert found["ridge_top1"] == pytest.approx(ridge_accuracy(features[0], labels[0], features[1], labels[1]))
    tokens = [F.normalize(torch.cat([student.tokens(images)[:, 0] for images in side]), dim=-1) for side in seen]
    assert found["knn_class_top1"] == pytest.approx(brute_knn(tokens[0], labels[0], tokens[1], labels[1], 20))
    spread = np.mean([np.std(features[0][:, d].double().numpy(), ddof=1) for d in range(96)]) * math.sqrt(96)
    assert found["feature_std"] == pytest.approx(spread, abs=1e-6)
    assert evaluator(student, nullcontext) == pytest.approx(found)  # the second time the constant is remembered


@torch.no_grad()
def test_without_masks_every_patch_counts() -> None:
    torch.manual_seed(0)
    student = MaskedStudent(MaskedSettings(name="vit_nano_patch4_32"), 128).eval()
    teacher = build_teacher(TeacherSettings(kind="timm", name="convnet_nano_32"))
    images = [batch.images for batch in batches()]
    val = [MaskedBatch(torch.arange(len(pixels)), {32: pixels}) for pixels in images]
    task = MaskedFeatures(student, LiveTargets({"teacher": teacher}), {"teacher": Lesson(masked_cosine)})
    found = MaskedFeatureEvaluator(task, [val], [], labelled=False, device=CPU)(student, nullcontext)
    said = torch.cat([student(pixels, None, torch.arange(len(pixels) * 64)) for pixels in images])
    wanted = torch.cat([teacher(pixels).spatial.flatten(0, 1) for pixels in images])
    expected = F.cosine_similarity(said.double(), wanted.double(), dim=-1).mean()
    assert found["cosine"] == pytest.approx(float(expected), abs=1e-6)
    assert "cosine_stripes" not in found


def test_feature_std_is_one_on_the_sphere_and_zero_when_collapsed(capsys: pytest.CaptureFixture[str]) -> None:
    """The claim of the docstring, on features that a student could have."""

    class Constant(nn.Module):
        """Says the same whatever it sees, or something unrelated to everything."""

        def __init__(self, spread: bool):
            super().__init__()
            self.spread, self.any_mask = spread, True

        def forward(self, images: Tensor, masked: Tensor, target_index: Tensor) -> Tensor:
            return torch.ones(len(target_index), 128)

        def features(self, images: Tensor) -> tuple[Tensor, None]:
            return torch.randn(len(images), 64) if self.spread else torch.ones(len(images), 64), None

    torch.manual_seed(0)
    teacher = build_teacher(TeacherSettings(kind="timm", name="convnet_nano_32"))
    student = MaskedStudent(MaskedSettings(name="vit_nano_patch4_32"), 128)
    task = MaskedFeatures(student, LiveTargets({"teacher": teacher}), {"teacher": Lesson(masked_cosine)})
    val = batches(masked=True, sizes=(60, 60))
    evaluator = MaskedFeatureEvaluator(task, [val], [], labelled=False, device=CPU)
    assert evaluator(Constant(True), nullcontext)["feature_std"] == pytest.approx(1.0, abs=0.02)
    assert "collapsed" not in capsys.readouterr().err
    assert evaluator(Constant(False), nullcontext)["feature_std"] == pytest.approx(0.0, abs=1e-6)
    assert "alarm: the features have collapsed" in capsys.readouterr().err


# ---- classifiers


def test_accuracies_and_loss_are_those_of_a_loop() -> None:
    """Batches of different sizes weigh by their samples."""
    torch.manual_seed(0)
    val = batches(sizes=(7, 2))
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 9))

    class Floats(nn.Module):
        """Pixels as floats."""

        def forward(self, images: Tensor) -> Tensor:
            return model(images.float() / 40)

    with torch.no_grad():
        found = ClassifierEvaluator(val, CPU)(Floats(), nullcontext)
        top1 = top5 = loss = 0.0
        for batch in val:
            assert batch.labels is not None
            for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
                scores = model(image[None].float() / 40)[0].double().tolist()
                better = sum(score > scores[label] for score in scores)
                top1, top5 = top1 + (better == 0), top5 + (better < 5)
                loss += math.log(math.fsum(math.exp(score) for score in scores)) - scores[label]
    assert found == pytest.approx({"top1": 100 * top1 / 9, "top5": 100 * top5 / 9, "loss": loss / 9}, abs=1e-5)
