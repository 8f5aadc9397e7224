"""Images with semantic masks: pairs of files in two folders, and the classes of the masks' values.

    DIR/images/PATH.jpg
    DIR/annotations/PATH.png    or DIR/masks/PATH.png: one channel, or a palette whose numbers are the values
    DIR/classes.txt             a class a line; its value is the line's number from 0, or stands before the name ("17 cat")

As in ADE20K, PATH may begin with the split's folder, such as validation/.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from eva_mim.core.errors import UserError
from eva_mim.core.settings import few
from eva_mim.data.prompts import read_lines
from eva_mim.data.sources.decode import decoded_mask, read_file
from eva_mim.data.sources.folder import FolderSource

IMAGES, MASKS = "images", ("annotations", "masks")
IGNORED = 255
"""Value of pixels that belong to no class (PASCAL VOC, ADE20K)."""
NUMBERED = re.compile(r"(\d+)\s+(\S.*)")
Mask = npt.NDArray[np.int64]


class MaskClasses(NamedTuple):
    """Names of the classes, and the values that stand for them in masks."""

    names: tuple[str, ...]
    values: tuple[int, ...]

    def labels(self, mask: Mask, ignore: int) -> Mask:
        """Returns [H, W] class numbers from 0, -1 for ignored pixels. Raises ValueError for a value that is no class."""
        table = np.full(int(max(*self.values, int(mask.max(initial=0)), ignore)) + 1, -2, np.int64)
        table[list(self.values)] = np.arange(len(self.values))
        table[ignore] = -1
        found: Mask = table[mask]
        if (found == -2).any():
            strange = np.unique(mask[found == -2])
            raise ValueError(f"values {few(strange.tolist())} belong to none of {len(self.names)} classes and are not ignored "
                             f"({ignore})")
        return found


def read_mask_classes(path: Path) -> MaskClasses:
    """Returns the classes of a file. Raises UserError for one that is missing, empty, or names a value twice."""
    lines = read_lines(path, "classes")
    numbered = [NUMBERED.fullmatch(line.strip()) for line in lines]
    if all(numbered):
        found = [(int(match[1]), match[2]) for match in numbered if match is not None]
    else:
        found = [(number, line.strip()) for number, line in enumerate(lines)]
    if not found:
        raise UserError(f"{path}: no classes")
    values, names = zip(*found, strict=True)
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise UserError(f"{path}: the values {few(twice)} stand there twice")
    return MaskClasses(tuple(names), tuple(values))


class PairSource:
    """Images and their masks, in the order of the images' paths."""

    def __init__(self, root: Path):
        """Raises UserError for folders that are missing, and for images without a mask."""
        masks = next((root / name for name in MASKS if (root / name).is_dir()), None)
        if not (root / IMAGES).is_dir() or masks is None:
            raise UserError(f"{root}: expected folders {IMAGES} and {' or '.join(MASKS)}")
        self.images, self.masks = FolderSource(root / IMAGES, None), masks
        without = [key for key in map(self.images.key, range(len(self.images))) if not self._mask_of(key).is_file()]
        if without:
            raise UserError(f"{root}: {len(without)} of {len(self.images)} images have no mask in {masks.name}/, such as "
                            f"{without[0]}")

    def __len__(self) -> int:
        return len(self.images)

    def key(self, index: int) -> str:
        """Returns the image's path below the folder of images."""
        return self.images.key(index)

    def _mask_of(self, key: str) -> Path:
        return (self.masks / key).with_suffix(".png")

    def read(self, index: int) -> tuple[Image.Image, Mask]:
        """Returns image and mask [H, W] of one size. Raises ValueError and OSError for files that cannot be used."""
        key = self.key(index)
        image = self.images.read(index).image
        assert isinstance(image, Image.Image)
        try:
            mask = decoded_mask(read_file(self._mask_of(key)))
        except UnidentifiedImageError:
            raise ValueError(f"the mask of {key} is no image") from None
        except ValueError as error:
            raise ValueError(f"the mask of {key} {error}") from None
        if mask.shape != (image.height, image.width):
            raise ValueError(f"{key} has {image.width} x {image.height} pixels, its mask {mask.shape[1]} x {mask.shape[0]}")
        return image, mask
