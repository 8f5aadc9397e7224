"""Tar shards in WebDataset layout (`KEY.jpg KEY.cls KEY.txt KEY.json`), read by offset in any order.

A `.tar.gz` is unpacked once into the cache folder, since gzip cannot be read from the middle. Each shard is indexed once, and the
shards of a split are joined in one index. Nothing is ever written under a name that an archive chose.
"""

from __future__ import annotations

import gzip
import os
import tarfile
import time
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from eva_mim.config import UserError, digest
from eva_mim.contracts import Sample
from eva_mim.data import RGB, Pixels, SourceSettings
from eva_mim.data.captions import CaptionFile, open_captions, record_captions
from eva_mim.data.decode import ARRAYS, SUFFIXES, Raw
from eva_mim.data.index import (
    VERSION,
    Column,
    Content,
    Index,
    Texts,
    cache_folder,
    narrow,
    open_index,
    read_index,
    say_indexed,
    write_index,
)
from eva_mim.data.names import class_file, class_words
from eva_mim.log import say
from eva_mim.phases import phase

IMAGES = tuple(suffix[1:] for suffix in SUFFIXES + ARRAYS)
FIELDS = {"image": IMAGES, "text": ("txt",), "described": ("json",)}
"""Columns of the index -> extensions, of which the first that a record has is taken."""
BLOCK = 512
"""Everything in a tar begins at a multiple of this many bytes; its first block is a header, so that 0 stands for "not there"."""
MAX_MEMBER_BYTES = 2**30
"""A member that is larger is no picture, label or caption, and counts as not there."""
NO_NUMBER, NO_LABEL = -2, -1
"""Labels in the index: a KEY.cls that is no number, and no KEY.cls."""
MAX_OPEN = 128
"""Shards that a process holds open; systems allow about a thousand files."""
MAX_UNPACKED_RATIO = 100
"""A tar of small images packs about 8 : 1, most of it padding; gzip itself stops at 1032 : 1, and a bomb is near that."""
MAX_UNPACKED_BYTES = 64 * 2**30


class Member(NamedTuple):
    """Where one field of a record lies in its shard, in bytes."""

    offset: int
    size: int


NOWHERE = Member(0, 0)


class ShardSource:
    """Records of several shards, in the order of the sorted file names."""

    def __init__(
        self, paths: list[Path], classes: tuple[str, ...] | None, caption_lines: bool = False, pixels: Pixels = RGB
    ):
        """Every rank must call."""
        self.classes = classes
        self.captions: CaptionFile | None = None
        self._caption_lines, self._pixels = caption_lines, pixels
        self._names = [path.name for path in paths]
        self.index = shards_index(paths)
        self._ends: list[int] = self.index["shards"].tolist()
        self._tars = [plain_tar(path) for path in paths]
        self._open: dict[tuple[int, int], BinaryIO] = {}
        self.fingerprint = self.index.facts["fingerprint"]

    def __len__(self) -> int:
        return len(self.index["image"])

    def key(self, index: int) -> str:
        """SHARD/KEY."""
        return f"{self._names[self._shard(index)]}/{self.index.text('key', index)}"

    def read(self, index: int) -> Sample:
        """Decode one record. Raises ValueError for a record without image or with a label that does not fit, and what
        `decode.decoded` raises."""
        return self.raw(index).sample(self._pixels)

    def raw(self, index: int) -> Raw:
        """Read one record. Raises ValueError as `read` does."""
        with phase("read"):
            content = self._bytes(index, "image")
        if content is None:
            raise ValueError("no image member")
        label = int(self.index["label"][index]) if self.classes else NO_LABEL
        if label == NO_NUMBER or (self.classes and label >= len(self.classes)):
            raise ValueError(f"its label is none of the {len(self.classes or ())} classes")
        captions = self.captions[index] if self.captions else self._own_captions(index)
        return Raw(self.key(index), content, label if label != NO_LABEL else None, captions)

    def class_counts(self) -> Column | None:
        """Images of each class."""
        labels = self.index["label"]
        return None if self.classes is None else np.bincount(labels[labels >= 0], minlength=len(self.classes))

    def keys(self) -> list[str]:
        """The records' keys as a caption file has them: without their shard."""
        return self.index.texts("key")

    def check_labels(self, setting: str) -> None:
        """A class list that does not fit is found now and not in the third epoch. Raises UserError."""
        labels = self.index["label"]
        wrong = ((labels == NO_NUMBER) | (labels >= len(self.classes or ()))).nonzero()[0]
        if self.classes is not None and len(wrong):
            label = int(labels[wrong[0]])
            raise UserError(f"data.classes: {setting} has {len(self.classes)} names, but {self.key(int(wrong[0]))} has "
                            f"{'a label that is no number' if label == NO_NUMBER else f'label {label}'}")

    def _own_captions(self, index: int) -> tuple[str, ...]:
        return record_captions(self._bytes(index, "text"), self._bytes(index, "described"), self._caption_lines)

    def _shard(self, index: int) -> int:
        return bisect_right(self._ends, index)

    def _bytes(self, index: int, field: str) -> bytes | None:
        block = int(self.index[field][index]) if field in self.index else 0
        if not block:
            return None
        place = os.getpid(), self._shard(index)  # a forked worker must not share a file position
        if place not in self._open:
            while len(self._open) >= MAX_OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[place] = self._tars[place[1]].open("rb")
        return os.pread(self._open[place].fileno(), int(self.index[f"{field}.size"][index]), block * BLOCK)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}


