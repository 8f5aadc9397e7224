"""Index of one tar of records (`KEY.jpg KEY.cls KEY.txt KEY.json`), made from its headers and labels alone.

A tar is an untrusted file: its names are never used as paths, links and sparse members are ignored, and its headers are
checked against the file.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from eva_mim.core.errors import UserError
from eva_mim.core.settings import digest
from eva_mim.data.sources.decode import ARRAYS, SUFFIXES
from eva_mim.data.sources.index import VERSION, Column, Content, Index, Texts, cache_folder, read_index, write_index
from eva_mim.data.sources.passed_over import is_hidden
from eva_mim.data.sources.remote import Reading
from eva_mim.data.sources.videos import VIDEOS

FIELDS = {"image": tuple(suffix[1:] for suffix in SUFFIXES + ARRAYS), "text": ("txt",), "described": ("json",),
          "mask": ("seg.png", "mask.png"), "video": tuple(suffix[1:] for suffix in VIDEOS)}
"""Columns of the index -> extensions; the first extension that a record has is taken."""
FRAME = re.compile(rf"(\d{{1,9}})\.(?:{'|'.join(suffix[1:] for suffix in SUFFIXES)})")
"""Extension of a video's frame, which has its number."""
BLOCK = 512
"""Bytes of a tar block. Every member begins at a multiple of it; the first block is a header, so 0 stands for a missing field."""
MAX_MEMBER_BYTES = 2**30
"""Maximum size of a picture, label or caption; a larger member counts as missing."""
MAX_BESIDE = 2**20
"""Maximum size in bytes of a few numbers beside an image."""
MAX_HEADER_BYTES = 2**16
"""Maximum size of a name or of metadata before a header (GNU's long names, pax); the format sets no limit, and tarfile reads them
into memory."""
HEADERS_AHEAD = 2**16
"""Bytes read at once from a URL: a few small members, or a header whose image is not read."""
MAX_TAR_BYTES = 2**41
"""Maximum size of a tar, since the index counts blocks in 32 bits."""
NO_NUMBER, NO_LABEL = -2, -1
"""Labels in the index for a KEY.cls that is no number, and for a missing KEY.cls."""


class BadShard(UserError):
    """Raised for a shard that is damaged or has impossible sizes, whichever process reads it."""


class Shard(NamedTuple):
    """Place and version of a shard."""

    place: str
    """Absolute path, or URL."""
    size: int
    changed: str
    """Value that changes with the file: its modification time in nanoseconds, or the server's own value."""

    @property
    def name(self) -> str:
        """File name without its folder, the first part of its records' keys."""
        return self.place.rpartition("/")[2]

    @property
    def folder(self) -> str:
        """Folder of the shard, for messages."""
        return self.place.rpartition("/")[0]

    @property
    def remote(self) -> bool:
        """True for a shard that is read by URL."""
        return not self.place.startswith("/")

    @property
    def packed(self) -> bool:
        """True for a compressed shard, which must be unpacked before it can be read by offset."""
        return self.name.endswith((".gz", ".tgz"))

    def cached(self, suffix: str) -> Path:
        """Returns the path of a file in the cache folder for this version of the shard."""
        return cache_folder() / f"{digest([VERSION, self.identity, self.size, self.changed])[:24]}{suffix}"

    @property
    def identity(self) -> str:
        """URL, or path with all links resolved."""
        return self.place if self.remote else os.path.realpath(self.place)

    def open(self, ahead: int = HEADERS_AHEAD) -> BinaryIO:
        """Opens the shard for readers that seek; by URL, `ahead` bytes are read beyond a request. Raises OSError, UserError."""
        return cast(BinaryIO, Reading(self.place, self.size, ahead)) if self.remote else open(self.place, "rb")


class Member(NamedTuple):
    """Byte range of one field of a record in its shard."""

    offset: int
    size: int


NOWHERE = Member(0, 0)


