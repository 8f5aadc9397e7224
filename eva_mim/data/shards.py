"""Tar shards in WebDataset layout (`KEY.jpg KEY.cls KEY.txt KEY.json`), read by offset in any order.

A `.tar.gz` is unpacked once into the cache folder (`$EVA_MIM_CACHE`, else `~/.cache/eva-mim`), since gzip cannot be
read from the middle. The index of a shard (key, offset, size of each member) is kept there as well. Nothing is ever
written under a name that an archive chose.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

from eva_mim.config import UserError, digest
from eva_mim.contracts import Sample
from eva_mim.data import SourceSettings
from eva_mim.data.captions import CaptionFile, open_captions, record_captions
from eva_mim.data.names import class_file, class_words

IMAGES = ("jpg", "jpeg", "png", "webp")
MAX_UNPACKED_RATIO = 100
"""A tar of small images packs about 8 : 1, most of it padding; gzip itself stops at 1032 : 1, and a bomb is near that."""
MAX_UNPACKED_BYTES = 64 * 2**30


class Member(NamedTuple):
    """Where one field of a record lies in its shard."""

    offset: int
    size: int


class Record(NamedTuple):
    shard: int
    key: str
    members: dict[str, Member]


class ShardSource:
    """Records of several shards, in the order of the sorted file names."""

    def __init__(self, paths: list[Path], classes: tuple[str, ...] | None, caption_lines: bool = False):
        self.classes = classes
        self.captions: CaptionFile | None = None
        self._caption_lines = caption_lines
        self._names = [path.name for path in paths]
        self._tars = [plain_tar(path) for path in paths]
        self._records = [
            Record(shard, key, members) for shard, tar in enumerate(self._tars) for key, members in shard_index(tar)
        ]
        self._open: dict[tuple[int, int], BinaryIO] = {}
        if not any(extension in record.members for record in self._records for extension in IMAGES):
            raise UserError(f"{paths[0].parent}: no images in {', '.join(self._names[:3])} (members KEY.jpg, KEY.png)")
        self.fingerprint = digest([(path.name, path.stat().st_size) for path in paths])

    def __len__(self) -> int:
        return len(self._records)

    def key(self, index: int) -> str:
        """SHARD/KEY."""
        record = self._records[index]
        return f"{self._names[record.shard]}/{record.key}"

    def read(self, index: int) -> Sample:
        """Decode one record as RGB. Raises ValueError for a record without image or with a label that does not fit."""
        record = self._records[index]
        extension = next((name for name in IMAGES if name in record.members), None)
        if extension is None:
            raise ValueError("no image member")
        with Image.open(io.BytesIO(self._bytes(record, extension))) as image:
            pixels = image.convert("RGB")
        label = int(self._bytes(record, "cls")) if "cls" in record.members else None
        if label is not None and self.classes is not None and not 0 <= label < len(self.classes):
            raise ValueError(f"label {label}, but the class list has {len(self.classes)} names")
        captions = self.captions[index] if self.captions else self._own_captions(record)
        return Sample(self.key(index), pixels, label if self.classes else None, captions)

    def keys(self) -> list[str]:
        """The records' keys as a caption file has them: without their shard."""
        return [record.key for record in self._records]

    def _own_captions(self, record: Record) -> tuple[str, ...]:
        text, described = (self._bytes(record, name) if name in record.members else None for name in ("txt", "json"))
        return record_captions(text, described, self._caption_lines)

    def _bytes(self, record: Record, extension: str) -> bytes:
        place = os.getpid(), record.shard  # a forked worker must not share a file position
        if place not in self._open:
            self._open[place] = self._tars[record.shard].open("rb")
        member = record.members[extension]
        return os.pread(self._open[place].fileno(), member.size, member.offset)

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
    source = ShardSource(paths, class_file(settings) or class_words(settings), settings.caption_lines)
    _check_labels(source, settings)
    source.captions = open_captions(settings, split, source.keys(), f"records of {root / (pattern or '*.tar*')}")
    return source


def _check_labels(source: ShardSource, settings: SourceSettings) -> None:
    """A class list that does not fit is found now and not in the third epoch."""
    if source.classes is None:
        return
    for record in source._records:
        if "cls" not in record.members:
            continue
        text = source._bytes(record, "cls")
        if not text.strip().isdigit() or int(text) >= len(source.classes):
            raise UserError(
                f"data.classes: {settings.classes or settings.class_names} has {len(source.classes)} names, but "
                f"{source._names[record.shard]}/{record.key} has label {text[:20].decode(errors='replace')!r}"
            )


def cache_folder() -> Path:
    """Where indexes and unpacked shards are kept."""
    folder = Path(os.environ.get("EVA_MIM_CACHE", Path.home() / ".cache" / "eva-mim"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cached(path: Path, suffix: str) -> Path:
    stat = path.stat()
    return cache_folder() / f"{digest([str(path.resolve()), stat.st_size, stat.st_mtime_ns])[:24]}{suffix}"


def plain_tar(path: Path) -> Path:
    """`path` itself, or its unpacked copy in the cache for `.gz`. Raises UserError for a broken or absurd archive."""
    if not path.name.endswith((".gz", ".tgz")):
        return path
    target = _cached(path, ".tar")
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


def shard_index(tar: Path) -> list[tuple[str, dict[str, Member]]]:
    """(key, members by extension) of each record of a plain tar; cached. Raises UserError for a broken tar."""
    target = _cached(tar, ".index2.json")
    if target.exists():
        stored = json.loads(target.read_text())
        return [(key, {ext: Member(*place) for ext, place in members.items()}) for key, members in stored]
    records: dict[str, dict[str, Member]] = {}
    end = 0
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                end = member.offset_data + member.size
                folder, slash, name = member.name.rpartition("/")
                key, dot, extension = name.partition(".")
                if member.isfile() and dot:
                    place = Member(member.offset_data, member.size)
                    records.setdefault(folder + slash + key, {})[extension.lower()] = place
        with tar.open("rb") as raw:
            raw.seek(-(-end // 512) * 512)
            if raw.read(512).strip(b"\0"):
                raise tarfile.ReadError("damaged or cut header")
    except tarfile.TarError as error:
        raise UserError(f"{tar}: not a readable tar: {error}") from None
    index = list(records.items())
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(index))
    temporary.replace(target)
    return index
