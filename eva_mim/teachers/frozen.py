"""What all teachers share: frozen, in eval mode, normalising their own pixels, not a submodule of anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eva_mim.core.contracts import Features, Grid
from eva_mim.core.errors import UserError
from eva_mim.core.files import weights_sha256
from eva_mim.trunks.kernels import tune
from eva_mim.trunks.pixels import normalise

if TYPE_CHECKING:
    from eva_mim.teachers import TeacherSettings


@dataclass(frozen=True)
class Reading:
    """Layer, norm and projection that features are read from, resolved for a network."""

    features: Callable[[Tensor], Features]
    """From normalised pixels [B, channels, S, S]. Layer and norm choose the patches; the summary is always the network's own."""
    layer: int | None = None
    """Block whose output is read, counted from 0; None for a network that is read at its end alone."""
    blocks: int | None = None
    """Number of blocks."""
    final_norm: bool = True
    """The patches went through the network's last norm (False also where it has none)."""
    project: bool = False
    """Patches and summary went through the projection."""


class FrozenTeacher:
    """A network with a way to read its features. Not an nn.Module: no engine casts, shards, saves or counts it."""

    def __init__(
        self, network: nn.Module, reading: Reading, *, image_size: int, mean: tuple[float, ...], std: tuple[float, ...],
        path: str = "teacher",
    ):
        """`path`: where the teacher's settings stand in the recipe."""
        self._network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        tune(self._network, "cpu")
        self._reading = reading
        self.image_size, self.mean, self.std = image_size, mean, std
        try:
            probe = self(torch.zeros(1, len(mean), image_size, image_size, dtype=torch.uint8))
        except (AssertionError, RuntimeError) as error:
            raise UserError(f"{path}.image_size: this {self._kind} cannot take {image_size} px: {error}") from None
        self.grid: Grid = probe.grid
        self.width: int = probe.spatial.shape[-1]
        if image_size % self.grid[0]:
            raise UserError(
                f"{path}.image_size: {image_size} px are not a whole number for each of the {self.grid[0]} patches in a row"
            )

    @property
    def _kind(self) -> str:
        return type(getattr(self._network, "trunk", self._network)).__name__

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of [B, channels, S, S] pixels as `pixels.normalise` takes them."""
        return self._reading.features(normalise(images, self.mean, self.std))

    def to(self, device: Any) -> FrozenTeacher:
        """Move the weights."""
        self._network.to(device)
        tune(self._network, device)
        return self

    def fingerprint(self) -> str:
        """SHA-256 over names and values of all weights: proof that a run left the teacher alone."""
        return weights_sha256(self._network.state_dict())

    def facts(self) -> dict[str, Any]:
        """Name, sizes and reading of the teacher, in JSON's types."""
        return {
            "network": self._kind,
            "parameters": sum(parameter.numel() for parameter in self._network.parameters()),
            "image_size": self.image_size,
            "grid": list(self.grid),
            "width": self.width,
            "mean": list(self.mean),
            "std": list(self.std),
            "layer": self._reading.layer,
            "blocks": self._reading.blocks,
            "final_norm": self._reading.final_norm,
            "project": self._reading.project,
        }


def block_index(settings: TeacherSettings, blocks: int) -> int:
    """`settings.layer` counted from 0. Raises UserError for a block that does not exist."""
    if not -blocks <= settings.layer < blocks:
        raise UserError(
            f"{settings.path}.layer: {settings.layer} does not exist; {settings.name} has {blocks} blocks, 0 to {blocks - 1} "
            f"(or -{blocks} to -1)"
        )
    return settings.layer % blocks


def with_projection(settings: TeacherSettings, available: bool) -> bool:
    """Whether to project. Raises UserError where that is asked of a network that cannot."""
    if settings.project and not available:
        raise UserError(f"{settings.path}.project: {settings.name} has no projection for patches; leave it out, or set false")
    return available if settings.project is None else settings.project
