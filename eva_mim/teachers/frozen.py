"""Base of all teachers with a network: frozen, in eval mode, with its own pixel normalisation, a submodule of no other module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eva_mim.core.contracts import Features, Grid
from eva_mim.core.errors import UserError
from eva_mim.core.files import weights_sha256
from eva_mim.teachers.cast import CastWeights
from eva_mim.trunks import facts
from eva_mim.trunks.config import RESIZING
from eva_mim.trunks.kernels import tune
from eva_mim.trunks.pixels import normalise
from eva_mim.weights.files.lazy import finite

if TYPE_CHECKING:
    from eva_mim.teachers import TeacherSettings


@dataclass(frozen=True)
class Reading:
    """Layer, norm and projection of the features that are read from a network, with all defaults resolved."""

    features: Callable[[Tensor], Features]
    """Function from normalised pixels [B, channels, S, S] to features. Layer, norm and projection apply to the patches."""
    layer: int | None = None
    """Block whose output is read, counted from 0; None for a network of which only the final output is read."""
    blocks: int | None = None
    """Number of blocks."""
    final_norm: bool = True
    """True if the network's last norm is applied to the patches (False also if it has none)."""
    project: bool = False
    """True if the projection is applied to the patches."""
    summary: str | None = "pooled"
    """What the summary is, in words; None if the network has none."""


class FrozenTeacher:
    """A network and the reading of its features. It is no nn.Module, so that no engine casts, shards, saves or counts it."""

    def __init__(
        self, network: nn.Module, reading: Reading, settings: TeacherSettings, *, image_size: int, mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        """`settings`: precision, micro-batch, and sizes besides `image_size`. Raises UserError for a size that does not fit the
        network."""
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name, value in network.state_dict().items():
            if not value.is_meta:
                finite(value, name, f"{settings.path}: its weights")
        tune(self.network, "cpu")
        self._weights = CastWeights(self.network)
        self.reading, self._precision, self._micro_batch = reading, settings.precision, settings.micro_batch
        self.image_size, self.mean, self.std = image_size, mean, std
        config = facts.configuration(network)
        self.resizing: dict[str, Any] = {name: config.get(name) or value for name, value in RESIZING.items()}
        """How its images are brought to size, as `EvalView` takes it: by timm's configuration, or as open_clip does it."""
        probe = self._probe(image_size, settings.path)
        self.grid: Grid = probe.grid
        self.width: int = probe.spatial.shape[-1]
        self.summary_width: int = probe.summary.shape[-1]
        self._sides = {self._probe(side, settings.path).grid: side for side in settings.follows}
        """Sides in pixels by the grid of patches, for a teacher that follows the student's size."""

    def _probe(self, side: int, path: str) -> Features:
        try:
            found = self(torch.zeros(1, len(self.mean), side, side, dtype=torch.uint8))
        except (AssertionError, RuntimeError) as error:
            raise UserError(f"{path}.image_size: this {self._kind} cannot take {side} px: {error}") from None
        if side % found.grid[0]:
            raise UserError(f"{path}.image_size: {side} px are not a whole number for each of the {found.grid[0]} patches in a "
                            "row")
        return found

    @property
    def _kind(self) -> str:
        return type(getattr(self.network, "trunk", self.network)).__name__

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Returns the features of [B, channels, S, S] pixels, uint8 or float in 0..255, in the teacher's own precision, or that
        of autocast."""
        with self._own_precision(images.device.type):
            self._weights.follow(images.device.type)
            parts = [self.reading.features(normalise(part, self.mean, self.std))
                     for part in torch.split(images, self._micro_batch or max(1, len(images)))]
        if len(parts) == 1:
            return parts[0]
        return Features(torch.cat([part.summary for part in parts]), torch.cat([part.spatial for part in parts]), parts[0].grid)

    def _own_precision(self, device: str) -> Any:
        if self._precision is None or device == "meta":
            return nullcontext()
        return torch.autocast(device, torch.bfloat16, enabled=self._precision == "bf16")

    def seen(self, grid: Grid) -> tuple[int, Grid]:
        """See `contracts.Teacher`."""
        return (self._sides[grid], grid) if grid in self._sides else (self.image_size, self.grid)

    def to(self, device: Any) -> FrozenTeacher:
        """Moves the weights to `device`."""
        self._weights.exact()
        self.network.to(device)
        tune(self.network, device)
        return self

    def fingerprint(self) -> str:
        """Returns the SHA-256 of names and values of all weights: proof that a run did not change the teacher. Raises UserError
        if it changed those that were cast."""
        self._weights.exact()
        return weights_sha256(self.network.state_dict())

    def facts(self) -> dict[str, Any]:
        """Returns name, sizes and reading of the teacher, in JSON's types."""
        return {
            "network": self._kind,
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "image_size": self.image_size,
            "grid": list(self.grid),
            **({"follows": list(self._sides.values())} if self._sides else {}),
            "width": self.width,
            "mean": list(self.mean),
            "std": list(self.std),
            "layer": self.reading.layer,
            "blocks": self.reading.blocks,
            "final_norm": self.reading.final_norm,
            "project": self.reading.project,
            "summary": self.reading.summary,
        }


def block_index(settings: TeacherSettings, blocks: int) -> int:
    """Returns `settings.layer` counted from 0. Raises UserError for a block that does not exist."""
    if not -blocks <= settings.layer < blocks:
        raise UserError(
            f"{settings.path}.layer: {settings.layer} does not exist; {settings.name} has {blocks} blocks, 0 to {blocks - 1} "
            f"(or -{blocks} to -1)"
        )
    return settings.layer % blocks


def with_projection(settings: TeacherSettings, available: bool) -> bool:
    """Returns whether to project patches. Raises UserError if `settings.project` is true and no projection is available."""
    if settings.project and not available:
        raise UserError(f"{settings.path}.project: {settings.name} has no projection for patches; leave it out, or set false")
    return available if settings.project is None else settings.project