def open_shards(settings: SourceSettings, split: str) -> ShardSource | None:
    """The source of a split ("train" or "val"); None when it has no pattern. Raises UserError."""
    root, pattern = settings.own_root, settings.train if split == "train" else settings.val
    if pattern is None and split == "val":
        return None
    if not root.is_dir():
        raise UserError(f"data.root: {root} is not a folder")
    if Path(pattern or "").is_absolute():
        raise UserError(f"data.{split}: {pattern} must be a pattern below data.root={root}")
    paths = sorted(root.glob(pattern or "*.tar*"))
    if not paths:
        raise UserError(f"data.{split}: no shard matches {root / (pattern or '*.tar*')}")
    source = ShardSource(paths, class_file(settings) or class_words(settings), settings.caption_lines, settings.pixels)
    source.check_labels(str(settings.classes or settings.class_names))
    source.captions = open_captions(settings, split, source.keys, f"records of {root / (pattern or '*.tar*')}")
    return source


def _cached(path: Path, suffix: str) -> Path:
    stat = path.stat()
    return cache_folder() / f"{digest([VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns])[:24]}{suffix}"


def _unpacked(path: Path) -> Path:
    """`path` itself, or for `.gz` where its unpacked copy lies or will lie."""
    return _cached(path, ".tar") if path.name.endswith((".gz", ".tgz")) else path


def plain_tar(path: Path) -> Path:
    """`path` itself, or its unpacked copy in the cache for `.gz`. Raises UserError for a broken or absurd archive."""
    target = _unpacked(path)
    if target.exists():
        return target
    limit = min(MAX_UNPACKED_BYTES, path.stat().st_size * MAX_UNPACKED_RATIO + 2**20)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        with gzip.open(path) as packed, temporary.open("wb") as plain:
            while block := packed.read(2**20):
                limit -= len(block)
                if limit < 0:
                    raise UserError(f"{path}: unpacks to an absurd size; refused")
                plain.write(block)
        temporary.replace(target)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a readable .tar.gz: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return target


