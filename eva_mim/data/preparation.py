"""Preparation of samples: view, mask and caption, each drawn from a random stream of its own, and batches of them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from eva_mim.core.bands import Bands
from eva_mim.core.batches import B, ImageTextBatch, LabelledBatch, MaskedBatch, SegmentedBatch, VideoBatch, WholeImages
from eva_mim.core.contracts import Sample
from eva_mim.core.rng import derive
from eva_mim.core.timing import phase
from eva_mim.data.dense_views import Pair
from eva_mim.data.masking import Mask
from eva_mim.data.prompts import filled
from eva_mim.data.sampler import Place
from eva_mim.data.sources.videos import DecodedFrames
from eva_mim.data.video_views import FrameChoice

T = TypeVar("T")
View = Callable[..., Any]
"""Function of an image, a random generator and perhaps some sizes that returns {side in pixels: [channels, side, side]}; or of an
image, its segmentation map and a random generator that returns both (`dense_views.Pair`)."""
Tokenize = Callable[[list[str]], Tensor]
"""Function of T texts that returns [T, L] int64 token ids."""
Stored = Callable[[int, int], dict[str, Tensor]]
"""Function of view number and position in the source that returns the stored targets of an image."""
Classes = Sequence[str] | None
"""Class names by label; None if the images have no labels."""


class Item(NamedTuple):
    """One sample, ready to be stacked."""

    index: int  # type: ignore[assignment]  # shadows tuple.index
    content: Any
    """Return value of `Preparation.content`."""
    broken: tuple[str, ...]
    """Faults of the broken records that this sample replaces."""


@dataclass(frozen=True)
class Preparation(ABC, Generic[B]):
    """Converts samples to items and items to batches; there is a subclass for each kind of training.

    View, mask and caption of a sample are functions of (seed, purpose, number, index), so none depends on the draws of
    another.
    """

    view: View
    seed: int
    training: bool = field(default=True, kw_only=True)
    """False for held-out data, whose random streams differ from those of every training run."""
    view_seed: int | None = field(default=None, kw_only=True)
    """Seed of the views of training; None: `seed`."""
    views: int | None = field(default=None, kw_only=True)
    """Number of different views of a sample before the first is used again, with another mask and caption; None: a new view in
    each epoch."""
    with_views: tuple[str, ...] = field(default=("view",), kw_only=True)
    """Purposes whose draws belong to the view: they have its number and its seed, and come again with it."""
    stored: Stored | None = field(default=None, kw_only=True)
    """Features that go along with each view; None: there are none."""

    def check(self, sample: Sample, classes: Classes) -> None:
        """Raises ValueError for a record that cannot be used although its image is readable."""

    def decoded(self, sample: Sample, place: Place) -> Sample:
        """Returns the sample with everything decoded that is shown at a place: of a video the chosen frames. Raises any exception
        for a record that cannot be decoded."""
        return sample

    @abstractmethod
    def content(self, sample: Sample, place: Place, classes: Classes) -> Any:
        """Returns the content of one row of a batch."""

    @abstractmethod
    def batch(self, index: Tensor, contents: Sequence[Any], broken: tuple[str, ...]) -> B:
        """Returns the batch of B contents. `index`: [B] int64, positions in the source; `broken`: faults of broken records."""

    def draws(self, purpose: str, number: int, index: int) -> random.Random:
        """Returns the random generator of a purpose ("view", "mask", "caption") for one sample."""
        seed = self.view_seed if purpose in self.with_views and self.view_seed is not None else self.seed
        return random.Random(derive(seed, purpose if self.training else f"held-out {purpose}", number, index))

    def drawn(self, purpose: str, place: Place) -> random.Random:
        """Returns the random generator of a purpose for what is shown at a place."""
        return self.draws(purpose, self.view_of(place) if purpose in self.with_views else place.epoch, place.index)

    def views_of(self, sample: Sample, place: Place) -> dict[int, Tensor]:
        """Returns the views of a sample, {side in pixels: [channels, side, side]}."""
        views: dict[int, Tensor] = self.view(sample.image, self.drawn("view", place))
        return views

    def view_of(self, place: Place) -> int:
        """Returns the number of the view that is shown at a place."""
        return place.epoch if self.views is None else place.epoch % self.views

    def stored_at(self, place: Place) -> dict[str, Tensor]:
        """Returns the stored features of the view that is shown at a place, by name."""
        return self.stored(self.view_of(place), place.index) if self.stored else {}

    def image_of(self, sample: Sample, place: Place) -> Tensor:
        """Returns the only view of a sample, [channels, side, side]."""
        (image,) = self.views_of(sample, place).values()
        return image


class Shown(NamedTuple):
    """What a group of teachers and its student see of an image, at one of the student's sizes."""

    side: int
    """Of the student's view, in pixels."""
    sizes: tuple[int, ...]
    """Sides of all views."""
    mask: Mask | None
    teachers: tuple[str, ...]
    windows: tuple[int, ...] = ()
    """Sides of the student's windows in training, of which one is drawn for each step; empty for none."""


