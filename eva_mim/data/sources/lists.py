"""Lists of images with captions and labels: CSV, TSV, JSON lines, Parquet."""

from __future__ import annotations

import csv
import json
import os
import time
from array import array
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from eva_mim.core.errors import UserError
from eva_mim.core.files import sha256
from eva_mim.core.registry import nearest
from eva_mim.core.settings import digest
from eva_mim.data import RGB, Pixels, SourceSettings
from eva_mim.data.class_lists import known_as
from eva_mim.data.prompts import class_file
from eva_mim.data.source_settings import ColumnSettings
from eva_mim.data.sources.captions import as_captions
from eva_mim.data.sources.decode import ARRAYS, SUFFIXES, FileSource, Raw, read_file
from eva_mim.data.sources.index import Column, Content, Index, Texts, narrow, open_index, say_indexed
from eva_mim.data.sources.masks import MaskClasses, mask_classes
from eva_mim.data.sources.videos import require_decoder

Rows = Iterator[tuple[int, dict[str, Any]]]
"""Pairs of a line or row number and its {column: value}."""
PROBED = 100
"""Number of images of which at least one must exist at the start; checking every image would be slow on network disks."""


class ListSource(FileSource):
    """Images of one list, in its order. Keys are the paths as written in the list."""

    blocks = None

    def __init__(
        self, path: Path, root: Path, columns: ColumnSettings, classes: tuple[str, ...] | None, pixels: Pixels = RGB,
        mask_classes: MaskClasses | None = None,
    ):
        """`classes`: class names by label; the label column holds names, or numbers if no value is a name. Every rank must call.
        Raises UserError for mistakes of the list, and if none of its first images exists."""
        self.classes, self._pixels = classes if columns.label is not None else None, pixels
        self.index = list_index(path, root, columns)
        self.fingerprint, self.mask_classes = self.index.facts["fingerprint"], mask_classes
        if mask_classes is not None:
            self.fingerprint = digest([self.fingerprint, mask_classes.fingerprint])
        self.folder, self._captioned = path.parent, bool(caption_columns(columns))
        if not any((self.folder / self.key(row)).is_file() for row in range(min(PROBED, len(self)))):
            raise UserError(f"{path}: none of its first {min(PROBED, len(self))} images exists; paths are relative to the list: "
                            f"{self.folder / self.key(0)}")
        self._labels = _labels(path, self.index, self.classes) if self.classes else None

    def __len__(self) -> int:
        return len(self.index["image.ends"])

    def key(self, index: int) -> str:
        """Returns the image's path, relative to the list's folder."""
        return self.index.text("image", index)

    def raw(self, index: int) -> Raw:
        """Reads one image file, and its captions from the index. Raises OSError, and ValueError for a too large file."""
        label = self._labels[self.index["label"][index]] if self._labels else None
        captions = self._captions(index) if self._captioned else ()
        mask = read_file(self.folder / self.index.text("mask", index)) if self.mask_classes else None
        return Raw(self.key(index), read_file(self.folder / self.key(index)), label, captions, mask)

    def class_counts(self) -> Column | None:
        """Returns [K] int64, the number of images of each class; None without classes."""
        if self._labels is None:
            return None
        found = np.bincount(self.index["label"], minlength=len(self._labels))
        return np.bincount(self._labels, found, minlength=len(self.classes or ())).astype(np.int64)

    def _captions(self, index: int) -> tuple[str, ...]:
        ends = self.index["captions"]
        return tuple(self.index.text("caption", row) for row in range(int(ends[index - 1]) if index else 0, int(ends[index])))


def open_list(settings: SourceSettings, split: str) -> ListSource | None:
    """Returns the source of a split ("train" or "val"); None if the split has no list of its own. Raises UserError for an
    unusable list."""
    if settings.train is None:
        raise UserError("data.train must name the list's file when data.source is 'list'")
    name = settings.train if split == "train" else settings.val
    if name is None:
        return None
    classes, root = class_file(settings), settings.own_root
    if classes is None and settings.columns.label is not None:  # the training list alone decides the labels
        classes = sorted_names(root / settings.train, list_index(root / settings.train, root, settings.columns), settings.columns)
    source = ListSource(root / name, root, settings.columns, classes, settings.pixels, mask_classes(settings))
    if settings.video is not None:
        require_decoder()
        source.videos = True
    return source


