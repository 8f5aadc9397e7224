"""Test sets of ImageNet classifiers in their usual folders: their images, the competing classes, and the correct ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eva_mim.core.bands import Bands
from eva_mim.core.contracts import Source
from eva_mim.core.errors import UserError
from eva_mim.core.settings import few
from eva_mim.data.class_lists import class_id, layout_classes, layout_of, positions, table
from eva_mim.data.sources.folder import FolderSource
from eva_mim.data.subset import Subset

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from eva_mim.data.preparation import View

TARGET = "imagenet-1k"
REAL_FILE = "real.json"
REAL_TABLE = "imagenet_real_labels.json"
"""timm's copy of the ReaL labels (Beyer et al. 2020): a list of class numbers for each validation image, some of them empty."""
OBJECTNET_BORDER = 1
"""Width in pixels of the red frame around every image of ObjectNet, which its authors ask users to cut off."""


class Variant(NamedTuple):
    """Test set for a classifier."""

    name: str
    source: Source
    """Images of the test set; their labels are positions in `answers`."""
    answers: tuple[tuple[int, ...], ...]
    """Correct classes by label, as positions in `classes`."""
    classes: tuple[str, ...]
    """Classes that compete; other outputs of a head are ignored."""
    left_out: int = 0
    """Number of images in the folder that have no answer."""
    border: int = 0
    """Pixels to cut off at each edge of an image."""


def _labelled(files: FolderSource, labels: Sequence[int | None]) -> Subset:
    """Returns the images of a folder with the labels of a test set; images with label None are left out."""
    chosen = [index for index, label in enumerate(labels) if label is not None]
    return Subset(files, np.array(chosen, np.int64), labels=[label for label in labels if label is not None])


def without_border(border: int, view: View, image: Image | Bands, rng: random.Random) -> dict[int, Tensor]:
    """Returns the view of an image without `border` pixels at each of its edges, {side in pixels: [channels, side, side]}."""
    width, height = image.size
    views: dict[int, Tensor] = view(image.crop((border, border, width - border, height - border)), rng)
    return views


def open_variant(name: str, folder: Path, own: tuple[str, ...]) -> Variant:
    """Returns the test set `name` of VARIANTS in `folder`, for a head with the classes `own`. Raises UserError for an unknown
    name, missing or unknown class folders, and tables that do not fit."""
    if name not in VARIANTS:
        raise UserError(f"--on {name}={folder}: no such test set; known: {', '.join(VARIANTS)}")
    if not folder.is_dir():
        raise UserError(f"--on {name}={folder}: not a folder")
    return VARIANTS[name](name, folder, own)


def _val(name: str, folder: Path, own: tuple[str, ...]) -> Variant:
    """Opens a test set of class folders. The classes of the head compete, or those of the folders' layout if it is another one
    (1k folders for a 21k head)."""
    files = FolderSource(folder, None)
    found = sorted({_class_folder(files, index) for index in range(len(files))})
    other = layout_of(found)
    classes = own if other is None or other == layout_of(own) else tuple(found)
    return _by_folder(name, files, {class_id(given): label for label, given in enumerate(classes)}, classes)


def _v2(name: str, folder: Path, own: tuple[str, ...]) -> Variant:
    """Opens ImageNet-V2, whose folders have the numbers of the classes as names (sorted as text, "10" comes before "2")."""
    classes = layout_classes(TARGET)
    return _by_folder(name, FolderSource(folder, None), {str(label): label for label in range(len(classes))}, classes)


def _synsets(layout: str) -> Callable[[str, Path, tuple[str, ...]], Variant]:
    """Returns a function that opens a test set of one folder a synset; only the classes of `layout` compete."""

    def opened(name: str, folder: Path, own: tuple[str, ...]) -> Variant:
        classes = layout_classes(layout)
        return _by_folder(name, FolderSource(folder, None), {given: label for label, given in enumerate(classes)}, classes)

    return opened


def _by_folder(name: str, files: FolderSource, label_of: dict[str, int], classes: tuple[str, ...]) -> Variant:
    folders = [_class_folder(files, index) for index in range(len(files))]
    missing, extra = sorted(label_of.keys() - set(folders)), sorted(set(folders) - label_of.keys())
    if missing or extra:
        faults = [f"{len(names)} {what}: {few(names)}" for what, names in (("missing", missing), ("not known", extra)) if names]
        raise UserError(f"--on {name}={files.folder}: expected {len(label_of)} class folders with images; {'; '.join(faults)}")
    source = _labelled(files, [label_of[folder] for folder in folders])
    return Variant(name, source, tuple((label,) for label in range(len(classes))), classes)