def shards_index(paths: list[Path]) -> Index:
    """The indexes of shards joined: their columns one after another, and where each shard ends (`shards`). Raises UserError."""

    def stamp() -> str:
        return digest([(path.stat().st_size, path.stat().st_mtime_ns) for path in paths])

    def fresh(index: Index) -> bool:
        return index.facts["stamp"] == stamp() and all(_unpacked(path).exists() for path in paths)

    def make() -> Content:
        began, now = time.monotonic(), stamp()
        parts = [shard_index(plain_tar(path)) for path in paths]
        columns = {"shards": narrow(np.cumsum([len(part["image"]) for part in parts]))}
        columns |= {name: np.concatenate([part[name] for part in parts]) for name in ("image", "image.size", "label", "key")}
        for field in ("text", "described"):
            if any(part[field].any() for part in parts):
                columns |= {name: np.concatenate([part[name] for part in parts]) for name in (field, f"{field}.size")}
        starts = np.cumsum([0] + [len(part["key"]) for part in parts])
        columns["key.ends"] = narrow(
            np.concatenate([part["key.ends"] + start for part, start in zip(parts, starts[:-1], strict=True)])
        )
        if not columns["image"].any():
            names = ", ".join(path.name for path in paths[:3])
            raise UserError(f"{paths[0].parent}: no images in {names} (members KEY.jpg, KEY.png)")
        if repeated := sum(int(part.facts["repeated"]) for part in parts):
            say(f"  {paths[0].parent}: {repeated} members have the name of another one in their shard; the last one counts")
        say_indexed(f"{len(paths)} shards in {paths[0].parent}", len(columns["image"]), time.monotonic() - began)
        fingerprint = digest([(path.name, path.stat().st_size) for path in paths])
        return Content(columns, {"fingerprint": fingerprint, "stamp": now})

    return open_index(["shards", [str(path.resolve()) for path in paths]], fresh, make, f"{paths[0].parent}/{paths[0].name}, ...")


def shard_index(tar: Path) -> Index:
    """The index of a plain tar: `key` of each record, block and size of its fields, `label`. Raises UserError."""
    target = _cached(tar, ".index")
    stored = read_index(target)
    return stored if stored is not None else write_index(target, _read_shard(tar))


def _read_shard(tar: Path) -> Content:
    records: dict[str, dict[str, Member]] = {}
    labels: dict[str, int] = {}
    repeated = 0
    for name, member, archive in _members(tar):
        folder, slash, file = name.rpartition("/")
        stem, dot, extension = file.partition(".")
        if dot:
            key, extension = folder + slash + stem, extension.lower()
            fields = records.setdefault(key, {})
            repeated += extension in fields
            fields[extension] = member if member.size <= MAX_MEMBER_BYTES else NOWHERE
            if extension == "cls":
                labels[key] = _number(os.pread(archive, min(member.size, 100), member.offset))
    keys, columns = Texts(), dict[str, Column]()
    for key in records:
        keys.add(key)
    for field in ("image", "text", "described"):
        taken = [next((members[e] for e in FIELDS[field] if e in members), NOWHERE) for members in records.values()]
        columns[field] = np.array([member.offset // BLOCK for member in taken], np.uint32)
        columns[f"{field}.size"] = np.array([member.size for member in taken], np.uint32)
    columns["label"] = np.array([labels.get(key, NO_LABEL) for key in records], np.int32)
    return Content(columns | keys.columns("key"), {"fingerprint": tar.name, "repeated": str(repeated)})


def _members(tar: Path) -> Iterator[tuple[str, Member, int]]:
    """Name and place of each file in a tar, and the open tar's number. Raises UserError."""
    end = 0
    try:
        with tarfile.open(tar, "r:") as archive, tar.open("rb") as raw:
            for member in archive:
                end = member.offset_data + member.size
                if member.isfile():
                    yield member.name, Member(member.offset_data, member.size), raw.fileno()
            raw.seek(-(-end // BLOCK) * BLOCK)
            if raw.read(BLOCK).strip(b"\0"):
                raise tarfile.ReadError("damaged or cut header")
    except tarfile.TarError as error:
        raise UserError(f"{tar}: not a readable tar: {error}") from None


def _number(text: bytes) -> int:
    """A class number as it is written, up to 2^31."""
    return int(text) if text.strip().isdigit() and len(text.strip()) < 10 else NO_NUMBER
