"""LARS against a loop over numbers, against timm's class, and where steps are left out."""

from __future__ import annotations

import math

import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from eva_mim.core.contracts import Rates
from eva_mim.core.errors import UserError
from eva_mim.engine import RunSettings
from eva_mim.engine.deepspeed import DeepSpeedEngine
from eva_mim.engine.loss_scale import LossScale
from eva_mim.engine.step import clip_and_step, set_rates
from eva_mim.optim import LarsSettings, OptimSettings
from eva_mim.optim.groups import parameter_groups
from eva_mim.optim.optimizers import SkippableLars, SkippableOptimizer, build_optimizer

LR, MOMENTUM, TRUST = 0.3, 0.9, 0.02
CPU = torch.device("cpu")
SIZES = [(1.0, (4, 3)), (300.0, (5, 7)), (0.0, (3, 3)), (1.0, (6,)), (0.0, (5,))]
"""Matrices of other lengths, one of zeros; vectors."""


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for scale, shape in SIZES]


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(shape, generator=generator) for _, shape in SIZES]


def optimizer(weights: list[Tensor], decay: float) -> SkippableOptimizer:
    """Matrices decay, vectors have half the rate."""
    settings = OptimSettings(lr=LR, optimizer="lars", lars=LarsSettings(momentum=MOMENTUM, trust=TRUST))
    groups = [
        {"params": weights[:3], "weight_decay": decay, "lr_scale": 1.0, "decays": 1.0},
        {"params": weights[3:], "weight_decay": 0.0, "lr_scale": 0.5, "decays": 0.0},
    ]
    made = build_optimizer(groups, settings)
    set_rates(made.param_groups, Rates(LR, decay))
    return made


def trained(weights: list[Tensor]) -> list[Tensor]:
    return [weight.clone().requires_grad_() for weight in weights]


class Loop:
    """One tensor, number by number, in double precision."""

    def __init__(self, weight: Tensor, lr: float, decay: float):
        self.w, self.lr, self.decay, self.matrix = [float(x) for x in weight.flatten()], lr, decay, weight.ndim > 1
        self.m = [0.0] * len(self.w)

    def step(self, gradient: Tensor) -> tuple[float, float]:
        """Squared norms of the update and of what it moved."""
        update = [float(g) + self.decay * w for g, w in zip(gradient.flatten(), self.w, strict=True)]
        size, length = math.hypot(*self.w), math.hypot(*update)
        ratio = TRUST * size / length if self.matrix and size and length else 1.0
        self.m = [MOMENTUM * m + ratio * u for m, u in zip(self.m, update, strict=True)]
        self.w = [w - self.lr * m for w, m in zip(self.w, self.m, strict=True)]
        return sum((self.lr * m) ** 2 for m in self.m), size**2


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_the_loop_with_steps_left_out_and_a_loss_scale(decay: float) -> None:
    start = tensors(0)
    weights = trained(start)
    ours = optimizer(weights, decay)
    loops = [Loop(w, LR if i < 3 else LR / 2, decay if i < 3 else 0.0) for i, w in enumerate(start)]
    ours.grad_scale, ours.measure_update = torch.tensor(8.0), True
    for step in range(8):
        bad = step in (0, 3)
        given = gradients(step)
        for weight, gradient in zip(weights, given, strict=True):
            weight.grad = 8 * gradient
        if bad:
            weights[1].grad = torch.full_like(weights[1], float("nan"))
        before = [weight.detach().clone() for weight in weights]
        ours.found_inf = torch.tensor(float(bad))
        ours.step()
        ratio = ours.update_ratio(CPU, sharded=False)
        assert ratio is not None
        if bad:
            assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
            assert ratio == 0
            continue
        moved, sizes = zip(*(loop.step(g) for loop, g in zip(loops, given, strict=True)), strict=True)
        assert float(ratio) == pytest.approx(math.sqrt(sum(moved) / sum(sizes)), rel=1e-5)
        for weight, loop in zip(weights, loops, strict=True):
            assert weight.detach().flatten().tolist() == pytest.approx(loop.w, rel=2e-6, abs=1e-6), step


def test_it_is_timms_without_weight_decay() -> None:
    """timm adapts tensors that decay, or all; and adds 1e-8 to what is divided by, 4e-9 of the norms here."""
    weights, theirs = trained(tensors(0)), trained(tensors(0))
    ours = optimizer(weights, 0.0)
    timms = timm.optim.Lars(
        [{"params": theirs[:3], "lr": LR, "always_adapt": True}, {"params": theirs[3:], "lr": LR / 2, "always_adapt": False}],
        momentum=MOMENTUM, trust_coeff=TRUST, weight_decay=0.0,
    )  # fmt: skip
    for step in range(12):
        for side in (weights, theirs):
            for weight, gradient in zip(side, gradients(step), strict=True):
                weight.grad = gradient.clone()
        ours.step()
        timms.step()
        for weight, other in zip(weights, theirs, strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-6)
    assert all((weight - start).norm() > 0.1 for weight, start in zip(weights, tensors(0), strict=True))


def test_a_gradient_that_is_not_finite_changes_nothing_that_follows() -> None:
    """Clipping, loss scale and skip together: the run with a NaN in between ends where the one without it ends."""
    scale = LossScale("fp16", CPU)
    ends = []
    for bad in ({0, 4}, set[int]()):
        weights = trained(tensors(0))
        ours, good = optimizer(weights, 0.1), 0
        for step in range(6 if bad else 4):
            for weight, gradient in zip(weights, gradients(good), strict=True):
                weight.grad = gradient * (float("nan") if step in bad else 1.0) * scale.value
            clip_and_step(ours, weights, 1.0, scale)
            good += step not in bad
        ends.append((weights, [ours.state[weight]["momentum_buffer"] for weight in weights]))
    for first, second in zip(*ends, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_step_asks_the_host() -> None:
    with FakeTensorMode():
        weight = torch.zeros(3, 4, requires_grad=True)
        weight.grad = torch.zeros(3, 4)
        ours = SkippableLars([{"params": [weight], "weight_decay": 0.1, "lr_scale": 1.0, "decays": 1.0}], LarsSettings(), LR)
        ours.measure_update = True
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            float(weight.detach().norm())
        clip_and_step(ours, [weight], 1.0, LossScale("fp16", CPU))
        assert ours.update_ratio(CPU, sharded=False) is not None


class ProbeTask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 2).requires_grad_(False)
        self.heads = nn.ModuleList(nn.Linear(3, 2) for _ in range(2))
        self.lr_scales = {"heads.1.weight": 0.25, "heads.1.bias": 0.25}


def test_a_student_gives_parameters_factors_of_their_own() -> None:
    student = ProbeTask()
    groups = parameter_groups(student, OptimSettings(lr=LR, optimizer="lars", weight_decay=0.0))
    found = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert found == {id(p): 0.25 if name.startswith("heads.1") else 1.0
                     for name, p in student.named_parameters() if p.requires_grad}


def test_deepspeed_refuses_to_shard_it() -> None:
    settings = RunSettings(epochs=1, global_batch=4, engine="deepspeed", zero_stage=2)
    with pytest.raises(UserError, match=r"optimizer=lars .* run\.zero_stage=2 cuts up"):
        DeepSpeedEngine(nn.Linear(3, 2), settings, OptimSettings(lr=LR, optimizer="lars"), CPU)