class TeacherDrop(NamedTuple):
    """Random dropping of teachers from single images."""

    rate: float
    """Probability for each teacher and image."""
    teachers: int
    """Number of teachers of the recipe."""


@dataclass(frozen=True)
class MaskedPreparation(Preparation[MaskedBatch]):
    """Preparation of views of every size, with a mask of the student's patches."""

    mask: Mask | None = None
    """Mask of the patches; None: the student sees every patch."""
    predict_visible: bool = field(default=False, kw_only=True)
    """True if the patches that the student sees are predicted, too."""
    drop: TeacherDrop | None = field(default=None, kw_only=True)
    """Dropping of teachers in training; None for none."""
    groups: Sequence[Sequence[Shown]] = field(default=(), kw_only=True)
    """Of each group of teachers what is shown at each of the student's sizes: of several one is drawn for each step, as a
    function of (seed, group, step). Empty: all views, with `mask`."""

    def shown_at(self, place: Place) -> Shown | None:
        """Returns what is shown at a place, with the one window of its step; None without groups."""
        if not self.groups:
            return None
        shown = self._chosen("size", self.groups[place.group], place)
        windows = (self._chosen("window", shown.windows, place),) if shown.windows and self.training else ()
        return shown._replace(windows=windows)

    def _chosen(self, purpose: str, among: Sequence[T], place: Place) -> T:
        rng = random.Random(derive(self.seed, purpose, place.group, place.step)) if len(among) > 1 else None
        return rng.choice(among) if rng else among[0]

    def content(self, sample: Sample, place: Place, classes: Classes) -> tuple[Any, ...]:
        """Returns views by side, [N] bool mask (None without masking), label, stored targets, the group's `Shown`, and which
        teachers are dropped (None without dropping)."""
        shown = self.shown_at(place)
        mask = self.mask if shown is None else shown.mask
        views = self.view(sample.image, self.drawn("view", place), *(() if shown is None else (shown.sizes,)))
        with phase("mask"):
            masked = torch.from_numpy(mask(self.drawn("mask", place))) if mask else None
        drops = None
        if self.drop and self.training:
            rng = self.drawn("teachers", place)
            drops = [rng.random() < self.drop.rate for _ in range(self.drop.teachers)]
        return views, masked, sample.label, self.stored_at(place), shown, drops

    def batch(self, index: Tensor, contents: Sequence[Any], broken: tuple[str, ...]) -> MaskedBatch:
        """Returns the batch; see `Preparation.batch`."""
        views, masks, labels, stored, (shown, *_), drops = zip(*contents, strict=True)
        masked = torch.stack(masks) if masks[0] is not None else None
        return MaskedBatch(
            index,
            {side: torch.stack([each[side] for each in views]) for side in views[0]},
            masked,
            None if masked is None else masked.flatten().nonzero()[:, 0],
            visible_index=(~masked).flatten().nonzero()[:, 0] if masked is not None and self.predict_visible else None,
            side=shown.side if shown else None,
            window=next(iter(shown.windows), None) if shown else None,
            teachers=shown.teachers if shown else None,
            drops=torch.tensor(drops) if drops[0] is not None else None,
            labels=_labels(labels),
            stored=_stacked(stored),
            broken=broken,
        )


@dataclass(frozen=True)
class ImageTextPreparation(Preparation[ImageTextBatch]):
    """Preparation of images with texts. Training draws one of a sample's captions, evaluation uses all of them. A sample without
    captions gets a template with the name of its class: a drawn template in training, the first one in evaluation."""

    tokenize: Tokenize
    templates: Sequence[str] = ()

    def check(self, sample: Sample, classes: Classes) -> None:
        """Raises ValueError for a sample without text or with an empty caption."""
        if not sample.captions and (sample.label is None or classes is None):
            raise ValueError("no caption (KEY.txt, KEY.json, data.captions, data.columns.captions) and no class name")
        if "" in sample.captions:
            raise ValueError("an empty caption")

    def content(self, sample: Sample, place: Place, classes: Classes) -> tuple[Any, ...]:
        """Returns image, [T, L] token ids of the sample's texts, label, and stored features."""
        texts = self.tokenize(self._texts(sample, place, classes))
        return self.image_of(sample, place), texts, sample.label, self.stored_at(place)

    def _texts(self, sample: Sample, place: Place, classes: Classes) -> list[str]:
        texts = list(sample.captions)
        if not texts:
            assert sample.label is not None
            assert classes is not None
            templates = self.templates if self.training else self.templates[:1]
            texts = [filled(template, classes[sample.label]) for template in templates]
        return [self.drawn("caption", place).choice(texts)] if self.training else texts

    def batch(self, index: Tensor, contents: Sequence[Any], broken: tuple[str, ...]) -> ImageTextBatch:
        """Returns the batch; see `Preparation.batch`."""
        images, texts, labels, stored = zip(*contents, strict=True)
        owner = torch.tensor([row for row, rows in enumerate(texts) for _ in rows])
        return ImageTextBatch(index, torch.stack(images), torch.cat(texts), owner, labels=_labels(labels),
                              stored=_stacked(stored), broken=broken)


