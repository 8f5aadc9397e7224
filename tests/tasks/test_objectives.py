"""Objectives against a float64 loop and against torch's plain formulas."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from eva_mim.core.errors import UserError
from eva_mim.tasks.contrastive import Contrastive
from eva_mim.tasks.grids import check_grids
from eva_mim.tasks.objectives import (
    Objective,
    SummaryAngle,
    cosine_smooth_l1,
    masked_cosine,
    masked_mse,
    mean_of,
    squared_angle,
    summary_cosine,
)


def loop_cosine(prediction: Tensor, target: Tensor) -> tuple[float, Tensor]:
    """Minus the mean cosine and its gradient, number by number in float64: d cos / dp = (t/|t| - cos p/|p|) / |p|."""
    total, gradient = 0.0, torch.zeros(prediction.shape, dtype=torch.float64)
    for row, (p, t) in enumerate(zip(prediction.double().tolist(), target.double().tolist(), strict=True)):
        dot = math.fsum(a * b for a, b in zip(p, t, strict=True))
        length, other = math.sqrt(math.fsum(a * a for a in p)), math.sqrt(math.fsum(b * b for b in t))
        cosine = dot / (length * other) if length and other else 0.0
        total += cosine
        if length and other:
            for column, (a, b) in enumerate(zip(p, t, strict=True)):
                gradient[row, column] = -(b / other - cosine * a / length) / length / len(prediction)
    return -total / len(prediction), gradient


class Grids(NamedTuple):
    """What a teacher says of its patches."""

    grid: tuple[int, int]
    image_size: int

    def seen(self, grid: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        return self.image_size, self.grid


@pytest.mark.parametrize(("mine", "size", "theirs"), [((6, 6), 24, Grids((4, 4), 16)), ((16, 16), 224, Grids((16, 18), 224))])
def test_other_grids_are_refused_with_sizes_that_fit(mine: tuple[int, int], size: int, theirs: Grids) -> None:
    check_grids(theirs.grid, size, theirs)  # type: ignore[arg-type]
    with pytest.raises(UserError) as refused:
        check_grids(mine, size, theirs, "teachers.clip")  # type: ignore[arg-type]
    said = str(refused.value)
    named = f"student grid {mine[0]}x{mine[1]} ({size} px) does not match teachers.clip grid {theirs.grid[0]}x{theirs.grid[1]}"
    assert named in said
    student = int(said.partition("student.image_size=")[2].partition(",")[0])
    teacher = int(said.partition("teachers.clip.image_size=")[2].split()[0])
    assert student / (size / mine[0]) == theirs.grid[0]  # the patches keep their size in pixels
    assert teacher / (theirs.image_size / theirs.grid[0]) == mine[0]


def rows(count: int, width: int, seed: int, norm: float = 1.0) -> Tensor:
    """Random rows of one norm."""
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=1, keepdim=True) * norm


def test_value_and_gradient_are_the_loops() -> None:
    target = torch.randn(9, 7, generator=torch.Generator().manual_seed(1)) * 3
    prediction = (target + torch.randn(9, 7, generator=torch.Generator().manual_seed(2)) * 4).requires_grad_()
    output = masked_cosine(prediction, target)
    output.mean.backward()
    loss, gradient = loop_cosine(prediction.detach(), target)
    assert output.mean.item() == pytest.approx(loss, abs=1e-7)
    assert output.metrics["cosine"].mean().item() == pytest.approx(-loss, abs=1e-7)
    assert not output.metrics["cosine"].requires_grad
    assert prediction.grad is not None
    assert (prediction.grad.double() - gradient).abs().max() < 1e-6 * gradient.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [1e-8, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("other", [1e-8, 1e4])
def test_it_is_right_at_extreme_norms(dtype: torch.dtype, norm: float, other: float) -> None:
    """The loop is given the rounded numbers, so only the computation is judged. fp16 rounds 1e-8 to zeros: cosine 0."""
    target = (rows(6, 64, 1, other)).to(dtype)
    prediction = (rows(6, 64, 1, norm) + rows(6, 64, 2, norm)).to(dtype).requires_grad_()
    output = masked_cosine(prediction, target)
    output.mean.backward()
    loss, gradient = loop_cosine(prediction.detach(), target)
    assert output.mean.dtype is torch.float32
    assert output.mean.item() == pytest.approx(loss, abs=1e-6)
    assert abs(loss) > 0.5 or dtype is torch.float16
    if dtype is not torch.float16:  # 1 / norm does not fit into fp16
        assert prediction.grad is not None
        tolerance = 1e-5 if dtype is torch.float32 else 1e-2
        assert (prediction.grad.double() - gradient).abs().max() < tolerance * gradient.abs().max()


def test_a_zero_row_gives_no_nan() -> None:
    target, prediction = rows(3, 5, 1), torch.zeros(3, 5, requires_grad=True)
    output = masked_cosine(prediction, target)
    output.mean.backward()
    assert output.mean.item() == 0.0
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


def test_it_is_fp32_inside_autocast() -> None:
    target = rows(8, 16, 3)
    prediction = rows(8, 16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = masked_cosine(prediction, target).mean
    assert inside.item() == pytest.approx(loop_cosine(prediction, target)[0], abs=1e-7)


def test_contrastive_is_the_plain_formula() -> None:
    """Mean of both cross entropies of scale * image @ text.T against the diagonal; values and all gradients."""
    image, text, scale = rows(6, 10, 1), rows(6, 10, 2), torch.tensor(14.0)
    mine = [tensor.clone().requires_grad_() for tensor in (image, text, scale)]
    output = Contrastive()(*mine)
    output.loss.backward()
    plain = [tensor.double().requires_grad_() for tensor in (image, text, scale)]
    logits = plain[2] * plain[0] @ plain[1].T
    there = -torch.stack([logits[i, i] - torch.logsumexp(logits[i], 0) for i in range(6)]).mean()
    back = -torch.stack([logits[i, i] - torch.logsumexp(logits[:, i], 0) for i in range(6)]).mean()
    ((there + back) / 2).backward()
    assert output.loss.item() == pytest.approx(((there + back) / 2).item(), abs=1e-6)
    assert output.metrics["logit_scale"].item() == 14.0
    for one, other in zip(mine, plain, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad - other.grad).abs().max() < 1e-5 * other.grad.abs().max()


def test_contrastive_is_fp32_for_bf16_features() -> None:
    image, text = rows(6, 10, 1).bfloat16(), rows(6, 10, 2).bfloat16()
    scale = torch.tensor(100.0)
    logits = 100 * image.double() @ text.double().T
    labels = torch.arange(6)
    expected = sum(torch.nn.functional.cross_entropy(side, labels) for side in (logits, logits.T)) / 2
    assert Contrastive()(image, text, scale).loss.item() == pytest.approx(float(expected), abs=1e-4)


def loop_cosines(prediction: Tensor, target: Tensor) -> list[float]:
    """Cosine of each row, number by number in float64."""
    found = []
    for p, t in zip(prediction.double().tolist(), target.double().tolist(), strict=True):
        lengths = math.sqrt(math.fsum(a * a for a in p)) * math.sqrt(math.fsum(b * b for b in t))
        found.append(math.fsum(a * b for a, b in zip(p, t, strict=True)) / lengths)
    return found


def test_cosine_with_smooth_l1_is_the_loop() -> None:
    target, prediction = 2 * rows(5, 6, 1), rows(5, 6, 2, 3.0)
    errors = [abs(a - b) for p, t in zip(prediction.double().tolist(), target.double().tolist(), strict=True)
              for a, b in zip(p, t, strict=True)]
    smooth = [error * error / 2 if error < 1 else error - 0.5 for error in errors]
    assert min(errors) < 1 < max(errors)
    cosines = loop_cosines(prediction, target)
    wanted = 0.9 * (1 - math.fsum(cosines) / 5) + 0.1 * math.fsum(smooth) / 30
    output = cosine_smooth_l1(prediction, target)
    assert output.mean.item() == pytest.approx(wanted, abs=1e-6)
    assert summary_cosine(prediction, target).loss.tolist() == pytest.approx([1 - cosine for cosine in cosines], abs=1e-6)
    assert summary_cosine(prediction, target).metrics["summary_cosine"].tolist() == pytest.approx(cosines, abs=1e-6)


def test_the_angle_is_squared_and_divided_by_the_dispersion() -> None:
    summaries, prediction = rows(40, 5, 1) + torch.tensor([1.0, 0, 0, 0, 0]), rows(40, 5, 2)
    loss = SummaryAngle(5)
    for _ in range(2):  # the second time there is a mean direction
        for part in summaries.chunk(4):
            loss.add(part)
        loss.gather()
    units = [[a / math.sqrt(math.fsum(b * b for b in row)) for a in row] for row in summaries.double().tolist()]
    direction = torch.tensor([[math.fsum(column) for column in zip(*units, strict=True)]])
    dispersion = math.fsum(math.acos(c) ** 2 for c in loop_cosines(summaries, direction.expand(40, -1))) / 40
    assert loss.dispersion().item() == pytest.approx(dispersion, rel=1e-6)
    angles = math.fsum(math.acos(c) ** 2 for c in loop_cosines(prediction, summaries)) / 40
    assert loss(prediction, summaries).mean.item() == pytest.approx(angles / dispersion, rel=1e-5)


@pytest.mark.parametrize("apart", [0.0, 1e-12, 1e-6, 9.99e-4, 1.001e-3, 0.3, 1.0, 1.99])
def test_the_squared_angle_is_right_near_nothing_and_far_away(apart: float) -> None:
    value = torch.tensor(apart, dtype=torch.float64, requires_grad=True)
    squared_angle(value).backward()
    cosine = 1 - apart
    assert squared_angle(value).item() == pytest.approx(math.acos(cosine) ** 2, rel=1e-9, abs=1e-15)
    slope = 2 * math.acos(cosine) / math.sqrt(1 - cosine * cosine) if apart > 1e-9 else 2.0
    assert value.grad is not None
    assert value.grad.item() == pytest.approx(slope, rel=1e-6)


def test_a_dispersion_is_fixed_after_enough_summaries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eva_mim.tasks.objectives.SAMPLES", 30)
    loss = SummaryAngle(4)
    for seed in range(6):
        loss.add(rows(10, 4, seed))
        loss.gather()
    assert loss.state["angles"][0] == 30
    before = loss.dispersion()
    loss.add(torch.full((10, 4), float("nan")))
    loss.add(rows(10, 4, 9))
    loss.gather()
    assert torch.equal(loss.dispersion(), before)


@pytest.mark.parametrize("loss", [masked_cosine, masked_mse, cosine_smooth_l1, summary_cosine, SummaryAngle(7)])
def test_no_rows_give_0_with_a_gradient(loss: Objective) -> None:
    """A process without a teacher's images adds nothing, and its step is still the step of all."""
    prediction = torch.zeros(0, 7, requires_grad=True)
    output = loss(prediction, torch.zeros(0, 7))
    output.mean.backward()
    assert output.mean.item() == 0
    assert all(mean_of(value).item() == 0 for value in output.metrics.values())
