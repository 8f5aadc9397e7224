"""What lies where in one tar of records (`KEY.jpg KEY.cls KEY.txt KEY.json`): its index, from the headers alone.

A tar is a foreign file: no name in it is ever a path here, links and sparse members are not followed, and what its headers say is
checked against the file.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from eva_mim.core.errors import UserError
from eva_mim.core.settings import digest
from eva_mim.data.sources.decode import ARRAYS, SUFFIXES
from eva_mim.data.sources.index import VERSION, Column, Content, Index, Texts, cache_folder, read_index, write_index
from eva_mim.data.sources.remote import Reading

FIELDS = {"image": tuple(suffix[1:] for suffix in SUFFIXES + ARRAYS), "text": ("txt",), "described": ("json",)}
"""Columns of the index -> extensions, of which the first that a record has is taken."""
BLOCK = 512
"""Everything in a tar begins at a multiple of this many bytes; its first block is a header, so that 0 stands for "not there"."""
MAX_MEMBER_BYTES = 2**30
"""A member that is larger is no picture, label or caption, and counts as not there."""
MAX_HEADER_BYTES = 2**16
"""Of a name or of notes before a header (GNU's long names, pax); the format sets no limit, and tarfile takes them into memory."""
HEADERS_AHEAD = 2**16
"""Bytes read at once by URL: a few small members, or a header of which the image behind it is not read."""
MAX_TAR_BYTES = 2**41
"""The index counts blocks in 32 bits."""
NO_NUMBER, NO_LABEL = -2, -1
"""Labels in the index: a KEY.cls that is no number, and no KEY.cls."""


class BadShard(UserError):
    """A shard that is damaged or absurd, whoever reads it."""


class Shard(NamedTuple):
    """A shard as it was found."""

    place: str
    """Absolute path, or URL."""
    size: int
    changed: str
    """Another one when the file has changed: its time in nanoseconds, or what its server says."""

    @property
    def name(self) -> str:
        """Without its folder: the first part of its records' keys."""
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
        """A file of the cache that is about this shard as it was found."""
        return cache_folder() / f"{digest([VERSION, self.identity, self.size, self.changed])[:24]}{suffix}"

    @property
    def identity(self) -> str:
        """The same, by whichever link it was found."""
        return self.place if self.remote else os.path.realpath(self.place)

    def open(self, ahead: int = HEADERS_AHEAD) -> BinaryIO:
        """For readers that seek; `ahead` more bytes at once by URL. Raises OSError, UserError."""
        return cast(BinaryIO, Reading(self.place, self.size, ahead)) if self.remote else open(self.place, "rb")


class Member(NamedTuple):
    """Byte range of one field of a record in its shard."""

    offset: int
    size: int


NOWHERE = Member(0, 0)


def found(path: Path) -> Shard:
    """A shard that lies there now. Raises UserError."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return Shard(os.path.abspath(path), stat.st_size, str(stat.st_mtime_ns))


def tar_index(shard: Shard, tar: Shard) -> Index:
    """The index of a shard whose content lies plain in `tar`: `key` of each record, block and size of its fields, `label`.
    Raises BadShard for a damaged tar, UserError for one that cannot be read."""
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
    repeated = 0
    for name, member, archive in _members(shard, tar):
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
    columns["label"] = np.array([labels.get(key, NO_LABEL) for key in records], np.int32)
    return Content(columns | keys.columns("key"), {"fingerprint": shard.name, "repeated": str(repeated)})


def _members(shard: Shard, tar: Shard) -> Iterator[tuple[str, Member, BinaryIO]]:
    """Name and place of each file in a tar, and the open tar."""
    try:
        with tar.open() as raw, tarfile.open(fileobj=raw, mode="r:", tarinfo=_Header) as archive:
            before = -1
            while (member := archive.next()) is not None:
                if member.size < 0 or not before < archive.offset <= MAX_TAR_BYTES:
                    raise tarfile.ReadError(f"a member of {member.size} bytes before byte {archive.offset}")
                before = archive.offset
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                if member.isfile() and not member.issparse():
                    yield member.name, Member(member.offset_data, member.size), raw
            raw.seek(archive.offset)
            if raw.read(BLOCK).strip(b"\0"):  # tarfile takes this for the end
                raise tarfile.ReadError("damaged or cut header")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{shard.place}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # tarfile meets hostile headers with errors of many kinds
        raise BadShard(f"{shard.place}: not a readable tar: {error}") from None


class _Header(tarfile.TarInfo):
    """A header that is not followed into memory or backwards."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (not self.isreg() and self.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]  # not in the stubs
        return member


def _number(text: bytes) -> int:
    """A class number as it is written, up to 2^31."""
    return int(text) if text.strip().isdigit() and len(text.strip()) < 10 else NO_NUMBER