@dataclass(frozen=True)
class LabelledPreparation(Preparation[LabelledBatch]):
    """Preparation of images with class labels."""

    def content(self, sample: Sample, place: Place, classes: Classes) -> tuple[Tensor, int]:
        """Returns image and label."""
        assert sample.label is not None
        return self.image_of(sample, place), sample.label

    def batch(self, index: Tensor, contents: Sequence[Any], broken: tuple[str, ...]) -> LabelledBatch:
        """Returns the batch; see `Preparation.batch`."""
        images, labels = zip(*contents, strict=True)
        return LabelledBatch(index, torch.stack(images), torch.tensor(labels), broken=broken)


@dataclass(frozen=True)
class VideoPreparation(Preparation[VideoBatch]):
    """Preparation of videos with class labels."""

    choice: FrameChoice
    """Which frames of a video are seen."""
    with_views: tuple[str, ...] = field(default=("view", "frames"), kw_only=True)

    def check(self, sample: Sample, classes: Classes) -> None:
        """Raises ValueError for a video that has too few frames."""
        assert not isinstance(sample.image, (Image.Image, Bands))
        if (length := len(sample.image)) < self.choice.frames:
            raise ValueError(f"it has {length} frames, fewer than student.frames={self.choice.frames}")

    def decoded(self, sample: Sample, place: Place) -> Sample:
        """Returns the sample with its chosen frames alone; see `Preparation.decoded`."""
        assert not isinstance(sample.image, (Image.Image, Bands))
        length = len(sample.image)
        chosen = self.choice.drawn(length, self.drawn("frames", place)) if self.training else self.choice.held_out(length)
        wanted = sorted(set(chosen))
        found = dict(zip(wanted, sample.image.frames(wanted), strict=True))
        return sample._replace(image=DecodedFrames([found[index] for index in chosen]))

    def content(self, sample: Sample, place: Place, classes: Classes) -> tuple[Tensor, int]:
        """Returns views of the frames and the label."""
        assert sample.label is not None
        return self.view(sample.image, self.drawn("view", place)), sample.label

    def batch(self, index: Tensor, contents: Sequence[Any], broken: tuple[str, ...]) -> VideoBatch:
        """Returns the batch; see `Preparation.batch`."""
        images, labels = zip(*contents, strict=True)
        return VideoBatch(index, torch.stack(images), torch.tensor(labels), broken=broken)


@dataclass(frozen=True)
class _DensePreparation(Preparation[B]):
    """Preparation of images together with their segmentation maps."""

    def check(self, sample: Sample, classes: Classes) -> None:
        """Raises ValueError for a sample without a map."""
        if sample.segmentation is None:
            raise ValueError("no segmentation map (data.segmentation)")

    def content(self, sample: Sample, place: Place, classes: Classes) -> Pair:
        """Returns image and map."""
        pair: Pair = self.view(sample.image, sample.segmentation, self.drawn("view", place))
        return pair


@dataclass(frozen=True)
class SegmentedPreparation(_DensePreparation[SegmentedBatch]):
    """Preparation of crops with their segmentation maps, for training."""

    def batch(self, index: Tensor, contents: Sequence[Any], broken: tuple[str, ...]) -> SegmentedBatch:
        """Returns the batch; see `Preparation.batch`."""
        images, maps = zip(*contents, strict=True)
        return SegmentedBatch(index, torch.stack(images), torch.stack(maps), broken=broken)


@dataclass(frozen=True)
class WholePreparation(_DensePreparation[WholeImages]):
    """Preparation of whole images with their segmentation maps, for evaluation."""

    def batch(self, index: Tensor, contents: Sequence[Any], broken: tuple[str, ...]) -> WholeImages:
        """Returns the batch; see `Preparation.batch`."""
        images, maps = zip(*contents, strict=True)
        return WholeImages(index, images, maps, broken=broken)


def _stacked(stored: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in stored]) for name in stored[0]}


def _labels(labels: Sequence[int | None]) -> Tensor | None:
    return None if None in labels else torch.tensor(labels)
