"""Settings of views and masks: what is shown of an image, and which of its patches are hidden."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from eva_mim.core.settings import For, Settings
from eva_mim.data.source_settings import Share

Strength = Annotated[float, Field(ge=0.0)]
Factor = Annotated[float, Field(gt=0.0, le=16.0)]


class CommonViewSettings(Settings):
    """Settings that the views of all stages have."""

    seed: int | None = None
    """Seed of the views alone, so that runs of several seeds see the same ones; null: `run.seed`."""
    count: int | None = Field(None, ge=1)
    """Number of different views of an image: epoch e shows view e mod count, with a mask of its own; null: a new one in each
    epoch."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""


class ViewSettings(CommonViewSettings):
    """Augmentations of a training image, in this order; held-out images are resized and cropped at the centre."""

    crop_scale: tuple[Share, Share] = (0.2, 1.0)
    """Area of the random crop, as a share of the image."""
    crop_ratio: tuple[Annotated[float, Field(gt=0.0)], Annotated[float, Field(gt=0.0)]] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the random crop; then the flip."""
    randaugment: str | None = None
    """timm's RandAugment by its config string, such as "rand-m9-mstd0.5-inc1"."""
    jitter: tuple[Strength, Strength, Strength, Annotated[float, Field(ge=0.0, le=0.5)]] | None = None
    """Random brightness, contrast, saturation, hue: torchvision's ColorJitter (ViTamin L, long schedule: .32, .32, .32, .08)."""
    jitter_prob: Annotated[Share, For("jitter")] = 0.8
    """Probability that an image is jittered (open_clip's `color_jitter_prob` in ViTamin's runs)."""
    grayscale: Share = 0.0
    """Probability that an image loses its colours."""
    erase: Share = 0.0
    """Probability that a rectangle of the image is filled with noise (timm's RandomErasing, mode "pixel"); meant for
    classifiers."""
    crop_pct: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Crop of held-out images: the short side is resized to image_size / crop_pct, then the centre is cropped (EVA's classifiers:
    1; 0.875 is the usual 256 for 224). The value is recorded in the result, so that timm and `eva-mim evaluate` prepare images
    alike."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> ViewSettings:
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"view.{name}: [{low}, {high}] must rise")
        return self


class VideoViewSettings(ViewSettings):
    """Which frames of a video are seen, and views of them: a crop, flip and augmentation is that of all its frames."""

    crop_scale: tuple[Share, Share] = (0.5, 1.0)
    sampling: Literal["uniform", "dense"] = "uniform"
    """"uniform": a frame of each of `student.frames` equal parts of the video (TSN), in training a random one. "dense": frames
    `stride` apart, from a random one on."""
    stride: Annotated[int, For("sampling", "dense")] = Field(4, ge=1)
    """Distance of frames."""
    clips: int = Field(1, ge=1)
    """Held-out choices of frames, whose answers are averaged: uniform at other places of the parts, dense from others on."""
    crops: Literal[1, 3] = 1
    """Held-out crops of each clip: the centre, or three along the long side."""


class DenseViewSettings(CommonViewSettings):
    """Augmentations of a training image together with its segmentation map, in this order: scale, crop to `student.image_size`,
    flip, colours."""

    scale: tuple[Factor, Factor] = (0.5, 2.0)
    """Range from which the short side is drawn, as a multiple of `student.image_size` (mmsegmentation's RandomResize)."""
    max_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75
    """Largest share of a crop's labelled pixels that one class may have; else another crop is drawn, up to 10 times
    (mmsegmentation's cat_max_ratio). 1: any crop."""
    photometric: bool = False
    """Random brightness, contrast, saturation and hue, each in half of the images (mmsegmentation's PhotoMetricDistortion)."""

    @model_validator(mode="after")
    def _scale_rises(self) -> DenseViewSettings:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"view.scale: {list(self.scale)} must rise")
        return self


class MaskSettings(Settings):
    """Masking of the student's patches."""

    kind: Literal["block", "random"] = "block"
    """"block": rectangles by BEiT's law, as EVA uses it (EVA-01/eva/masking_generator.py). "random": single patches (MAE)."""
    ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.41
    """Masked share of the N patches. block: at most round(ratio * N) patches are masked (EVA's 105 of 256 is 0.41); random:
    exactly N - int(N * (1 - ratio)). 0: no patch is masked, and every patch is predicted (plain distillation)."""
    exact: Annotated[bool, For("kind", "block")] = False
    """True: the number of masked patches is always the maximum (fixed shapes). False: as in EVA's law, it may be slightly
    lower."""
    replay: bool = False
    """True: a mask belongs to its view, with the view's number and seed, and comes again with it (`view.count`); then `eva-mim
    cache --hidden` stores the masked patches alone. False: a new mask in each epoch."""
    min_block: Annotated[int | None, For("kind", "block")] = Field(None, ge=1)
    """Smallest area of a block in patches; default N / 16 (EVA's 16 of 256)."""
    min_aspect: Annotated[float, Field(gt=0.0, le=1.0), For("kind", "block")] = 0.3
    """Smallest aspect ratio of a block; the largest is its inverse."""

    @property
    def varies(self) -> bool:
        """True if the number of masked patches differs between images."""
        return self.ratio > 0 and self.kind == "block" and not self.exact

    def masked_patches(self, patches: int) -> int:
        """Returns the number of masked patches in an image of `patches` patches; the maximum, if the number varies."""
        if self.ratio == 0:
            return 0
        return max(1, round(self.ratio * patches) if self.kind == "block" else patches - int(patches * (1 - self.ratio)))
