"""Top-1 and top-5 counts against a loop in Python."""

from __future__ import annotations

import pytest
import torch

from eva_mim.evaluate.counts import TopCounts, hits

CPU = torch.device("cpu")


@pytest.mark.parametrize("classes", [3, 5, 9])
def test_hits_are_those_of_a_loop(classes: int) -> None:
    """With several answers, padded with -1."""
    scores = torch.randn(40, classes, generator=torch.Generator().manual_seed(0))
    answers = [[image % classes] if image % 2 else [image % classes, (image + 1) % classes] for image in range(40)]
    first, five = hits(scores, torch.tensor([[*right, -1][:2] for right in answers]))
    ranked = [sorted(range(classes), key=lambda k, row=row: -float(row[k])) for row in scores]
    assert first.tolist() == [order[0] in right for order, right in zip(ranked, answers, strict=True)]
    assert five.tolist() == [bool(set(order[:5]) & set(right)) for order, right in zip(ranked, answers, strict=True)]


def test_classifiers_side_by_side_count_as_one_by_one() -> None:
    """Over uneven batches; `figures` may be asked for again."""
    random = torch.Generator().manual_seed(1)
    scores, labels, losses = (torch.randn(11, 7, 3, generator=random), torch.randint(7, (11,), generator=random),
                              torch.rand(11, 3, generator=random))
    several = TopCounts(CPU, 3)
    for rows in torch.arange(11).split(4):
        several.add(scores[rows], labels[rows], losses[rows].sum(0))
    found = several.figures()
    assert found == several.figures()
    for number in range(3):
        one = TopCounts(CPU)
        one.add(scores[..., number], labels)
        alone = one.figures()
        assert (alone["top1"], alone["top5"], alone["loss"]) == (found["top1"][number], found["top5"][number], 0)
        best = scores[..., number].argmax(1)
        assert alone["top1"] == 100 * sum(int(a) == int(b) for a, b in zip(best, labels, strict=True)) / 11
        assert found["loss"][number] == pytest.approx(float(losses[:, number].mean()), rel=1e-6)  # sums of four in fp32
