"""Normalisers of spatial features: an affine map of each teacher's features, from running statistics in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from eva_mim.core.distributed import all_reduce_sum, broadcast_from_main
from eva_mim.core.errors import UserError
from eva_mim.core.log import say
from eva_mim.targets import NormaliserSettings
from eva_mim.targets.orthogonal import spreading

FLOOR = 1e-6
"""Least variance of a channel or direction, as a share of the mean variance: one that never changes is not blown up (the same
share as the least eigenvalue of NVIDIA's TAO)."""
CONSTANT = 1e-12
"""Mean variance, as a share of the mean square, below which features are the same everywhere: rounding of fp32 leaves as much."""


class Map(NamedTuple):
    """A normaliser's map: mean [C], W and the inverse of W, diagonals [C] or matrices [C, C]; W is a rotation times `scale`."""

    mean: Tensor
    forward: Tensor
    backward: Tensor
    scale: Tensor
    """Scalar; of use for "phi_s" alone."""

    def fast(self) -> Map:
        """Returns the map in fp32."""
        return Map(*(one.float() for one in self))


class Normaliser:
    """Affine map of features [M, C] with running statistics: z = (y - mean) W^T in fp32.

    Each process adds up the features that it sees; `advance`, once a step on every rank, adds the sums of all ranks and updates
    the map. So the statistics do not depend on how images are distributed over ranks, and a rank that has none of this teacher's
    features adds nothing. For "channel" W is diagonal. The others have the eigenvectors U and eigenvalues L of the covariance:
    "phi_s" W = R U^T / phi, with the mean eigenvalue phi^2 and R that spreads the eigenvalues evenly (`orthogonal.py`; PHI-S,
    section 3.3), "pca" W = L^-1/2 U^T, "zca" W = U L^-1/2 U^T.
    """

    def __init__(self, settings: NormaliserSettings, width: int, path: str = "teacher"):
        """`path`: path of the teacher's settings, for messages."""
        self._settings, self._path, self.width = settings, path, width
        self._full = settings.kind != "channel"
        squares = (width, width) if self._full else (width,)
        self.state: dict[str, Tensor] = {
            "steps": torch.zeros((), dtype=torch.int64),
            "count": torch.zeros((), dtype=torch.float64),
            "sum": torch.zeros(width, dtype=torch.float64),
            "squares": torch.zeros(squares, dtype=torch.float64),
            "mean": torch.zeros(width, dtype=torch.float64),
            "variances": torch.ones(width, dtype=torch.float64),
        }
        """Tensors of a checkpoint: steps measured; number, sum and squares (all but "channel": outer products) of the rows; and
        what the map is made of: mean, variances of channels, or with `vectors` of the principal directions."""
        if self._full:
            self.state["vectors"] = torch.eye(width, dtype=torch.float64)
        self._fresh = self._nothing()
        self._steps = 0
        self._map: tuple[Map, Map] | None = None

    def _nothing(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(self.state[name]) for name in ("count", "sum", "squares")}

    def to(self, device: Any) -> Normaliser:
        """Moves all tensors to `device`."""
        self.state = {name: value.to(device) for name, value in self.state.items()}
        self._fresh = {name: value.to(device) for name, value in self._fresh.items()}
        self._map = None
        return self

    @property
    def started(self) -> bool:
        """True once there are statistics."""
        return self._steps > 0

    @property
    def measuring(self) -> bool:
        """True until the statistics are fixed."""
        return self._steps < self._settings.steps

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Adds features [M, C] of this process to the statistics, unless these are fixed."""
        if not self.measuring:
            return
        finite = rows.isfinite().all(1, keepdim=True)  # one that is not would stay in the sums, after its step was skipped
        exact = rows.double().where(finite, 0.0)
        self._fresh["count"] += finite.sum()
        self._fresh["sum"] += exact.sum(0)
        self._fresh["squares"] += exact.T @ exact if self._full else exact.square().sum(0)

    @torch.no_grad()
    def advance(self) -> None:
        """Ends a step: adds the sums of all ranks, and updates the map after the first step, every `every` steps and at the end.
        Every rank must call. Raises UserError for features that are the same everywhere."""
        if not self.measuring:
            return
        self.gather()
        self._steps += 1
        self.state["steps"].fill_(self._steps)
        if self._steps == 1 or self._steps % self._settings.every == 0 or not self.measuring:
            self._update()
        if not self.measuring:
            low, high = self.deviations()
            say(f"  {self._path}: statistics of {float(self.state['count']):,.0f} patches are fixed; normalised channels have "
                f"deviations of {low:.4f} to {high:.4f}")

    @torch.no_grad()
    def gather(self) -> None:
        """Adds what all ranks have added since the last call. Every rank must call."""
        for name, value in self._fresh.items():
            self.state[name] += all_reduce_sum(value)
        self._fresh = self._nothing()

    def _update(self) -> None:
        count = self.state["count"]
        mean = self.state["sum"] / count
        self.state["mean"] = mean
        if self._full:
            covariance = self.state["squares"] / count - mean[:, None] * mean
            values, vectors = torch.linalg.eigh(covariance)
            # Signs of eigenvectors are arbitrary: those of the last update are kept, so that the targets do not flip.
            signs = torch.where((vectors * self.state["vectors"]).sum(0) < 0, -1.0, 1.0)
            # Two ranks may find others, too.
            self.state["vectors"], values = broadcast_from_main(vectors * signs), broadcast_from_main(values)
        else:
            values = self.state["squares"] / count - mean.square()
        if not float(values.mean()) > CONSTANT * float(mean.square().mean()):
            raise UserError(f"{self._path}: its features are the same everywhere, so they cannot be normalised")
        self.state["variances"] = values.clamp(min=0.0)
        self._map = None

    def _maps(self) -> tuple[Map, Map]:
        """Returns the map in float64 and in fp32."""
        if self._map is None:
            values, mean = self.state["variances"], self.state["mean"]
            deviation = values.clamp(min=FLOOR * float(values.mean())).sqrt()
            exact = Map(mean, 1 / deviation, deviation, values.new_ones(()))
            if self._full:
                whole = self.state["vectors"]
                if self._settings.kind == "phi_s":
                    turn, deviation = spreading(values) @ whole.T, values.mean().sqrt().expand_as(values)
                else:
                    turn = whole.T
                back = whole if self._settings.kind == "zca" else torch.eye(self.width).to(whole)
                exact = Map(mean, back @ (turn / deviation[:, None]), (turn.T * deviation) @ back.T, 1 / values.mean().sqrt())
            self._map = exact, exact.fast()
        return self._map

    def __call__(self, features: Tensor) -> Tensor:
        """Returns normalised features [M, C] in fp32, whatever the precision around it."""
        fast = self._maps()[1]
        return _times(features.float() - fast.mean, fast.forward)

    def inverse(self, normalised: Tensor) -> Tensor:
        """Returns features [M, C] in the teacher's own space, in fp32."""
        fast = self._maps()[1]
        return _times(normalised.float(), fast.backward) + fast.mean

    def turn(self) -> Tensor:
        """Returns the rotation [C, C] from normalised features to scaled ones, for "phi_s"."""
        fast = self._maps()[1]
        return fast.backward * fast.scale

    def scaled(self, features: Tensor) -> Tensor:
        """Returns features [M, C] in fp32 that are normalised up to the rotation, for "phi_s": a loss that does not depend on a
        rotation is the same, and a product of each row with a matrix is saved."""
        fast = self._maps()[1]
        return (features.float() - fast.mean) * fast.scale

    def unscaled(self, scaled: Tensor) -> Tensor:
        """Returns features [M, C] in the teacher's own space; the inverse of `scaled`."""
        fast = self._maps()[1]
        return scaled.float() / fast.scale + fast.mean

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weight [C, D] and bias [C] of a linear layer with outputs in the teacher's own space, from those of a layer
        with normalised outputs."""
        exact = self._maps()[0]
        return _through(weight, exact.backward), _through(bias, exact.backward) + exact.mean.to(bias)

    @torch.no_grad()
    def unfold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weight and bias of a layer with normalised outputs; the inverse of `fold`."""
        exact = self._maps()[0]
        return _through(weight, exact.forward), _through(bias - exact.mean.to(bias), exact.forward)

    def deviations(self) -> tuple[float, float]:
        """Returns the least and the largest standard deviation of a normalised channel, by the statistics so far."""
        forward = self._maps()[0].forward
        count, mean = self.state["count"], self.state["mean"]
        if self._full:
            covariance = self.state["squares"] / count - mean[:, None] * mean
            variances = ((forward @ covariance) * forward).sum(1)
        else:
            variances = (self.state["squares"] / count - mean.square()) * forward.square()
        deviations = variances.clamp(min=0.0).sqrt()
        return float(deviations.min()), float(deviations.max())

    def restore(self, name: str, value: Tensor) -> None:
        """Sets a tensor of `state`."""
        self.state[name] = value.to(self.state[name].device)
        self._steps = int(self.state["steps"])
        self._fresh = self._nothing()
        self._map = None


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Returns rows [M, C] times the diagonal matrix, or times [C, C] transposed, in fp32."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows * matrix if matrix.ndim == 1 else functional.linear(rows, matrix)


def _through(value: Tensor, matrix: Tensor) -> Tensor:
    """Returns the diagonal matrix, or [C, C], times a weight [C, D] or a bias [C], computed in float64."""
    exact, wide = matrix.to(value.device), value.double()
    product = exact @ wide if exact.ndim == 2 else exact.view(-1, *[1] * (wide.ndim - 1)) * wide
    return product.to(value.dtype)