def list_index(path: Path, root: Path, columns: ColumnSettings) -> Index:
    """Returns the index of a list. Columns: path of each `image`; all texts (`caption`) and where those of each image end
    (`captions`); number of each image's `label` among the distinct values (`labels`), whose first rows are `labels.row`. Raises
    UserError for every mistake of the list."""
    if not path.is_file():
        raise UserError(f"data: the list {path} does not exist")

    def stamp() -> str:
        return f"{path.stat().st_size} {path.stat().st_mtime_ns}"

    def make() -> Content:
        now, began = stamp(), time.monotonic()
        content = _read(path, root, columns)
        say_indexed(str(path), len(content.columns["image.ends"]), time.monotonic() - began)
        return content._replace(facts={"fingerprint": sha256(path), "stamp": now})

    name = ["list", str(path.absolute()), str(root.absolute()), columns.model_dump()]
    return open_index(name, lambda index: index.facts["stamp"] == stamp(), make, str(path))


def _read(path: Path, root: Path, columns: ColumnSettings) -> Content:
    images, captions, labels, masks = Texts(), Texts(), Texts(), Texts()
    ends, chosen, first, number = array("Q"), array("I"), array("Q"), dict[str, int]()
    for row_number, row in read_list(path, columns):
        where = f"{path}:{row_number}"
        images.add(_inside(row[columns.image], root, path.parent, where))
        if columns.mask is not None:
            masks.add(_inside(row[columns.mask], root, path.parent, where))
        for text in _captions(row, columns, where):
            captions.add(text)
        ends.append(len(captions))
        if columns.label is not None:
            value = "" if row[columns.label] is None else str(row[columns.label])
            if value not in number:
                number[value] = len(number)
                labels.add(value)
                first.append(row_number)
            chosen.append(number[value])
    if not len(images):
        raise UserError(f"{path}: no images in this list")
    own = {"captions": narrow(np.frombuffer(ends, np.uint64)), "label": np.frombuffer(chosen, np.uint32),
           "labels.row": np.frombuffer(first, np.uint64)}
    own |= masks.columns("mask") if columns.mask is not None else {}
    return Content(own | images.columns("image") | captions.columns("caption") | labels.columns("labels"), {})


def read_list(path: Path, columns: ColumnSettings) -> Rows:
    """Returns the rows of a file that exists. Raises UserError for a malformed file or a missing column, some while rows are
    read."""
    reader = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: a list must be .csv, .tsv, .jsonl or .parquet")
    wanted = {"image": [columns.image], "captions": caption_columns(columns), "label": [columns.label] if columns.label else [],
              "mask": [columns.mask] if columns.mask else []}
    names, rows = reader(path, [name for group in wanted.values() for name in group])
    for setting, group in wanted.items():
        for name in group:
            if name not in names:
                hint = nearest(name, names, cutoff=0.5) or ";"
                raise UserError(f"data.columns.{setting}: {path} has no column {name!r}{hint} columns: {', '.join(names)}")
    return rows


def caption_columns(columns: ColumnSettings) -> list[str]:
    """Returns the names of the columns with captions."""
    return [columns.captions] if isinstance(columns.captions, str) else list(columns.captions or ())


