"""Views of an image: one crop box an image, resized once for each requested size in pixels."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_eval
from torch import Tensor
from torchvision import transforms

from eva_mim.core.bands import Bands
from eva_mim.core.errors import UserError
from eva_mim.core.rng import isolated
from eva_mim.core.timing import phase
from eva_mim.data.view_settings import ViewSettings

CROP_TRIES = 10
"""Random boxes tried before a central box is used (torchvision's RandomResizedCrop)."""

Box = tuple[int, int, int, int]
Augment = Callable[[Image.Image], Image.Image]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and std by channel, of pixel values between 0 and 1."""


class TrainView:
    """View for training: random resized crop, flip and the augmentations of the settings, the same at every size.

    `pixels` are the student's mean and std, by which erased pixels become noise as the student receives it. Augmentations
    are for RGB alone.
    """

    def __init__(self, settings: ViewSettings, sizes: Sequence[int], pixels: Statistics | None = None):
        self.settings = settings
        self.sizes = list(dict.fromkeys(sizes))
        self._augment = _augmentations(settings)
        self._erase = _erasing(pixels) if settings.erase and pixels else None

    def __call__(
        self, image: Image.Image | Bands, rng: random.Random, sizes: Collection[int] | None = None
    ) -> dict[int, Tensor]:
        """Returns {side in pixels: [channels, side, side]}, with the types of `to_tensor`; of all sizes, or of some."""
        box = crop_box(image.size, self.settings.crop_scale, self.settings.crop_ratio, rng)
        mirror = rng.random() < self.settings.flip
        seed = rng.getrandbits(62)
        views = {}
        for size in self.sizes if sizes is None else dict.fromkeys(sizes):
            with phase("crop and resize"):
                # Cropped first: with resize(box=...) the filter would use pixels beyond the edge of the crop.
                view = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
                if mirror:
                    view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            with isolated(seed) if self._augment else nullcontext():  # timm and torchvision draw from the global generators
                for augment in self._augment:
                    with phase("augment"):
                        view = augment(view)  # type: ignore[arg-type]  # settings refuse them for `Bands`
            views[size] = to_tensor(view)
        if self._erase is not None and rng.random() < self.settings.erase:
            seed = rng.getrandbits(62)
            for size, pixels in views.items():
                with isolated(seed):
                    views[size] = self._erase(pixels)
        return views


class EvalView:
    """View for evaluation: timm's own transforms on Pillow, which open_clip's equal, so that their figures are these. By default
    the short side is resized to floor(size / crop_pct), then the centre is cropped."""

    def __init__(
        self, sizes: Sequence[int], crop_pct: float = 1.0, interpolation: str = "bicubic", crop_mode: str = "center"
    ):
        """`interpolation` and `crop_mode` are timm's ("squash" ignores the aspect ratio)."""
        options = {"crop_pct": crop_pct, "interpolation": interpolation, "crop_mode": crop_mode}
        self._resized = {size: transforms.Compose(transforms_imagenet_eval(size, **options).transforms[:-2])  # without tensors
                         for size in dict.fromkeys(sizes)}

    def __call__(
        self, image: Image.Image | Bands, rng: random.Random, sizes: Collection[int] | None = None
    ) -> dict[int, Tensor]:
        """Returns {side in pixels: [channels, side, side]}, with the types of `to_tensor`; of all sizes, or of some. It draws no
        random numbers."""
        views = {}
        for size in self._resized if sizes is None else dict.fromkeys(sizes):
            resized = self._resized[size]
            with phase("crop and resize"):
                view = Bands(tuple(map(resized, image.each))) if isinstance(image, Bands) else resized(image)
            views[size] = to_tensor(view)
        return views


def crop_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> Box:
    """Returns (left, top, right, bottom) in pixels of a random crop by torchvision's law (area uniform, aspect log-uniform)."""
    width, height = size
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            return left, top, left + w, top + h
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def to_tensor(image: Image.Image | Bands) -> Tensor:
    """Returns [channels, H, W] uint8, or float32 from 0 to 255 for bands of that type."""
    with phase("to tensor"):
        if isinstance(image, Bands):  # a bicubic filter leaves the range, and Pillow clips only integers
            return torch.from_numpy(np.stack([np.asarray(band) for band in image.each]).clip(0, 255))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _augmentations(settings: ViewSettings) -> list[Augment]:
    found: list[Augment] = [_randaugment(settings.randaugment)] if settings.randaugment else []
    if settings.jitter:
        found.append(transforms.RandomApply([transforms.ColorJitter(*settings.jitter)], settings.jitter_prob))
    if settings.grayscale:
        found.append(transforms.RandomGrayscale(settings.grayscale))
    return found


def _erasing(pixels: Statistics) -> Callable[[Tensor], Tensor]:
    """Returns a function that fills a rectangle of [channels, H, W] (as returned by `to_tensor`) with noise: standard normal
    after normalising, clipped to 0 .. 255."""
    erase = RandomErasing(probability=1.0, mode="pixel", device="cpu")
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in pixels)

    def erased(view: Tensor) -> Tensor:
        noisy: Tensor = erase((view - mean) / std)
        filled = (noisy * std + mean).clamp(0, 255)
        return filled if view.is_floating_point() else filled.round().to(torch.uint8)

    return erased


def _randaugment(config: str) -> Augment:
    parameters: dict[str, Any] = {"translate_const": 8, "img_mean": (124, 116, 104)}
    try:
        augment: Augment = rand_augment_transform(config, parameters)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"view.randaugment: {config!r} is not a timm RandAugment string: {error}") from None
    for operation in augment.ops:  # type: ignore[attr-defined]  # of timm's class
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Returns the image with so many bits a channel, as timm does, and a black one for 0 bits. timm asks for those at its highest
    magnitudes; Pillow gave a black image and raises ValueError since version 13."""
    return posterize(image, bits_to_keep) if bits_to_keep > 0 else image.point(lambda _: 0)