def _class_folder(files: FolderSource, index: int) -> str:
    first, slash, _ = files.key(index).partition("/")
    return class_id(first) if slash else "."


def _real(name: str, folder: Path, own: tuple[str, ...]) -> Variant:
    """Opens the validation images with the ReaL labels, all classes that annotators agreed on (`real.json` in the folder, else
    timm's copy), in the order of the images' file names."""
    table_file = folder / REAL_FILE if (folder / REAL_FILE).is_file() else table(REAL_TABLE)
    files, real, classes = FolderSource(folder, None), _json(table_file), layout_classes(TARGET)
    if not isinstance(real, list) or not all(
        isinstance(row, list) and all(type(label) is int and 0 <= label < len(classes) for label in row) for row in real
    ):
        raise UserError(f"{table_file}: expected a list of class numbers below {len(classes)} for each image")
    if len(real) != len(files):
        raise UserError(f"--on {name}={folder}: {len(files)} images, but {table_file} has labels for {len(real)}")
    order = sorted(range(len(files)), key=lambda index: files.key(index).rpartition("/")[2])
    answers = list(dict.fromkeys(tuple(row) for row in real if row))
    label_of = {row: label for label, row in enumerate(answers)}
    labels: list[int | None] = [None] * len(files)
    for index, row in zip(order, real, strict=True):
        labels[index] = label_of.get(tuple(row))
    source = _labelled(files, labels)
    return Variant(name, source, tuple(answers), classes, len(files) - len(source))


def _objectnet(first_only: bool) -> Callable[[str, Path, tuple[str, ...]], Variant]:
    """Returns a function that opens ObjectNet, with one folder an object. The tables in `mappings` assign one or more classes of
    1k to an object, or none; all 1,000 classes compete. With `first_only`, as in the original EVA (objectnet_dataset.py), only
    the first class of an object is correct."""

    def opened(name: str, folder: Path, own: tuple[str, ...]) -> Variant:
        home = folder if (folder / "mappings").is_dir() else folder.parent
        objects = object_classes(home / "mappings")
        files = FolderSource(home / "images" if home == folder else folder, None)
        folders = [files.key(index).partition("/")[0] for index in range(len(files))]
        if missing := sorted(objects.keys() - set(folders)):
            raise UserError(f"--on {name}={folder}: {len(missing)} of {len(objects)} class folders are missing: {few(missing)}")
        label_of = {given: label for label, given in enumerate(objects)}
        source = _labelled(files, [label_of.get(given) for given in folders])
        answers = tuple(right[:1] if first_only else right for right in objects.values())
        return Variant(name, source, answers, layout_classes(TARGET), len(files) - len(source), OBJECTNET_BORDER)

    return opened


def object_classes(mappings: Path) -> dict[str, tuple[int, ...]]:
    """Returns {folder of ObjectNet: numbers of its classes in 1k} of the objects that have any. Raises UserError for missing or
    inconsistent tables."""
    name_of, classes_of, line_of = (
        _json(mappings / f"{file}.json")
        for file in ("folder_to_objectnet_label", "objectnet_to_imagenet_1k", "pytorch_to_imagenet_2012_id")
    )
    lines = _text(mappings / "imagenet_to_label_2012_v2").splitlines()
    try:
        number_of = {lines[int(line)].strip(): int(number) for number, line in line_of.items()}
        return {
            folder: tuple(number_of[name.strip()] for name in classes_of[given].split("; "))
            for folder, given in name_of.items() if given in classes_of
        }
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{mappings}: the tables of ObjectNet do not fit together: {error!r}") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def columns(variant: Variant, own: tuple[str, ...]) -> list[int]:
    """Returns the outputs of a head with the classes `own` that compete, as numbers in the order of `variant.classes`. Raises
    UserError if the head lacks one."""
    places = positions(variant.classes, own)
    missing = [name for name, place in zip(variant.classes, places, strict=True) if place is None]
    if missing:
        raise UserError(f"{variant.name}: the head has no output for {len(missing)} of {len(places)} classes: {few(missing)}")
    return [place for place in places if place is not None]


VARIANTS: dict[str, Callable[[str, Path, tuple[str, ...]], Variant]] = {
    "val": _val,
    "v2": _v2,
    "real": _real,
    "a": _synsets("imagenet-a"),
    "r": _synsets("imagenet-r"),
    "sketch": _synsets(TARGET),
    "objectnet": _objectnet(first_only=False),
    "objectnet-first": _objectnet(first_only=True),
}
"""Name of a test set on the command line -> function that opens its folder."""
