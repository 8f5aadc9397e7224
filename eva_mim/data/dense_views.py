"""Views of an image together with its segmentation map: one scale, crop and flip for both."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from eva_mim.core.bands import Bands
from eva_mim.core.rng import isolated
from eva_mim.core.timing import phase
from eva_mim.data.sources.masks import IGNORED, Segmentation
from eva_mim.data.view_settings import DenseViewSettings
from eva_mim.data.views import to_tensor

CROPS = 10
"""Crops that are drawn until none of its classes has more than `view.max_share` (mmsegmentation's RandomCrop)."""
MAX_ASPECT = 4
"""Largest ratio of the sides of a resized image; the long side of a longer one decides (2048 to 512 in mmsegmentation's recipes
for ADE20K)."""
Pair = tuple[Tensor, Tensor]
"""Image [channels, H, W] (types of `to_tensor`), segmentation map [H, W] int16."""


def resized_size(shape: Sequence[int], short: float) -> tuple[int, int]:
    """Returns (height, width) in pixels of an image [H, W] whose short side becomes `short`, or its long side `MAX_ASPECT` times
    that, whichever is smaller."""
    height, width = shape
    factor = min(short / min(height, width), MAX_ASPECT * short / max(height, width))
    return max(1, round(factor * height)), max(1, round(factor * width))


class DenseTrainView:
    """View for training: random scale, crop, flip and colours (`DenseViewSettings`)."""

    def __init__(self, settings: DenseViewSettings, side: int, mean: Sequence[float]):
        """`side`: of the crop, in pixels; `mean`: by channel, of pixels between 0 and 1, for what lies outside an image."""
        self.settings, self.side = settings, side
        self._outside = 255 * torch.tensor(mean)[:, None, None]
        self._colours = _photometric() if settings.photometric else None

    def __call__(self, image: Image.Image | Bands, segmentation: Segmentation, rng: random.Random) -> Pair:
        """Returns image and map of `side` x `side` pixels; outside the image the map is -1."""
        pixels, truth = to_tensor(image), torch.from_numpy(segmentation)
        with phase("crop and resize"):
            size = resized_size(truth.shape, self.side * rng.uniform(*self.settings.scale))
            pixels, truth = _resized(pixels, truth, size)
            pixels, truth = self._padded(pixels, truth)
            top, left = self._corner(truth, rng)
            pixels, truth = (one[..., top : top + self.side, left : left + self.side] for one in (pixels, truth))
            if rng.random() < self.settings.flip:
                pixels, truth = pixels.flip(-1), truth.flip(-1)
        seed = rng.getrandbits(62)
        if self._colours is not None:
            with phase("augment"), isolated(seed):  # torchvision draws from torch's global generator
                pixels = self._colours(pixels)
        return pixels.contiguous(), truth.contiguous()

    def _padded(self, pixels: Tensor, truth: Tensor) -> Pair:
        """Returns image and map, enlarged to the right and below to at least `side`."""
        low, right = (max(0, self.side - length) for length in truth.shape)
        if not low and not right:
            return pixels, truth
        height, width = truth.shape
        outside = self._outside if pixels.is_floating_point() else self._outside.round()
        canvas = outside.to(pixels.dtype).repeat(1, height + low, width + right)
        canvas[:, :height, :width] = pixels
        return canvas, F.pad(truth, (0, right, 0, low), value=IGNORED)

    def _corner(self, truth: Tensor, rng: random.Random) -> tuple[int, int]:
        """Returns (top, left) of a crop."""
        for _ in range(CROPS):
            top, left = (rng.randint(0, length - self.side) for length in truth.shape)
            if self.settings.max_share == 1:
                break
            found = truth[top : top + self.side, left : left + self.side]
            counts = np.bincount(found[found >= 0].numpy())
            if len(counts) and counts.max() < self.settings.max_share * counts.sum():
                break
        return top, left


class DenseEvalView:
    """View for evaluation: the short side of the image becomes `side`, and neither is shorter; the map keeps its own size."""

    def __init__(self, side: int, multiple: int = 1, *, square: bool = False):
        """Both sides become whole numbers of `multiple`, by which `side` can be divided; the longer one is enlarged for it.
        `square`: both become `side`, whatever the aspect ratio."""
        self.side, self.multiple, self.square = side, multiple, square

    def __call__(self, image: Image.Image | Bands, segmentation: Segmentation, rng: random.Random) -> Pair:
        """Returns the resized image and the map as it is. It draws no random numbers."""
        pixels, truth = to_tensor(image), torch.from_numpy(segmentation)
        shape = (1, 1) if self.square else truth.shape
        height, width = (max(self.side, -(-length // self.multiple) * self.multiple) for length in resized_size(shape, self.side))
        with phase("crop and resize"):
            return _image_resized(pixels, (height, width)), truth


def _resized(pixels: Tensor, truth: Tensor, size: tuple[int, int]) -> Pair:
    mask = v2.functional.resize(tv_tensors.Mask(truth[None]), list(size), InterpolationMode.NEAREST_EXACT)
    return _image_resized(pixels, size), mask[0].as_subclass(Tensor)


def _image_resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    found: Tensor = v2.functional.resize(tv_tensors.Image(pixels), list(size), InterpolationMode.BILINEAR, antialias=True)
    return found.as_subclass(Tensor)


def _photometric() -> v2.Transform:
    """Returns brightness by 32 of 255, contrast and saturation by half, hue by 18 of 180 degrees (mmsegmentation)."""
    changes = ({"brightness": 32 / 255}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 18 / 180})
    return v2.Compose([v2.RandomApply([v2.ColorJitter(**change)], p=0.5) for change in changes])  # type: ignore[arg-type]