def found(path: Path) -> Shard:
    """Returns the shard at a path. Raises UserError if there is none."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return Shard(os.path.abspath(path), stat.st_size, str(stat.st_mtime_ns))


def tar_index(shard: Shard, tar: Shard) -> Index:
    """Returns the index of a shard whose uncompressed content is in `tar`. Columns: `key` of each record, block and size of each
    of its fields, and its `label`. Raises BadShard for a damaged tar, UserError for one that cannot be read."""
    target = shard.cached(".index")
    if (stored := read_index(target)) is not None:
        return stored
    content = _read(shard, tar)
    if not shard.remote and found(Path(shard.place)) != shard:
        raise UserError(f"{shard.place}: has changed while it was indexed; start again")
    return write_index(target, content)


def _read(shard: Shard, tar: Shard) -> Content:
    records: dict[str, dict[str, Member]] = {}
    labels: dict[str, int] = {}
    repeated = hidden = 0
    for name, member, archive in _members(shard, tar):
        if is_hidden(name):
            hidden += 1
            continue
        folder, slash, file = name.rpartition("/")
        stem, dot, extension = file.partition(".")
        if dot:
            key, extension = folder + slash + stem, extension.lower()
            fields = records.setdefault(key, {})
            repeated += extension in fields
            fields[extension] = member if member.size <= MAX_MEMBER_BYTES else NOWHERE
            if extension == "cls":
                archive.seek(member.offset)
                labels[key] = _number(archive.read(min(member.size, 100)))
    keys, columns = Texts(), dict[str, Column]()
    for key in records:
        keys.add(key)
    for field, extensions in FIELDS.items():
        taken = [next((members[e] for e in extensions if e in members), NOWHERE) for members in records.values()]
        columns[field] = np.array([member.offset // BLOCK for member in taken], np.uint32)
        columns[f"{field}.size"] = np.array([member.size for member in taken], np.uint32)
    columns |= _frames(list(records.values()))
    columns["label"] = np.array([labels.get(key, NO_LABEL) for key in records], np.int32)
    bare = ((columns["image"] == 0) & (columns["video"] == 0) & ~_filmed(columns)).nonzero()[0]
    facts = {"fingerprint": shard.name, "repeated": str(repeated), "hidden": str(hidden)}
    if len(bare):
        key, members = next(islice(records.items(), int(bare[0]), None))
        facts |= {"bare": str(len(bare)), "bare.first": f"{shard.name}/{key}: {', '.join(members)}"}
    return Content(columns | keys.columns("key"), facts)


def _frames(records: list[dict[str, Member]]) -> dict[str, Column]:
    """Returns block and size of each record's frames, by their numbers (columns `frames`), and where those of each record end;
    nothing if there are none."""
    every = [sorted((int(match[1]), member) for extension, member in members.items() if (match := FRAME.fullmatch(extension)))
             for members in records]
    if not any(every):
        return {}
    flat = [member for frames in every for _, member in frames]
    return {"frames": np.array([member.offset // BLOCK for member in flat], np.uint32),
            "frames.size": np.array([member.size for member in flat], np.uint32),
            "frames.ends": np.cumsum([len(frames) for frames in every]).astype(np.uint64)}


def _filmed(columns: dict[str, Column]) -> npt.NDArray[np.bool_]:
    """Returns which records have frames."""
    ends = columns.get("frames.ends")
    return np.zeros(len(columns["image"]), bool) if ends is None else np.diff(ends, prepend=0) > 0


def members_of(shard: Shard, extension: str) -> Iterator[tuple[str, bytes]]:
    """Yields key and content of each member KEY.extension of an uncompressed tar; larger ones than `MAX_BESIDE` are passed over.
    Raises BadShard for a damaged tar, UserError for one that cannot be read."""
    for name, member, archive in _members(shard, shard):
        _, dot, kind = name.rpartition("/")[2].partition(".")
        if dot and kind.lower() == extension and not is_hidden(name) and member.size <= MAX_BESIDE:
            archive.seek(member.offset)
            yield name[: len(name) - len(kind) - 1], archive.read(member.size)


def _members(shard: Shard, tar: Shard) -> Iterator[tuple[str, Member, BinaryIO]]:
    """Yields name and byte range of each file in a tar, and the opened tar. Raises BadShard for a damaged tar, UserError for one
    that cannot be read."""
    try:
        with tar.open() as raw, tarfile.open(fileobj=raw, mode="r:", tarinfo=_Header) as archive:
            before = -1
            while (member := archive.next()) is not None:
                if member.size < 0 or not before < archive.offset <= MAX_TAR_BYTES:
                    raise tarfile.ReadError(f"a member of {member.size} bytes before byte {archive.offset}")
                before = archive.offset
                archive.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps every header in memory
                if member.isfile() and not member.issparse():
                    yield member.name, Member(member.offset_data, member.size), raw
            raw.seek(archive.offset)
            if raw.read(BLOCK).strip(b"\0"):  # tarfile takes a damaged header for the end of the tar
                raise tarfile.ReadError("damaged or cut header")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{shard.place}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # tarfile raises exceptions of many types for malformed headers
        raise BadShard(f"{shard.place}: not a readable tar: {error}") from None


class _Header(tarfile.TarInfo):
    """Header that refuses negative sizes and large metadata."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (not self.isreg() and self.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]  # not in the stubs
        return member


def _number(text: bytes) -> int:
    """Returns the class number in a text; `NO_NUMBER` unless it is an integer of at most 9 digits."""
    return int(text) if text.strip().isdigit() and len(text.strip()) < 10 else NO_NUMBER
