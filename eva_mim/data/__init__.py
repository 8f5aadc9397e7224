"""Images in, batches out. This file holds the settings; the parts are imported when used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from eva_mim.config import Settings

Share = Annotated[float, Field(ge=0.0, le=1.0)]


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


class DataSettings(Settings):
    """Where images, labels and captions come from."""

    source: str = "folder"
    """"scenes" (built in), "folder" (class folders or a flat folder) or "shards" (.tar, .tar.gz)."""
    root: Path | None = None
    """Folder of the dataset."""
    train: str | None = None
    """folder: sub-folder with the training images; shards: file pattern such as "train-*.tar"."""
    val: str | None = None
    """The same for held-out images; without it `val_share` of `train` is held out."""
    val_share: Share = 0.05
    """Share of the training images held out when `val` is not given."""
    classes: str | None = None
    """shards: file in `root` with one class name a line, by label."""
    label_map: dict[str, list[str]] | None = None
    """New class -> old classes: trains on groups of the dataset's own classes."""
    templates: list[str] = Field(default=["a photo of a {}."], min_length=1)
    """Captions for labelled images without one ("{}" is the class name); also the zero-shot prompts."""
    expected: int | None = Field(None, ge=1)
    """Number of training images that the recipe was written for; a source with another number is refused."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many training images."""
    val_limit: int | None = Field(None, ge=1)
    """Use only the first so many held-out images."""
    scenes: SceneSettings = SceneSettings()
    workers: int = Field(1, ge=0)
    """Loader processes of each rank; no result depends on it."""
    max_broken: Share = 0.01
    """The run stops when more than this share of the images read is broken."""

    @model_validator(mode="after")
    def _root_is_given(self) -> DataSettings:
        if self.source != "scenes" and self.root is None:
            raise ValueError(f"data.root must be given when data.source is {self.source!r}")
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(f"data.templates: {template!r} has no {{}} for the class name")
        return self


class ViewSettings(Settings):
    """What is done to a training image. Held-out images are resized and cropped at the centre."""

    crop_scale: tuple[Share, Share] = (0.2, 1.0)
    """Area of the random crop, as a share of the image."""
    crop_ratio: tuple[Annotated[float, Field(gt=0.0)], Annotated[float, Field(gt=0.0)]] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the random crop."""
    flip: Share = 0.5
    """Probability of a mirror image."""
    randaugment: str | None = None
    """timm's RandAugment by its config string, such as "rand-m9-mstd0.5-inc1"."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> ViewSettings:
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"view.{name}: [{low}, {high}] must rise")
        return self


class MaskSettings(Settings):
    """Which patches the student does not see."""

    kind: Literal["block", "random"] = "block"
    """"block": rectangles by BEiT's law, as EVA uses it (EVA-01/eva/masking_generator.py). "random": single patches (MAE)."""
    ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.41
    """Masked share. block: the ceiling is round(ratio * N) patches (EVA's 105 of 256 is 0.41); random: N - int(N * (1 - ratio)).
    0 masks nothing: every patch is seen and predicted (plain distillation)."""
    exact: bool = False
    """block: always mask as many patches as the ceiling allows (fixed shapes); EVA's law may give up a little earlier."""
    min_block: int | None = Field(None, ge=1)
    """block: smallest block in patches; default N / 16 (EVA's 16 of 256)."""
    min_aspect: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """block: aspect ratios lie between this and its inverse."""

    @property
    def varies(self) -> bool:
        """Images differ in their number of masked patches."""
        return self.ratio > 0 and self.kind == "block" and not self.exact

    def masked_patches(self, patches: int) -> int:
        """Masked patches of an image with so many: always, or at most where the number varies."""
        if self.ratio == 0:
            return 0
        return max(1, round(self.ratio * patches) if self.kind == "block" else patches - int(patches * (1 - self.ratio)))
