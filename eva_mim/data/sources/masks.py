"""Semantic masks: their classes, and the class numbers of their values."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from eva_mim.core.errors import UserError
from eva_mim.core.registry import nearest
from eva_mim.core.settings import digest, few
from eva_mim.data import DataSettings, SourceSettings
from eva_mim.data.prompts import read_lines

NUMBERED = re.compile(r"(\d{1,9})(?:\s*:\s*|\s+)(\S.*)")
IGNORED = -1
"""Number of pixels that belong to no class."""
GROUND = "ground"
"""Class of what is behind the things of built-in pictures."""
T = TypeVar("T", str, int)
Segmentation = npt.NDArray[np.int16]
"""[H, W] class numbers from 0; `IGNORED` for pixels of no class."""


class MaskClasses(NamedTuple):
    """Names of the classes, and the class numbers of the values in masks."""

    names: tuple[str, ...]
    numbers: dict[int, int]
    """Value -> class number, `IGNORED` for ignored values."""

    def numbered(self, mask: npt.NDArray[np.int64]) -> Segmentation:
        """Returns the class numbers of the values [H, W] of a mask. Raises ValueError for a value that is no class."""
        top, strange = max(self.numbers) + 1, IGNORED - 1
        table = np.full(top + 1, strange, np.int16)
        table[list(self.numbers)] = list(self.numbers.values())
        found: Segmentation = table[np.where((mask < 0) | (mask > top), top, mask)]
        if (found == strange).any():
            ignored = [value for value, number in self.numbers.items() if number == IGNORED]
            raise ValueError(f"values {few(np.unique(mask[found == strange]).tolist())} belong to none of {len(self.names)} "
                             f"classes and are not ignored ({few(ignored)})")
        return found

    @property
    def fingerprint(self) -> str:
        """Digest of names and values."""
        return digest([self.names, sorted(self.numbers.items())])


class Masks(NamedTuple):
    """Semantic masks of a folder of images."""

    folder: Path
    classes: MaskClasses
    suffix: str = ".png"

    def name(self, key: str) -> str:
        """Returns the path below the folder of an image's mask."""
        return os.path.splitext(key)[0] + self.suffix


def mask_classes(settings: SourceSettings) -> MaskClasses | None:
    """Returns the classes of a source's masks; None if they are not read. Raises UserError."""
    chosen = settings.segmentation
    if chosen is None or chosen.classes is None:
        return None
    return read_mask_classes(settings.own_root / chosen.classes, chosen.ignore, chosen.label_map)


def segment_names(settings: DataSettings) -> tuple[str, ...]:
    """Returns the class names of the segmentation maps of all sources. Raises UserError for a source without maps, and for
    sources with other classes."""
    from eva_mim.data.sources.scenes import scene_segments

    found = dict[str, tuple[str, ...]]()
    for path, source in settings.sources.items():
        if source.segmentation is None:
            raise UserError(f"{path}.segmentation must be given: the segmentation maps to learn (docs/segmentation.md)")
        classes = mask_classes(source)
        found[path] = scene_segments(source.scenes) if classes is None else classes.names
    first, *others = found
    for other in others:
        if found[other] != found[first]:
            raise UserError(f"{other}.segmentation: its {len(found[other])} classes are not the {len(found[first])} of {first}")
    return found[first]


def read_mask_classes(path: Path, ignore: int, label_map: dict[str, list[str]] | None = None) -> MaskClasses:
    """Returns the classes of a file, without those whose value is `ignore`, grouped by `label_map`. Raises UserError for a file
    that is missing, empty, or names a value twice, and for groups that do not fit."""
    listed = _listed(path)
    if twice := _twice(value for value, _ in listed):
        raise UserError(f"{path}: the values {few(sorted(twice))} stand there twice")
    listed = [(value, name) for value, name in listed if value != ignore]
    if not listed:
        raise UserError(f"{path}: no classes")
    names = tuple(name for _, name in listed)
    if label_map is None:
        return MaskClasses(names, {value: number for number, (value, _) in enumerate(listed)} | {ignore: IGNORED})
    group_of = {old: number for number, group in enumerate(label_map.values()) for old in group}
    for name in group_of:
        if name not in names:
            raise UserError(f"data.segmentation.label_map: {path} has no class {name!r}{nearest(name, names)}")
    if again := _twice(old for group in label_map.values() for old in group) | (_twice(names) & group_of.keys()):
        raise UserError(f"data.segmentation.label_map: {few(sorted(again))}: twice in it, or in {path}")
    return MaskClasses(tuple(label_map), {value: group_of.get(name, IGNORED) for value, name in listed} | {ignore: IGNORED})


def _listed(path: Path) -> list[tuple[int, str]]:
    """Returns (value, name) of the classes in a file."""
    lines = read_lines(path, "classes")
    if lines and {"Idx", "Name"} <= set(lines[0].split("\t")):  # ADE20K's objectInfo150.txt
        return [(int(row["Idx"]), row["Name"]) for row in csv.DictReader(lines, delimiter="\t")]
    matches = [NUMBERED.fullmatch(line.strip()) for line in lines]
    if not any(matches):
        return [(number, line.strip()) for number, line in enumerate(lines)]
    for line, match in zip(lines, matches, strict=True):
        if match is None:
            raise UserError(f"{path}: {line.strip()[:40]!r} has no value before the name, unlike others; give each one or none")
    return [(int(match[1]), match[2]) for match in matches if match is not None]


def _twice(values: Iterable[T]) -> set[T]:
    return {value for value, count in Counter(values).items() if count > 1}
