"""Input of one forward pass: a class of batches for each kind of training. Shapes are those of `contracts.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from eva_mim.core.losses import GradCacheStep

B = TypeVar("B", bound="Batch")


@dataclass(frozen=True)
class Batch:
    """Input of one forward pass of one process; each kind of training has a class of its own below."""

    index: Tensor
    """[B] int64, position of each image in its source."""
    broken: tuple[str, ...] = field(default=(), kw_only=True)
    """Records that could not be read and were replaced: "key: reason"."""

    @property
    def size(self) -> int:
        """B, the images of the batch."""
        return len(self.index)

    def to(self: B, device: Any) -> B:
        """Returns the batch with every tensor on `device`; pinned memory is copied asynchronously."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: B) -> B:
        """Returns the batch in pinned memory. torch's DataLoader calls the method by this name."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self: B, change: Callable[[Tensor], Tensor]) -> B:
        changed: dict[str, Any] = {}
        for name, value in ((known.name, getattr(self, known.name)) for known in fields(self)):
            if isinstance(value, dict):
                changed[name] = {key: change(tensor) for key, tensor in value.items()}
            elif hasattr(value, "dtype"):
                changed[name] = change(value)
            elif isinstance(value, tuple) and hasattr(next(iter(value), None), "dtype"):
                changed[name] = tuple(map(change, value))
        return replace(self, **changed)


@dataclass(frozen=True)
class MaskedBatch(Batch):
    """Images with some patches masked."""

    views: dict[int, Tensor]
    """Side in pixels -> [B, channels, side, side] uint8, or float32 from 0 to 255: one crop of each image at every size that a
    network asks for."""
    masked: Tensor | None = None
    """[B, N] bool, True where the patch is hidden from the student; None if it sees all patches."""
    target_index: Tensor | None = None
    """[M] int64, positions of the masked patches in the flattened [B * N]; an index needs no host sync, unlike a boolean mask.
    None if `masked` is None: every patch is predicted."""
    visible_index: Tensor | None = field(default=None, kw_only=True)
    """[B * N - M] int64, positions of the other patches; None if they are not predicted."""
    side: int | None = field(default=None, kw_only=True)
    """Size of the student's view in pixels; None: the student's own."""
    window: int | None = field(default=None, kw_only=True)
    """Side of the student's windows in patches; None for none."""
    teachers: tuple[str, ...] | None = field(default=None, kw_only=True)
    """Names of the teachers that teach these images; None: all."""
    drops: Tensor | None = field(default=None, kw_only=True)
    """[B, T] bool, True where a teacher, in the recipe's order, is dropped from an image unless its loss is the largest; None for
    no dropping."""
    labels: Tensor | None = field(default=None, kw_only=True)
    """[B] int64, None if the images have no labels; held-out figures read them, the loss does not."""
    stored: dict[str, Tensor] = field(default_factory=dict, kw_only=True)
    """Targets from a store, [B, ...] by their names in its files; empty where teachers compute them."""


@dataclass(frozen=True)
class ImageTextBatch(Batch):
    """Images and the texts that belong to them."""

    images: Tensor
    """[B, channels, H, W] uint8, or float32 from 0 to 255."""
    texts: Tensor
    """[T, L] int64 token ids: in training one caption an image in the images' order (T = B), held out all captions."""
    text_owner: Tensor
    """[T] int64, row of the image that each text belongs to."""
    labels: Tensor | None = field(default=None, kw_only=True)
    """[B] int64, None if the images have no labels; zero-shot figures read them, the loss does not."""
    stored: dict[str, Tensor] = field(default_factory=dict, kw_only=True)
    """A teacher's features from a store, [B, ...] by their names in its files; empty without distillation."""
    grad_cache: GradCacheStep | None = field(default=None, kw_only=True)
    """Loss of all micro-batches together and this one's gradients, from `Task.prepare`; None if each has its own loss."""


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """Images with their class labels."""

    images: Tensor
    """[B, channels, H, W] uint8, or float32 from 0 to 255."""
    labels: Tensor
    """[B] int64."""


@dataclass(frozen=True)
class VideoBatch(Batch):
    """Videos with their class labels."""

    images: Tensor
    """[B, T, 3, H, W] uint8, T frames of each video; held out [B, V, T, 3, H, W], V clips times crops."""
    labels: Tensor
    """[B] int64."""


@dataclass(frozen=True)
class FeatureBatch(Batch):
    """Features of a frozen network in place of its images."""

    features: Tensor
    """[B, D] fp32."""
    labels: Tensor
    """[B] int64."""


@dataclass(frozen=True)
class SegmentedBatch(Batch):
    """Images with their segmentation maps, all of one size."""

    images: Tensor
    """[B, channels, S, S] uint8, or float32 from 0 to 255."""
    segmentation: Tensor
    """[B, S, S] int16, class number of each pixel, -1 for a pixel of no class."""


@dataclass(frozen=True)
class WholeImages(Batch):
    """Images of any size with their segmentation maps, for evaluation."""

    images: tuple[Tensor, ...]
    """B times [channels, h, w] uint8, or float32 from 0 to 255, resized for the network."""
    segmentations: tuple[Tensor, ...]
    """B times [H, W] int16, at the size of the files."""
