"""Normalisers against closed forms in float64, and their matrices against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from eva_mim.core.errors import UserError
from eva_mim.students import HeadSettings
from eva_mim.students.heads import Patches, mlp, predict
from eva_mim.targets import NormaliserSettings
from eva_mim.targets.normalise import Normaliser
from eva_mim.targets.orthogonal import hadamard, spreading

WIDTHS = [192, 256, 384, 512, 588, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1664, 1792, 2048, 2560, 3072, 4096]
"""Widths of teachers: those of facts/radio_vitamin.md 1.3, and of small ones."""


def drawn(rows: int, width: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """Correlated features of very different scales, with a mean; of at most `rank` directions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or width, width, generator=generator) * torch.logspace(1.5, -1.5, width)
    return torch.randn(rows, rank or width, generator=generator) @ mixing + 20 * torch.randn(width, generator=generator)


def fitted(kind: str, features: Tensor, steps: int = 1, every: int = 100) -> Normaliser:
    made = Normaliser(NormaliserSettings(kind=kind, steps=steps, every=every), features.shape[1])
    for part in features.chunk(steps):
        made.add(part)
        made.advance()
    return made


@pytest.mark.parametrize("width", WIDTHS)
def test_hadamard_matrices_are_of_ones_and_orthogonal(width: int) -> None:
    matrix = hadamard(width)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones(width, width).double())
    few = matrix[:: max(1, width // 97)]
    assert torch.equal(few @ matrix.T, width * torch.eye(width).double()[:: max(1, width // 97)])


@pytest.mark.parametrize("width", [2, 3, 7, 49, 100, 333])
def test_other_widths_get_a_rotation_that_levels_the_variances(width: int) -> None:
    variances = torch.rand(width, generator=torch.Generator().manual_seed(width)).double() ** 6
    turn = spreading(variances)
    assert (turn @ turn.T - torch.eye(width)).abs().max() < 1e-12
    assert (turn.square() @ variances / variances.mean() - 1).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["channel", "phi_s"])
@pytest.mark.parametrize("width", [48, 33])
def test_normalised_features_have_mean_0_and_deviation_1(kind: str, width: int) -> None:
    features = drawn(4000, width)
    assert features.std(0).max() / features.std(0).min() > 100
    made = fitted(kind, features)
    normalised = made(features).double()
    assert normalised.mean(0).abs().max() < 2e-5
    assert (normalised.std(0, correction=0) - 1).abs().max() < 2e-4  # rounding of small channels beside large ones, in fp32
    assert made.deviations() == pytest.approx((1.0, 1.0), abs=1e-9)
    assert (made.inverse(made(features)) - features).abs().max() < 1e-5 * features.abs().max()


def test_phi_s_weighs_an_error_alike_in_every_direction() -> None:
    features = drawn(3000, 24)
    made = fitted("phi_s", features)
    factors = []
    for seed in range(5):
        error = torch.randn(24, generator=torch.Generator().manual_seed(seed))
        factors.append(float((made(features[:1] + error) - made(features[:1])).norm() / error.norm()))
    centred = (features - features.mean(0)).double()
    assert factors == pytest.approx([1 / math.sqrt(float(centred.square().mean()))] * 5, rel=1e-4)


def test_phi_s_is_the_formula_of_the_paper() -> None:
    features = drawn(2000, 12)
    centred = (features - features.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    matrix = hadamard(12)
    assert matrix is not None
    made = fitted("phi_s", features)
    vectors = vectors * torch.where(vectors.diagonal() < 0, -1.0, 1.0)  # the sign that the identity's columns ask for
    wanted = centred @ (matrix / math.sqrt(12) @ vectors.T / values.mean().sqrt()).T
    assert (made(features) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_whitened_channels_are_uncorrelated(kind: str) -> None:
    mixing = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(0.5, -0.5, 16)
    features = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0)) @ mixing + 3.0
    made = fitted(kind, features)
    found = made(features).double()
    assert ((found.T @ found) / len(found) - torch.eye(16)).abs().max() < 1e-4
    assert made.deviations() == pytest.approx((1.0, 1.0), abs=1e-6)
    assert (made.inverse(made(features)) - features).abs().max() < 1e-4
    centred = (features - features.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    if kind == "zca":  # the symmetric root: no sign of an eigenvector is in it
        assert (found - centred @ (vectors / values.sqrt() @ vectors.T)).abs().max() < 1e-4
    else:
        assert (found.abs() - (centred @ (vectors / values.sqrt())).abs()).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_whitening_does_not_blow_up_directions_without_variance(kind: str) -> None:
    features = drawn(500, 64, rank=5)
    made = fitted(kind, features)
    assert made(features).abs().max() < 50
    # rounding of fp32 times the largest factor, which is 1,000
    assert made.inverse(made(features)).sub(features).abs().max() < 5e-4 * features.abs().max()


def test_features_of_few_directions_are_no_trouble() -> None:
    features = drawn(500, 64, rank=5)
    made = fitted("phi_s", features)
    assert (made(features).double().std(0, correction=0) - 1).abs().max() < 1e-3
    assert made.inverse(made(features)).sub(features).abs().max() < 1e-5 * features.abs().max()


def test_a_channel_that_never_changes_is_not_blown_up() -> None:
    features = drawn(500, 8)
    features[:, 3] = 5.0
    assert fitted("channel", features)(features)[:, 3].abs().max() < 1.0


def test_features_that_are_the_same_everywhere_are_refused() -> None:
    made = Normaliser(NormaliserSettings(kind="phi_s"), 6, "teachers.sam")
    made.add(torch.full((40, 6), 3.3))
    with pytest.raises(UserError, match=r"teachers\.sam: its features are the same everywhere"):
        made.advance()


@pytest.mark.parametrize("kind", ["channel", "phi_s", "pca", "zca"])
@pytest.mark.parametrize("width", [16, 9])
def test_folded_head_is_the_unfolded_one(kind: str, width: int) -> None:
    made, head = fitted(kind, drawn(1000, width)), nn.Linear(10, width)
    inputs = torch.randn(50, 10, generator=torch.Generator().manual_seed(3))
    wanted = made.inverse(head(inputs))
    weight, bias = made.fold(head.weight, head.bias)
    folded = inputs @ weight.T + bias
    assert (folded - wanted).abs().max() < 1e-5 * wanted.abs().max()
    back = made.unfold(weight, bias)
    for known, found in zip((head.weight, head.bias), back, strict=True):
        assert (known - found).abs().max() < 1e-4


def test_statistics_do_not_depend_on_the_batches_and_are_fixed_at_the_end() -> None:
    features = drawn(600, 12)
    at_once, in_steps = fitted("phi_s", features), fitted("phi_s", features, steps=6, every=2)
    assert (at_once(features) - in_steps(features)).abs().max() < 1e-4
    before = in_steps(features)
    in_steps.add(1000 * features)
    in_steps.advance()
    assert not in_steps.measuring
    assert torch.equal(in_steps(features), before)


def test_targets_do_not_flip_at_an_update() -> None:
    features = drawn(4000, 12)
    made = Normaliser(NormaliserSettings(kind="phi_s", steps=4, every=1), 12)
    found = []
    for part in features.chunk(4):
        made.add(part)
        made.advance()
        found.append(made(features[:200]))
    cosines = torch.stack([torch.cosine_similarity(one, found[-1]).mean() for one in found])
    assert cosines.min() > 0.95


def test_rows_that_are_not_finite_are_left_out() -> None:
    features = drawn(300, 12)
    broken = features.clone()
    broken[7, 2], broken[9] = float("nan"), float("inf")
    good = torch.cat([features[:7], features[8:9], features[10:]])
    assert (fitted("phi_s", broken)(good) - fitted("phi_s", good)(good)).abs().max() < 1e-5


def test_it_goes_on_from_its_state_bit_for_bit() -> None:
    first, second = drawn(300, 9).chunk(2)
    settings = NormaliserSettings(kind="phi_s", steps=2, every=1)
    whole, stopped, resumed = (Normaliser(settings, 9) for _ in range(3))
    for made in (whole, stopped):
        made.add(first)
        made.advance()
    for name, value in stopped.state.items():
        resumed.restore(name, value)
    for made in (whole, resumed):
        made.add(second)
        made.advance()
    assert all(torch.equal(whole.state[name], resumed.state[name]) for name in whole.state)
    assert torch.equal(whole(first), resumed(first))
    assert not resumed.measuring


@pytest.mark.parametrize("width", [12, 10])
def test_phi_s_up_to_its_rotation(width: int) -> None:
    """Scaled features are the normalised ones, turned; and so what a turned head says has the same error and gradients."""
    features = drawn(500, width)
    made = fitted("phi_s", features)
    turn = made.turn()
    assert (turn @ turn.T - torch.eye(width)).abs().max() < 1e-5
    assert (made.scaled(features) - made(features) @ turn.T).abs().max() < 1e-4
    assert (made.unscaled(made.scaled(features)) - features).abs().max() < 1e-5 * features.abs().max()

    torch.manual_seed(0)
    heads = nn.ModuleDict({"a": mlp(8, 4 * width, HeadSettings(width=6))})
    patches = Patches(torch.randn(3, 5, 8), 1, (2, 2), torch.tensor([0, 3, 5, 6, 11]))
    wanted = features[:20]
    errors = []
    for turns in (None, {"a": turn}):
        heads.zero_grad()
        found = predict(heads, {"a": 4}, patches, turns=turns)["a"]  # type: ignore[index]
        error = (found - (made(wanted) if turns is None else made.scaled(wanted))).square().mean()
        error.backward()
        errors.append([error.detach(), *(value.grad.clone() for value in heads.parameters() if value.grad is not None)])
    assert len(errors[0]) == 7
    for one, other in zip(*errors, strict=True):
        assert (one - other).abs().max() < 1e-4 * one.abs().max()
