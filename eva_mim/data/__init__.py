"""Images in, batches out. This file holds the settings; the parts are imported when used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from eva_mim.core.settings import RUNTIME, For, Settings

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Strength = Annotated[float, Field(ge=0.0)]
MAX_CHANNELS = 512
"""Hyperspectral cameras have 200 to 400."""


class Pixels(NamedTuple):
    """Pixel format of decoded images."""

    channels: int = 3
    window: tuple[float, float] | None = None


RGB = Pixels()
"""8 bits of red, green and blue."""


MIN_BROKEN = 10
"""Fewer broken images than this never stop anything, whatever their share."""


def too_many(broken: int, images: int, max_broken: float) -> bool:
    """More of the images are broken than `data.max_broken` allows."""
    return broken > max(MIN_BROKEN, max_broken * images)


class SceneSettings(Settings):
    """The built-in dataset: pictures drawn from (seed, index)."""

    size: int = Field(64, ge=8)
    """Side of a picture in pixels."""
    train: int = Field(4000, ge=1)
    """Number of training pictures."""
    val: int = Field(1000, ge=1)
    """Number of held-out pictures."""
    labels: str = Field("fine", pattern="^(fine|coarse)$")
    """"fine": texture and shape of the first object (24 classes); "coarse": its shape (6 classes)."""
    seed: int = 0
    """Seed of the drawings (not of the run)."""


class ColumnSettings(Settings):
    """list: which column holds what. JSONL: the names in each line."""

    image: str = "image"
    """Path of the image, relative to the list's own folder."""
    captions: str | list[str] | None = None
    """One or more columns with captions; a cell of JSONL or Parquet may hold several."""
    label: str | None = None
    """Class of the image: its name, or its number in `data.classes`."""


FILES = For("source", "folder", "shards", "list")
"""Not the built-in pictures, which are 8-bit RGB and have held-out images of their own."""
FILES_OF_A_SPLIT = For(FILES.setting, *FILES.values, reread=True)
PAIRS = For("source", "folder", "shards")


class SourceSettings(Settings):
    """Source of a dataset's images, labels and captions, and the images of it that are used."""

    source: str = "folder"
    """"scenes" (built in), "folder" (class folders or a flat folder), "shards" (.tar, .tar.gz) or "list" (.csv, .tsv, .jsonl,
    .parquet)."""
    root: Annotated[Path | None, FILES] = None
    """Folder of the dataset. A list may name no image outside it. shards: may be a URL, such as s3://bucket/folder, for which
    fsspec's driver must be installed (s3fs, gcsfs, aiohttp)."""
    train: Annotated[str | None, FILES_OF_A_SPLIT] = None
    """folder: sub-folder with the training images; shards: file pattern such as "train-*.tar"; list: the list's file."""
    val: Annotated[str | None, FILES_OF_A_SPLIT] = None
    """The same for held-out images; without it `val_share` of `train` is held out."""
    val_share: Annotated[Share, FILES] = 0.05
    """Share of the training images held out when `val` is not given."""
    classes: Annotated[str | None, For("source", "shards", "list")] = None
    """File in `root` with one class name a line, by label."""
    class_names: str | None = None
    """Words for the classes, by label, in place of the dataset's own names (such as n01440764): "imagenet" (open_clip's 1,000),
    or a file in `root` with one name a line."""
    label_map: dict[str, list[str]] | None = None
    """New class -> old classes: trains on groups of the dataset's own classes."""
    captions: Annotated[str | None, PAIRS] = None
    """File in `root` with a line {"key": KEY, "captions": [...]} for each image, instead of KEY.txt, KEY.json."""
    val_captions: Annotated[str | None, PAIRS] = None
    """The same for the images of `val`, when they are not in `captions`."""
    caption_lines: Annotated[bool, PAIRS] = False
    """KEY.txt holds one caption a line, not one caption."""
    bad_shards: Annotated[Literal["refuse", "skip"], For("source", "shards")] = "refuse"
    """A damaged one is named, and the run refused ("refuse") or made without it ("skip")."""
    shuffle_gb: Annotated[float, Field(gt=0.0), For("source", "shards")] = 8.0
    """So many 10^9 bytes of shards are shuffled together, which the host's memory should hold. Data that is no larger is
    shuffled as a whole; of larger data blocks are permuted, and records within so many blocks, so that reading is sequential."""
    columns: Annotated[ColumnSettings, For("source", "list")] = ColumnSettings()
    channels: Annotated[int, FILES] = Field(3, ge=1, le=MAX_CHANNELS)
    """Channels of an image. 3: RGB, into which everything is converted; 1: grey, into which colours are; other numbers: the
    channels of the file, which must be so many. See docs/data.md."""
    window: Annotated[tuple[float, float] | None, FILES] = None
    """[low, high] for images of more than 8 bits: values between are spread over 0 to 255, others are cut off, and nothing is
    rounded. `eva-mim data stats` proposes one."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many training images."""
    val_limit: int | None = Field(None, ge=1)
    """Use only the first so many held-out images."""
    scenes: Annotated[SceneSettings, For("source", "scenes")] = SceneSettings()

    @property
    def own_root(self) -> Path:
        """`root` of a source that has one. Raises ValueError without it."""
        if self.root is None:
            raise ValueError(f"data.root must be given when data.source is {self.source!r}")
        return self.root

    @property
    def pixels(self) -> Pixels:
        """Pixel format that images are decoded into."""
        return Pixels(self.channels, self.window)

    @model_validator(mode="after")
    def _pixels_are_there(self) -> SourceSettings:
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError(f"data.window={list(self.window)} must rise")
        return self

    @model_validator(mode="after")
    def _captions_of_a_split(self) -> SourceSettings:
        if self.val_captions is not None and self.val is None:
            raise ValueError(f"data.val_captions={self.val_captions} needs data.val: held-out images of `train` have `captions`")
        return self