def _csv(path: Path, wanted: list[str]) -> tuple[list[str], Rows]:
    def rows() -> Rows:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                header = file.readline()
                file.seek(0)
                # Some .csv files are separated by tabs or semicolons; captions are full of commas, a header is not.
                delimiter = max(",\t;", key=header.count)
                reader = csv.reader(file, delimiter=delimiter, strict=True)
                names = next(reader, [])
                yield 1, dict.fromkeys(names)
                for row in reader:
                    if row and len(row) != len(names):
                        raise UserError(f"{path}:{reader.line_num}: {len(row)} fields under {len(names)} columns")
                    for field in row:
                        if "\n" in field and (other := _row_inside(field, delimiter, len(names))):
                            first = reader.line_num - sum(text.count("\n") for text in row)
                            raise UserError(f"{path}:{first}: a field in quotes ends in line {reader.line_num} and holds what "
                                            f"looks like another row ({other[:80]}). A quote inside a field is written twice, "
                                            "and a field with one stands in quotes itself")
                    if row:
                        yield reader.line_num, dict(zip(names, row, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a readable list: {error}") from None

    found = rows()
    return list(next(found)[1]), found


def _row_inside(field: str, delimiter: str, count: int) -> str:
    """Returns the first line within a field that has the fields of a row, one of them the path of an image; empty if there is
    none. A single stray quote takes in all rows up to the next one."""
    for line in field.splitlines()[1:]:
        fields = next(csv.reader([line], delimiter=delimiter), [])
        if len(fields) == count > 1 and any(os.path.splitext(one)[1].lower() in (*SUFFIXES, *ARRAYS) for one in fields):
            return line
    return ""


def _jsonl(path: Path, wanted: list[str]) -> tuple[list[str], Rows]:
    def rows() -> Rows:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}:{number}: not a line of JSON: {error}") from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: expected {{column: value}}, found {type(row).__name__}")
                yield number, row

    found = rows()
    first = next(found, None)
    if first is None:
        raise UserError(f"{path}: no images in this list")
    return list(first[1]), ((number, dict.fromkeys(wanted) | row) for number, row in chain([first], found))


def _parquet(path: Path, wanted: list[str]) -> tuple[list[str], Rows]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow; install it with: pip install 'eva-mim[parquet]'") from None
    try:
        file = parquet.ParquetFile(path)
        names = list(file.schema_arrow.names)
    except (ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from None

    def rows() -> Rows:
        try:
            batches = file.iter_batches(columns=[name for name in wanted if name in names])
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
        except (ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable Parquet file: {error}") from None

    return names, rows()


def _inside(value: Any, root: Path, folder: Path, where: str) -> str:
    """Returns the path as written. Raises UserError if it is no path or not below `root`."""
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: no image path ({value!r})")
    if not Path(os.path.normpath(folder / value)).is_relative_to(os.path.normpath(root)):
        raise UserError(f"{where}: {value} is outside data.root={root}; to allow it, set data.root to a folder above both")
    return value


def _captions(row: dict[str, Any], columns: ColumnSettings, where: str) -> tuple[str, ...]:
    names = caption_columns(columns)
    try:
        found = tuple(text for name in names for text in as_captions(row[name]))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if names and (not found or "" in found):
        raise UserError(f"{where}: {'an empty caption' if found else 'no captions'} ({', '.join(names)})")
    return found


def sorted_names(path: Path, index: Index, columns: ColumnSettings) -> tuple[str, ...]:
    """Returns the distinct labels of a list in sorted order, by number if all are integers. Raises UserError for an empty
    label."""
    names = index.texts("labels")
    if "" in names:
        raise UserError(f"{path}:{index['labels.row'][names.index('')]}: no label ({columns.label})")
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if all(map(str.isdecimal, names)) else None))


def _labels(path: Path, index: Index, classes: tuple[str, ...]) -> list[int]:
    """Returns the class of each distinct value of the label column. Raises UserError for the first value without a class."""
    values, number = index.texts("labels"), known_as(classes)
    if not any(value in number for value in values) and all(map(str.isdecimal, values)):
        number = {str(label): label for label in range(len(classes))}
    for row, value in zip(index["labels.row"].tolist(), values, strict=True):  # in the order of the rows
        if value not in number:
            raise UserError(f"{path}:{row}: label {value!r} is none of the {len(classes)} classes{nearest(value, number)}")
    return [number[value] for value in values]
