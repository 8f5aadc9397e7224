"""The built-in dataset: textured, coloured shapes in relation, drawn with Pillow from (seed, split, index).

Nothing is downloaded and nothing is stored. Drawing uses integers and no antialiasing except a box reduction, so the pixels
are the same on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from eva_mim.core.contracts import Sample
from eva_mim.core.rng import derive
from eva_mim.core.settings import digest
from eva_mim.data import SourceSettings
from eva_mim.data.source_settings import SceneSettings
from eva_mim.data.sources.masks import GROUND, Segmentation
from eva_mim.data.sources.videos import DrawnFrames

SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross")
TEXTURES = ("plain", "striped", "dotted", "checked")
COLOURS = {
    "red": (214, 52, 48),
    "green": (58, 160, 72),
    "blue": (52, 92, 208),
    "yellow": (232, 200, 48),
    "purple": (140, 64, 170),
    "orange": (238, 134, 38),
    "white": (240, 240, 240),
    "black": (24, 24, 28),
}
RELATIONS = ("left of", "right of", "above", "below")
DIRECTIONS = ("left", "right", "up", "down")
"""Classes of moving pictures."""
OVERSAMPLE = 2
"""Factor by which pictures are drawn larger, before they are reduced by averaging."""


class Thing(NamedTuple):
    shape: str
    texture: str
    colour: str


class SceneSource:
    """Pictures of two things each; the first thing determines the label."""

    blocks = None

    def __init__(self, settings: SceneSettings, split: str, *, maps: bool = False, frames: int | None = None):
        """`maps`: pictures come with their segmentation maps; `frames`: they are videos of so many frames."""
        self.settings, self.split, self.maps, self.frames = settings, split, maps, frames
        self.fingerprint = digest([settings.model_dump(), split, *([] if frames is None else [frames])])
        self.classes: tuple[str, ...] | None = scene_classes(settings) if frames is None else DIRECTIONS
        self._size = settings.train if split == "train" else settings.val

    def __len__(self) -> int:
        return self._size

    def key(self, index: int) -> str:
        """Returns SPLIT/INDEX."""
        return f"{self.split}/{index}"

    def unlabelled(self) -> Sequence[int]:
        """Returns nothing: every picture has a label."""
        return ()

    def prefetch(self, indices: Sequence[int]) -> None:
        """Does nothing: pictures are drawn on demand."""

    def read(self, index: int) -> Sample:
        """Draws picture `index`; returns it with its caption and label."""
        if self.frames is not None:
            return self._video(index, self.frames)
        rng = random.Random(derive(self.settings.seed, f"scenes-{self.split}", index))
        ground, first_colour, second_colour = rng.sample(list(COLOURS), 3)
        first = Thing(rng.choice(SHAPES), rng.choice(TEXTURES), first_colour)
        second = Thing(rng.choice(SHAPES), rng.choice(TEXTURES), second_colour)
        relation = rng.choice(RELATIONS)
        assert self.classes is not None
        numbers = [self.classes.index(self._class_of(thing)) for thing in (first, second)]
        image, segmentation = draw(first, second, relation, ground, self.settings.size, rng, numbers)
        # If captions always named both colours, two words would distinguish most pairs, and shapes would not be learned.
        colour = f"{first.colour} " if rng.random() < 0.5 else ""
        caption = f"a {colour}{first.texture} {first.shape} {relation} a {second.shape}"
        return Sample(self.key(index), image, numbers[0], (caption,), segmentation if self.maps else None)

    def _video(self, index: int, frames: int) -> Sample:
        rng = random.Random(derive(self.settings.seed, f"videos-{self.split}", index))
        label = rng.randrange(len(DIRECTIONS))
        return Sample(self.key(index), moving(label, frames, self.settings.size, rng), label)

    def _class_of(self, thing: Thing) -> str:
        return f"{thing.texture} {thing.shape}" if self.settings.labels == "fine" else thing.shape


def scene_classes(settings: SceneSettings) -> tuple[str, ...]:
    """Returns the class names by label."""
    fine = tuple(f"{texture} {shape}" for texture in TEXTURES for shape in SHAPES)
    return fine if settings.labels == "fine" else SHAPES


def scene_segments(settings: SceneSettings) -> tuple[str, ...]:
    """Returns the class names of segmentation maps by number: the ground, and those of the labels."""
    return (GROUND, *scene_classes(settings))


def open_scenes(settings: SourceSettings, split: str) -> SceneSource:
    """Returns the source of a split ("train" or "val")."""
    return SceneSource(settings.scenes, split, maps=settings.segmentation is not None,
                       frames=None if settings.video is None else settings.video.length)


def moving(direction: int, frames: int, size: int, rng: random.Random) -> DrawnFrames:
    """Returns a video of a thing that moves in one of `DIRECTIONS` from one edge to the other. Whatever the direction, it is
    equally often everywhere, so that a frame tells nothing unless one knows when it was."""
    side = size * OVERSAMPLE
    ground, colour = rng.sample(list(COLOURS), 2)
    thing, length = Thing(rng.choice(SHAPES), rng.choice(TEXTURES), colour), side * rng.randint(30, 45) // 100
    behind, across = _ground(ground, side, rng), rng.randint(0, side - length)
    texture, stencil = _texture(thing, length), _stencil(thing, length)
    backward, upright = DIRECTIONS[direction] in ("left", "up"), DIRECTIONS[direction] in ("up", "down")

    def frame(number: int) -> Image.Image:
        image, along = behind.copy(), (side - length) * number // max(1, frames - 1)
        along = side - length - along if backward else along
        image.paste(texture, (across, along) if upright else (along, across), stencil)
        return image.reduce(OVERSAMPLE)

    return DrawnFrames(frames, frame)


def draw(
    first: Thing, second: Thing, relation: str, ground: str, size: int, rng: random.Random, classes: Sequence[int]
) -> tuple[Image.Image, Segmentation]:
    """Returns a `size` x `size` RGB picture, whose first thing is the larger one, and its segmentation map: 0 for the ground, for
    a thing its number in `classes` and 1. A pixel at an edge belongs to what its upper left quarter shows."""
    side = size * OVERSAMPLE
    image = _ground(ground, side, rng)
    big, small = side * rng.randint(50, 62) // 100, side * rng.randint(22, 28) // 100
    near, far = _places(relation, side, big, small, rng)
    numbers = Image.new("L", (side, side))
    for thing, corner, length, number in ((second, far, small, classes[1]), (first, near, big, classes[0])):
        stencil = _stencil(thing, length)
        image.paste(_texture(thing, length), corner, stencil)
        numbers.paste(number + 1, (*corner, corner[0] + length, corner[1] + length), stencil)
    return image.reduce(OVERSAMPLE), np.asarray(numbers)[::OVERSAMPLE, ::OVERSAMPLE].astype(np.int16)


def _ground(colour: str, side: int, rng: random.Random) -> Image.Image:
    shade = tuple(channel // 2 + rng.randint(24, 72) for channel in COLOURS[colour])
    image = Image.new("RGB", (side, side), shade)
    pen = ImageDraw.Draw(image)
    for _ in range(12):  # an irregular background of low contrast, so that empty patches differ
        x, y, length = rng.randrange(side), rng.randrange(side), rng.randrange(side // 8, side // 2)
        tint = tuple(max(0, min(255, channel + rng.randint(-14, 14))) for channel in shade)
        pen.rectangle((x, y, x + length, y + length // 3), fill=tint)
    return image


def _places(
    relation: str, side: int, big: int, small: int, rng: random.Random
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the (left, top) corners of the first (big) and the second (small) thing, in pixels."""
    start, end = rng.randint(0, side // 16), side - small - rng.randint(0, side // 16)
    across_big, across_small = rng.randint(0, side - big), rng.randint(0, side - small)
    if relation in ("right of", "below"):
        start, end = side - big - start, side - small - end
    if relation in ("left of", "right of"):
        return (start, across_big), (end, across_small)
    return (across_big, start), (across_small, end)


def _stencil(thing: Thing, size: int) -> Image.Image:
    stencil = Image.new("1", (size, size))
    _outline(ImageDraw.Draw(stencil), thing.shape, size)
    return stencil


def _outline(pen: ImageDraw.ImageDraw, shape: str, size: int) -> None:
    last, half, third = size - 1, size // 2, size // 3
    if shape == "circle":
        pen.ellipse((0, 0, last, last), fill=1)
    elif shape == "square":
        pen.rectangle((size // 12, size // 12, last - size // 12, last - size // 12), fill=1)
    elif shape == "triangle":
        pen.polygon([(half, 0), (last, last), (0, last)], fill=1)
    elif shape == "diamond":
        pen.polygon([(half, 0), (last, half), (half, last), (0, half)], fill=1)
    elif shape == "ring":
        pen.ellipse((0, 0, last, last), fill=1)
        pen.ellipse((third - size // 12, third - size // 12, last - third + size // 12, last - third + size // 12), fill=0)
    else:
        pen.rectangle((third, 0, last - third, last), fill=1)
        pen.rectangle((0, third, last, last - third), fill=1)


def _texture(thing: Thing, size: int) -> Image.Image:
    colour = COLOURS[thing.colour]
    other = tuple((channel + 255) // 2 if sum(colour) < 384 else channel // 2 for channel in colour)
    swatch = Image.new("RGB", (size, size), colour)
    pen = ImageDraw.Draw(swatch)
    step = max(2, size // 6)
    if thing.texture == "striped":
        for y in range(0, size, 2 * step):
            pen.rectangle((0, y, size, y + step - 1), fill=other)
    elif thing.texture == "dotted":
        for y in range(step // 2, size, 2 * step):
            for x in range(step // 2, size, 2 * step):
                pen.ellipse((x, y, x + step, y + step), fill=other)
    elif thing.texture == "checked":
        for y in range(0, size, step):
            for x in range((y // step % 2) * step, size, 2 * step):
                pen.rectangle((x, y, x + step - 1, y + step - 1), fill=other)
    return swatch
