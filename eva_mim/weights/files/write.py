"""Writing weights with one tensor in memory at a time; a file gets its name once it is complete."""

from __future__ import annotations

import errno
import json
import math
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from eva_mim.core.errors import UserError
from eva_mim.core.files import replacing
from eva_mim.weights.files.allowlist import DTYPES, STORAGES
from eva_mim.weights.files.formats import SAFETENSORS
from eva_mim.weights.files.lazy import materialise
from eva_mim.weights.files.tensors import contiguous

Kinds = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (torch's dtype name, shape)."""
FLOATING = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
"""Dtypes in which floating tensors can be written."""
ALIGNMENT = 64
"""Bytes; torch.save begins its records at multiples, so that they can be mapped into memory."""
RECORD = 512
"""Approximate bytes per tensor in a zip archive besides its elements: two headers, padding, and its line in the pickle."""


def write_safetensors(
    path: Path, weights: Mapping[str, Tensor], *, dtype: str | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file (8 bytes of length, JSON header, data) with `format: pt` in its metadata.

    `dtype` is torch's name of the dtype for floating tensors; other tensors keep theirs. Raises UserError for dtypes that the
    format lacks and for a full disk. After an error or an interruption no partial file is left, and an older file at `path` is
    unchanged.
    """
    kinds = _kinds(weights, dtype, set(SAFETENSORS.values()))
    named = {name: (kind, tuple(weights[name].shape)) for name, kind in kinds.items()}
    stream_safetensors(path, named, (weights[name] for name in in_file_order(named)), metadata=metadata)


def in_file_order(kinds: Kinds) -> list[str]:
    """Returns the names with wide elements before narrow ones, because the reading library needs every tensor aligned."""
    return sorted(kinds, key=lambda name: -DTYPES[kinds[name][0]])


def bytes_of(kinds: Kinds) -> int:
    """Returns the bytes of all elements."""
    return sum(math.prod(shape) * DTYPES[kind] for kind, shape in kinds.values())


def stream_safetensors(
    path: Path, kinds: Kinds, values: Iterable[Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file from tensors that arrive one by one, in the order of `in_file_order`."""
    tags = {kind: tag for tag, kind in SAFETENSORS.items()}
    header: dict[str, Any] = {"__metadata__": {**(metadata or {}), "format": "pt"}}
    names, end = in_file_order(kinds), 0
    for name in names:
        kind, shape = kinds[name]
        start, end = end, end + bytes_of({name: kinds[name]})
        header[name] = {"dtype": tags[kind], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _replacing(path, 8 + len(text) + end) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, value in zip(names, values, strict=True):
            assert tuple(value.shape) == kinds[name][1], name
            file.write(_content(value, kinds[name][0]))


def write_torch(path: Path, weights: Mapping[str, Tensor], *, container: str | None = None, dtype: str | None = None) -> None:
    """Writes the torch.save file of a state dict, or of {container: state dict}, which torch.load reads with weights_only and
    mmap.

    `dtype` and errors are those of `write_safetensors`. Names that share a tensor object are stored once and share it again when
    loaded.
    """
    weights = dict(weights)  # keeps the objects alive: an id stands for one object only as long as the object lives
    kinds = _kinds(weights, dtype, set(DTYPES))
    records: dict[int, _Record] = {}
    for name, value in weights.items():
        records.setdefault(id(value), _Record(str(len(records)), kinds[name], tuple(value.shape), value))
    tree = {name: records[id(value)] for name, value in weights.items()}
    size = sum(record.value.numel() * DTYPES[record.kind] for record in records.values())
    with _replacing(path, size + RECORD * (len(tree) + 4)) as file, zipfile.ZipFile(file, "w") as archive:
        with _part(file, archive, "data.pkl") as part:
            _Pickler(part, protocol=2).dump(tree if container is None else {container: tree})
        for name, content in (("byteorder", b"little"), ("version", b"3\n")):
            with _part(file, archive, name) as part:
                part.write(content)
        for record in records.values():
            with _part(file, archive, f"data/{record.key}") as part:
                part.write(_content(record.value, record.kind))


class _Record:
    """A tensor in an archive, in a storage of its own."""

    def __init__(self, key: str, kind: str, shape: tuple[int, ...], value: Tensor):
        self.key, self.kind, self.shape, self.value = key, kind, shape, value

    def __reduce__(self) -> Any:
        """Returns torch's own pickled form; its version 3 serves dtypes without a storage class."""
        place: tuple[Any, ...] = 0, self.shape, contiguous(self.shape), False, OrderedDict()  # offset, ..., gradient, hooks
        if self.kind in STORAGES.values():
            return torch._utils._rebuild_tensor_v2, (_Storage(self), *place)
        return torch._utils._rebuild_tensor_v3, (_Storage(self), *place, getattr(torch, self.kind))


class _Storage:
    """Stand-in for the elements of a record while the record is pickled."""

    def __init__(self, record: _Record):
        count = record.value.numel()
        classes = {kind: getattr(torch, name) for name, kind in STORAGES.items()}
        untyped = torch.UntypedStorage, count * DTYPES[record.kind]
        kind, count = (classes[record.kind], count) if record.kind in classes else untyped
        self.name = ("storage", kind, record.key, "cpu", count)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.name if isinstance(value, _Storage) else None


@contextmanager
def _part(file: IO[bytes], archive: zipfile.ZipFile, name: str) -> Iterator[IO[bytes]]:
    """Opens a file inside the archive for writing, uncompressed, with its content at a multiple of ALIGNMENT."""
    info = zipfile.ZipInfo(f"archive/{name}")
    behind = file.tell() + 30 + len(info.filename) + 20 + 4  # its header, the name, zip64's sizes, the head of the padding
    padding = -behind % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=True) as part:
        yield part


def _kinds(weights: Mapping[str, Tensor], dtype: str | None, possible: set[str]) -> dict[str, str]:
    """Returns the dtype in which each tensor is written. Raises UserError for a dtype that the format lacks."""
    if dtype not in (None, *FLOATING):
        raise UserError(f"dtype: {dtype!r} is none of {', '.join(FLOATING)}")
    kinds = {}
    for name, value in weights.items():
        kind = dtype if dtype and value.is_floating_point() else str(value.dtype).removeprefix("torch.")
        if kind not in possible:
            raise UserError(f"{name}: tensors of type {kind} cannot be written in this format")
        kinds[name] = kind
    return kinds


def _content(value: Tensor, kind: str) -> memoryview:
    made = materialise(value).detach().to("cpu", getattr(torch, kind)).contiguous()
    return made.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def _replacing(path: Path, size: int) -> Iterator[IO[bytes]]:
    """Opens the temporary file of `files.replacing` for writing. Raises UserError if the disk has less than `size` bytes free,
    or fails."""
    def full() -> UserError:
        free = shutil.disk_usage(path.parent).free
        return UserError(f"{path}: needs {size:,} bytes, but {free:,} are free in {path.parent}; make room or write elsewhere")

    try:
        if size > shutil.disk_usage(path.parent).free:
            raise full()
        with replacing(path) as temporary, temporary.open("wb") as file:
            yield file
    except OSError as error:
        no_space = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise full() if no_space else UserError(f"{path}: cannot be written: {error.strerror or error}") from None