class PartSettings(SourceSettings):
    """One source of a mixture."""

    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Training images are drawn from the parts in proportion to their weights."""
    val_share: Annotated[Share, FILES] = 0.0
    """Share of this part's training images held out when `val` is not given; 0 holds out none."""

    @model_validator(mode="after")
    def _root_is_given(self) -> PartSettings:
        if self.source != "scenes":
            _ = self.own_root
        return self


class DataSettings(SourceSettings):
    """The data of a stage: one source, or a mixture of several."""

    held_out: SourceSettings | None = None
    """A dataset of its own for the held-out images: those of its `val`, or all of it where `val` is not set. With it the training
    images come from anywhere, such as web pairs, and zero-shot accuracy is measured on ImageNet's validation images."""
    mixture: list[PartSettings] | None = Field(None, min_length=1)
    """Several sources, each with a weight. An epoch has as many images as all of them together. Every part runs through its own
    images without replacement, pass after pass: before an image comes again, all others of its part have come."""
    templates: str | list[str] = ["a photo of a {}."]
    """Captions for labelled images without one ("{}" is the class name), and the zero-shot prompts: a list, or "openai" (80) or
    "simple" (7), those of CLIP's authors for ImageNet as open_clip has them."""
    expected: Annotated[int | None, RUNTIME] = Field(None, ge=1)
    """Number of training images that the recipe was written for; a source with another number is refused."""
    quarantine: Annotated[Path | None, RUNTIME] = None
    """Records that are not read: the list that `eva-mim data verify` writes. Each is replaced like a broken one, by the same
    sample, but not counted."""
    workers: Annotated[int, RUNTIME] = Field(1, ge=0)
    """Loader processes of each rank; no result depends on it."""
    max_broken: Share = 0.01
    """The run stops when more than this share of the images read is broken."""

    @model_validator(mode="after")
    def _one_source_or_several(self) -> DataSettings:
        if self.mixture:
            own = [name for name, field in SourceSettings.model_fields.items() if getattr(self, name) != field.default]
            if own:
                raise ValueError(f"data.{own[0]} belongs to one source: set it in the parts of data.mixture")
        elif self.source != "scenes":
            _ = self.own_root
        return self

    @classmethod
    def chosen_in(cls, tree: Mapping[str, Any], setting: str) -> Any:
        """A mixture has no source of its own: what is set beside it is refused as a whole."""
        return None if setting == "source" and isinstance(tree.get("mixture"), list) else super().chosen_in(tree, setting)

    @property
    def sources(self) -> dict[str, SourceSettings]:
        """Dotted path -> each source that images come from; training first."""
        mixed = {f"data.mixture.{number}": part for number, part in enumerate(self.mixture or ())}
        found: dict[str, SourceSettings] = {**mixed} or {"data": self}
        return found if self.held_out is None else found | {"data.held_out": self.held_out}

    @property
    def channels_of_all(self) -> int:
        """Channels of every image, whatever its source."""
        return next(iter(self.sources.values())).channels

    @property
    def plain(self) -> bool:
        """All images are 8-bit RGB."""
        return all(source.pixels == RGB for source in self.sources.values())

    @model_validator(mode="after")
    def _channels_are_the_same(self) -> DataSettings:
        (first, one), *others = self.sources.items()
        for path, other in others:
            if other.channels != one.channels:
                raise ValueError(f"{path}.channels={other.channels} must be the {one.channels} of {first}.channels")
            if path != "data.held_out" and (other.window is None) != (one.window is None):
                raise ValueError(f"{path}.window and {first}.window: either all parts have one, or none: a batch has one type")
        return self

    @model_validator(mode="after")
    def _held_out_once(self) -> DataSettings:
        if self.held_out is None:
            return self
        if self.held_out.source != "scenes":
            _ = self.held_out.own_root
        parts: list[tuple[str, SourceSettings]] = [("data", self)]
        parts += [(f"data.mixture.{number}", part) for number, part in enumerate(self.mixture or ())]
        for path, part in parts:
            if part.val is not None:
                raise ValueError(f"{path}.val={part.val}: the held-out images are those of data.held_out; leave one of them out")
        return self

    @model_validator(mode="after")
    def _templates_have_a_place(self) -> DataSettings:
        if isinstance(self.templates, str):
            if self.templates not in ("openai", "simple"):
                raise ValueError(f'data.templates: {self.templates!r} is not known; "openai", "simple" or a list of templates')
        elif not self.templates:
            raise ValueError("data.templates must name at least one")
        for template in self.templates if isinstance(self.templates, list) else ():
            if "{}" not in template:
                raise ValueError(f"data.templates: {template!r} has no {{}} for the class name")
        return self


