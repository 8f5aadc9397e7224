"""LAMB against a loop over numbers, against timm's class, and where steps are left out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from eva_mim.core.batches import FeatureBatch
from eva_mim.core.contracts import Rates
from eva_mim.core.errors import UserError
from eva_mim.core.losses import LossTerm, StepOutput
from eva_mim.engine import RunSettings
from eva_mim.engine.deepspeed import DeepSpeedEngine
from eva_mim.engine.local import LocalEngine
from eva_mim.engine.loss_scale import LossScale
from eva_mim.engine.step import clip_and_step, set_rates
from eva_mim.optim import LambSettings, OptimSettings
from eva_mim.optim.optimizers import SkippableLamb, SkippableOptimizer, build_optimizer
from eva_mim.run import checkpoints as snapshot
from tests.tiny import save

LR, DECAY, BETAS, EPS = 0.03, 0.1, (0.9, 0.999), 1e-6
CPU = torch.device("cpu")
SIZES = [(1e-4, (4, 3)), (1.0, (5, 7)), (300.0, (3, 3)), (1.0, (6,)), (0.0, (5,))]
"""Trust ratios below, within and above their limits; a tensor of zeros."""


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for scale, shape in SIZES]


def optimizer(weights: list[Tensor], **lamb: Any) -> SkippableOptimizer:
    """Matrices decay, vectors have half the rate."""
    settings = OptimSettings(lr=LR, optimizer="lamb", lamb=LambSettings(**lamb), betas=BETAS, eps=EPS)
    groups = [
        {"params": weights[:3], "weight_decay": DECAY, "lr_scale": 1.0, "decays": 1.0},
        {"params": weights[3:], "weight_decay": 0.0, "lr_scale": 0.5, "decays": 0.0},
    ]
    made = build_optimizer(groups, settings)
    set_rates(made.param_groups, Rates(LR, DECAY))
    return made


def trained(weights: list[Tensor]) -> list[Tensor]:
    return [weight.clone().requires_grad_() for weight in weights]


class Loop:
    """LAMB of one tensor, number by number, in double precision."""

    def __init__(self, weight: Tensor, lr: float, decay: float, limits: tuple[float, float], adapts: bool):
        self.w = [float(x) for x in weight.flatten()]
        self.m, self.v = [0.0] * len(self.w), [0.0] * len(self.w)
        self.lr, self.decay, self.limits, self.adapts, self.count = lr, decay, limits, adapts, 0

    def step(self, gradient: Tensor) -> tuple[float, float]:
        """Squared norms of the update and of what it moved."""
        self.count += 1
        update = []
        for i, g in enumerate(float(x) for x in gradient.flatten()):
            self.m[i] = BETAS[0] * self.m[i] + (1 - BETAS[0]) * g
            self.v[i] = BETAS[1] * self.v[i] + (1 - BETAS[1]) * g * g
            first, second = self.m[i] / (1 - BETAS[0] ** self.count), self.v[i] / (1 - BETAS[1] ** self.count)
            update.append(first / (math.sqrt(second) + EPS) + self.decay * self.w[i])
        size, length = math.hypot(*self.w), math.hypot(*update)
        ratio = min(max(size / length, self.limits[0]), self.limits[1]) if self.adapts and size and length else 1.0
        self.w = [w - self.lr * ratio * u for w, u in zip(self.w, update, strict=True)]
        return (self.lr * ratio * length) ** 2, size**2


@pytest.mark.parametrize("adapt", ["all", "decayed"])
def test_it_is_the_loop_with_steps_left_out_and_a_loss_scale(adapt: str) -> None:
    start = tensors(0)
    weights = trained(start)
    ours = optimizer(weights, adapt=adapt)
    loops = [Loop(w, LR if i < 3 else LR / 2, DECAY if i < 3 else 0.0, (0.01, 10.0), adapt == "all" or i < 3)
             for i, w in enumerate(start)]  # fmt: skip
    ours.grad_scale, ours.measure_update = torch.tensor(8.0), True
    for step in range(7):
        bad = step in (0, 3)
        gradients = tensors(step + 1)
        for weight, gradient in zip(weights, gradients, strict=True):
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
        moved, sizes = zip(*(loop.step(g) for loop, g in zip(loops, gradients, strict=True)), strict=True)
        assert float(ratio) == pytest.approx(math.sqrt(sum(moved) / sum(sizes)), rel=1e-5)
        for weight, loop in zip(weights, loops, strict=True):
            assert weight.detach().flatten().tolist() == pytest.approx(loop.w, rel=2e-5, abs=1e-8), step
    assert {float(state["step"]) for state in ours.state.values()} == {5.0}


def test_without_limits_it_is_timms() -> None:
    """timm leaves the length of steps alone where there is no weight decay."""
    weights, theirs = trained(tensors(0)), trained(tensors(0))
    ours = optimizer(weights, trust=None, adapt="decayed")
    timms = timm.optim.Lamb(
        [{"params": theirs[:3], "weight_decay": DECAY, "lr": LR}, {"params": theirs[3:], "weight_decay": 0.0, "lr": LR / 2}],
        betas=BETAS, eps=EPS, max_grad_norm=None,
    )  # fmt: skip
    for step in range(6):
        for side in (weights, theirs):
            for weight, gradient in zip(side, tensors(step + 1), strict=True):
                weight.grad = gradient
        ours.step()
        timms.step()
        for weight, other in zip(weights, theirs, strict=True):
            torch.testing.assert_close(weight, other, rtol=2e-6, atol=1e-7)


def test_a_gradient_that_is_not_finite_changes_nothing_that_follows() -> None:
    """Clipping, loss scale and skip together: the run with a NaN in between ends where the one without it ends."""
    scale = LossScale("fp16", CPU)
    ends = []
    for bad in ({1, 4}, set[int]()):
        weights = trained(tensors(0))
        ours, good = optimizer(weights), 0
        for step in range(6 if bad else 4):
            for weight, gradient in zip(weights, tensors(good + 1), strict=True):
                weight.grad = gradient * (float("nan") if step in bad else 1.0) * scale.value
            norm = clip_and_step(ours, weights, 1.0, scale)
            assert bool(norm.isfinite()) == (step not in bad)
            good += step not in bad
        ends.append((weights, [ours.state[weight] for weight in weights]))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        assert a.keys() == b.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_no_step_asks_the_host() -> None:
    """A fake tensor has no value to ask for."""
    with FakeTensorMode():
        weight = torch.zeros(3, 4, requires_grad=True)
        weight.grad = torch.zeros(3, 4)
        groups = [{"params": [weight], "weight_decay": 0.1, "lr_scale": 1.0, "decays": 1.0}]
        ours = SkippableLamb(groups, LambSettings(), lr=LR, betas=BETAS, eps=EPS)
        ours.measure_update = True
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            float(weight.detach().norm())
        clip_and_step(ours, [weight], 1.0, LossScale("fp16", CPU))
        assert ours.update_ratio(CPU, sharded=False) is not None


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x)


class Squares:
    """The smallest task."""

    def __init__(self, student: nn.Module):
        self.student = student

    def prepare(self, student: Any, batches: list[FeatureBatch]) -> list[FeatureBatch]:
        return batches

    def loss(self, student: Any, batch: FeatureBatch) -> StepOutput:
        return StepOutput({"loss": LossTerm(student(batch.features).square().mean())}, {})

    def counts(self, batch: FeatureBatch) -> dict[str, Tensor]:
        return {}


@pytest.mark.parametrize("stop", [0, 3])
@pytest.mark.parametrize("name", ["lamb", "lars", "adamw"])
def test_a_resumed_run_goes_on_as_if_undisturbed(tmp_path: Path, name: Literal["lamb", "lars", "adamw"], stop: int) -> None:
    """Every optimizer, also from a checkpoint before the first step."""
    run_settings = RunSettings(epochs=1, global_batch=4, precision="fp32", device="cpu")
    optim = OptimSettings(lr=LR, optimizer=name, betas=BETAS)
    generator = torch.Generator().manual_seed(0)
    batches = [FeatureBatch(torch.arange(4), torch.randn(4, 3, generator=generator), torch.zeros(4)) for _ in range(5)]

    def engine() -> LocalEngine:
        torch.manual_seed(1)
        return LocalEngine(Line(), run_settings, optim, CPU)

    def train(made: LocalEngine, steps: range) -> None:
        for step in steps:
            made.step(Squares(made.module), [batches[step]], Rates(LR, DECAY))

    whole, first, second = engine(), engine(), engine()
    train(whole, range(5))
    train(first, range(stop))
    folder = save(tmp_path, stop, first.state(), {}, keep_last=1)
    train(second, range(1))  # what it did before does not matter
    snapshot.load(folder, second.state())
    train(second, range(stop, 5))
    for weight, value in whole.weights().items():
        assert torch.equal(second.weights()[weight], value), weight
        assert not torch.equal(first.weights()[weight], value), weight


def test_deepspeed_refuses_to_shard_it() -> None:
    run_settings = RunSettings(epochs=1, global_batch=4, engine="deepspeed", zero_stage=1)
    with pytest.raises(UserError, match=r"run\.zero_stage=1 cuts up"):
        DeepSpeedEngine(Line(), run_settings, OptimSettings(lr=LR, optimizer="lamb"), CPU)
