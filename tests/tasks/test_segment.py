"""The loss of segmentation against loops: resized scores, ignored pixels, micro-batches of any cut, and maps without a class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.batches import SegmentedBatch
from eva_mim.engine.step import loss_shares
from eva_mim.students.segmenter import AUXILIARY, MAIN
from eva_mim.tasks.segment import Segmentation


class Scores(nn.Module):
    """A student without batch norms: a convolution, and a second one as auxiliary head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.main, self.second = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(3, 4, 8, 8)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pixels = images.float() / 255
        return {MAIN: self.main(pixels), AUXILIARY: self.second(pixels)}


def batch(count: int, first: int = 0) -> SegmentedBatch:
    random = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=random)
    maps = torch.randint(-1, 4, (8, 16, 16), generator=random).short()
    maps[1] = -1  # an image of which nobody knows anything
    maps[3, 4:] = -1
    chosen = slice(first, first + count)
    return SegmentedBatch(torch.arange(8)[chosen], images[chosen], maps[chosen])


def total(task: Segmentation, batches: list[SegmentedBatch]) -> Tensor:
    """The loss of a step as the engines weigh it."""
    shares = loss_shares(task, batches)
    sums = [sum(term.mean * term.weight * share[name] for name, term in task.loss(task.student, one).terms.items())
            for one, share in zip(batches, shares, strict=True)]
    return torch.stack(sums).sum() / len(batches)  # type: ignore[arg-type]


def test_the_loss_against_a_loop() -> None:
    student = Scores()
    whole, task = batch(8), Segmentation(student, 0.4)
    found = task.loss(student, whole)
    wanted = {}
    for name, scores in student(whole.images).items():
        sized = F.interpolate(scores, (16, 16), mode="bilinear")
        pixels = [-sized[i, :, y, x].log_softmax(0)[whole.segmentation[i, y, x]] for i in range(8) for y in range(16)
                  for x in range(16) if whole.segmentation[i, y, x] >= 0]
        wanted[name] = torch.stack(pixels).mean()
        torch.testing.assert_close(found.terms[name].mean, wanted[name])
    torch.testing.assert_close(found.loss, wanted[MAIN] + 0.4 * wanted[AUXILIARY])
    said = F.interpolate(student(whole.images)[MAIN], (16, 16), mode="bilinear").argmax(1)
    known = whole.segmentation >= 0
    right = 100 * (said == whole.segmentation)[known].float().mean()
    torch.testing.assert_close(found.terms[MAIN].metrics["pixel_accuracy"], right)
    assert int(task.counts(whole)[MAIN]) == int(known.sum())
    assert Segmentation(student, 0.0).loss(student, whole).terms.keys() == {MAIN}


@pytest.mark.parametrize("cut", [(4, 4), (2, 2, 2, 2), (1, 1, 1, 1, 1, 1, 1, 1)])
def test_micro_batches_give_the_gradient_of_the_whole(cut: tuple[int, ...]) -> None:
    """Although their maps have different numbers of labelled pixels, and one has none."""
    gradients = []
    for pieces in ((8,), cut):
        student = Scores()
        starts = [sum(pieces[:number]) for number in range(len(pieces))]
        total(Segmentation(student, 0.4), [batch(count, first) for count, first in zip(pieces, starts, strict=True)]).backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one)


def test_maps_without_any_class() -> None:
    student: Any = Scores()
    task: Any = Segmentation(student, 0.4)
    found = task.loss(student, batch(1, 1))
    assert float(found.loss.detach()) == 0
    found.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())
    assert task.counts(batch(1, 1)) == {MAIN: 0, AUXILIARY: 0}