class ViewSettings(Settings):
    """Augmentations of a training image, in this order; held-out images are resized and cropped at the centre."""

    crop_scale: tuple[Share, Share] = (0.2, 1.0)
    """Area of the random crop, as a share of the image."""
    crop_ratio: tuple[Annotated[float, Field(gt=0.0)], Annotated[float, Field(gt=0.0)]] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the random crop."""
    flip: Share = 0.5
    """Probability of a mirror image."""
    randaugment: str | None = None
    """timm's RandAugment by its config string, such as "rand-m9-mstd0.5-inc1"."""
    jitter: tuple[Strength, Strength, Strength, Annotated[float, Field(ge=0.0, le=0.5)]] | None = None
    """Random brightness, contrast, saturation, hue: torchvision's ColorJitter (ViTamin L, long schedule: .32, .32, .32, .08)."""
    jitter_prob: Share = 0.8
    """Probability that an image is jittered (open_clip's `color_jitter_prob` in ViTamin's runs)."""
    grayscale: Share = 0.0
    """Probability that an image loses its colours."""
    erase: Share = 0.0
    """Probability that a rectangle of the image is filled with noise: timm's RandomErasing, mode "pixel". For classifiers."""
    crop_pct: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Held-out images: the short side is resized to image_size / crop_pct and the centre is cropped (EVA's classifiers: 1; 0.875
    is the usual 256 for 224). It is recorded in the result, so that timm and `eva-mim evaluate` prepare images alike."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> ViewSettings:
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"view.{name}: [{low}, {high}] must rise")
        return self


class MaskSettings(Settings):
    """Masking of the student's patches."""

    kind: Literal["block", "random"] = "block"
    """"block": rectangles by BEiT's law, as EVA uses it (EVA-01/eva/masking_generator.py). "random": single patches (MAE)."""
    ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.41
    """Masked share. block: the ceiling is round(ratio * N) patches (EVA's 105 of 256 is 0.41); random: N - int(N * (1 - ratio)).
    0 masks nothing: every patch is seen and predicted (plain distillation)."""
    exact: Annotated[bool, For("kind", "block")] = False
    """Always mask as many patches as the ceiling allows (fixed shapes); EVA's law may give up a little earlier."""
    min_block: Annotated[int | None, For("kind", "block")] = Field(None, ge=1)
    """Smallest block in patches; default N / 16 (EVA's 16 of 256)."""
    min_aspect: Annotated[float, Field(gt=0.0, le=1.0), For("kind", "block")] = 0.3
    """Aspect ratios lie between this and its inverse."""

    @property
    def varies(self) -> bool:
        """Images differ in their number of masked patches."""
        return self.ratio > 0 and self.kind == "block" and not self.exact

    def masked_patches(self, patches: int) -> int:
        """Masked patches of an image with so many: always, or at most where the number varies."""
        if self.ratio == 0:
            return 0
        return max(1, round(self.ratio * patches) if self.kind == "block" else patches - int(patches * (1 - self.ratio)))
