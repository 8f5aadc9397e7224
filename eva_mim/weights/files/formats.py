"""Two file formats that hold tensors: safetensors, and the zip archive that torch.save writes since torch 1.6.

The content decides the format, not the file's name. Only headers are read, and every declared size is checked against the size of
the file.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from eva_mim.core.errors import UserError
from eva_mim.weights.files.allowlist import DTYPES, RE_SAVE, Stored
from eva_mim.weights.files.pickles import MAX_BYTES, read_pickle
from eva_mim.weights.files.tensors import Entry, Piece, contiguous
from eva_mim.weights.files.torchscript import state_of

MAX_TENSORS = 300_000
"""Tensors in one file. The largest open models have some 100,000; their optimizer moments come on top."""
MAX_HEADER = 100_000_000
"""Bytes of a safetensors header; the format's own limit."""
MAX_DIRECTORY = 128 * 2**20
"""Bytes of a zip directory; a record takes some 400."""
MAX_CODE = 64 * 2**20
"""Bytes of the code in a TorchScript archive, the only part that torch compresses."""
SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}
"""Element type in a safetensors header -> torch's dtype name (safetensors, format description)."""
LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of a torch file older than 1.6, after the pickle protocol: a pickled magic number."""


class TorchFile(NamedTuple):
    """The content of a torch file: plain values, with a `Stored` for each tensor, and the byte position of each storage."""

    kind: str
    value: Any
    place: Callable[[Mapping[Any, Stored]], dict[Any, Entry]]


def read_file(path: Path) -> dict[str, Any] | TorchFile:
    """Returns the header of a safetensors file (name -> Entry, and "__metadata__"), or the content of a torch file. Raises
    UserError for any other file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(32)
            if head[:4] == b"PK\x03\x04":
                return _read_zip(path, file, size)
            if head[:1] == b"\x80" and LEGACY in head:
                raise UserError(f"{path}: in the format of torch before 1.6, which is not read; save it again with a newer torch "
                                "(torch.load and torch.save)")
            if head[8:9] == b"{":
                return _read_safetensors(path, file, size)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not size:
        raise UserError(f"{path}: empty")
    if head[:1] == b"\x80":
        raise UserError(f"{path}: a pickle that torch.save did not write; {RE_SAVE}")
    raise UserError(f"{path}: neither a safetensors file nor one of torch.save's (it starts with {head[:8]!r})")


def read_json(path: Path, limit: int = MAX_HEADER) -> Any:
    """Returns the values of a JSON file. Raises UserError for a missing file, for one of more than `limit` bytes, and for
    broken JSON."""
    try:
        if path.stat().st_size > limit:
            raise UserError(f"{path}: {path.stat().st_size} bytes are too many for a description")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{path}: not readable as JSON: {error}") from None


def _read_safetensors(path: Path, file: BinaryIO, size: int) -> dict[str, Any]:
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, MAX_HEADER):
        raise UserError(f"{path}: not a safetensors file, or truncated: a header of {length} bytes in {size}")
    header = file.read(length)
    if header.count(b'"data_offsets"') > MAX_TENSORS:
        raise UserError(f"{path}: more than {MAX_TENSORS:,} tensors")
    base = 8 + length

    def entry(value: dict[str, Any]) -> Any:  # while parsing: a million small dicts never exist together
        if type(value.get("data_offsets")) is not list:
            return value  # the header itself, or its metadata
        shape, (start, end), dtype = tuple(value["shape"]), value["data_offsets"], SAFETENSORS[value["dtype"]]
        if len(shape) > 64 or {type(start), type(end), *map(type, shape)} != {int} or min((start, *shape)) < 0 or end >= 2**63:
            raise ValueError("a size that is not a number")
        return Entry(dtype, shape, (Piece(path, base + start, end - start),))

    try:
        tree = json.loads(header, object_hook=entry)
        found = {"__metadata__": tree.pop("__metadata__", None) or {}}
        entries = sorted(tree.items(), key=lambda item: item[1].pieces[0][1:])
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged safetensors header ({type(error).__name__}: {str(error)[:80]})") from None
    at = base
    for name, one in entries:
        (piece,) = one.pieces
        if piece.start != at or piece.size != one.size:
            raise UserError(f"{path}: damaged safetensors header: the place of {name[:100]!r} does not fit its shape")
        found[name], at = one, at + piece.size
    if at != size:
        raise UserError(f"{path}: {size} bytes, but the header declares {at}; the file is truncated or damaged")
    return found


class _Record(NamedTuple):
    """A file inside a zip archive."""

    header: int
    size: int
    crc: int
    packed: int
    """Compressed size in bytes."""
    method: int
    """Compression method; 0 stores the bytes as they are."""


def _read_zip(path: Path, file: BinaryIO, size: int) -> TorchFile:
    try:
        records = _directory(path, file, size)
    except UserError:
        raise
    except (struct.error, ValueError, OverflowError) as error:  # also names that are no text, and positions beyond the file
        raise UserError(f"{path}: damaged zip directory ({type(error).__name__})") from None
    root = next(iter(records), "").partition("/")[0]
    if f"{root}/data.pkl" not in records:
        raise UserError(f"{path}: a zip archive, but not one of torch.save's: {root[:60]!r} holds no data.pkl")
    order = records.get(f"{root}/byteorder")
    if order is not None and _content(path, file, order, size) != b"little":
        raise UserError(f"{path}: written on a big-endian machine; {RE_SAVE}")
    value = read_pickle(_content(path, file, records[f"{root}/data.pkl"], size), str(path))
    script = f"{root}/constants.pkl" in records
    if script:
        value = _script(path, file, {name: record for name, record in records.items() if name.endswith(".py")}, size, value)

    def place(tensors: Mapping[Any, Stored]) -> dict[Any, Entry]:
        entries = {}
        with path.open("rb") as again:
            for name, stored in tensors.items():
                record = records.get(f"{root}/data/{stored.storage.key}")
                if record is None or record.size != stored.storage.elements * DTYPES[stored.storage.dtype]:
                    raise UserError(f"{path}: damaged: storage {stored.storage.key[:40]!r} is missing or of another size")
                entries[name] = _entry(path, stored, _start(path, again, record, size), record.crc, size)
        return entries

    return TorchFile("TorchScript" if script else "torch", value, place)


def _script(path: Path, file: BinaryIO, code: Mapping[str, _Record], size: int, module: Any) -> dict[str, Stored]:
    """Returns the state dict of a pickled TorchScript module, whose code is read as text for the names of parameters and
    buffers."""
    root = next(iter(code), "").partition("/")[0]
    if sum(record.size for record in code.values()) > MAX_CODE:
        raise UserError(f"{path}: a TorchScript program of more than {MAX_CODE:,} bytes")

    def source(place: str) -> str:
        record = code.get(f"{root}/code/{place.replace('.', '/')}.py")
        if record is None:
            raise UserError(f"the code of {place[:100]!r}, which lists the parameters, is missing")
        start = _start(path, file, record._replace(size=record.packed), size)
        content = os.pread(file.fileno(), record.packed, start)
        if record.method:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, record.size + 1)
        if len(content) != record.size or record.crc not in (0, zlib.crc32(content)):
            raise UserError(f"damaged: the code of {place[:100]!r} does not have its recorded size and checksum")
        return content.decode(errors="replace")

    try:
        return state_of(module, source)
    except (UserError, zlib.error) as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def _directory(path: Path, file: BinaryIO, size: int) -> dict[str, _Record]:
    """Returns the records of a zip archive by name, in the order of its directory (PKWARE's APPNOTE 4.3.12 to 4.3.16)."""
    base = max(0, size - 66_000)  # the end record, and a comment of at most 65,535 bytes
    file.seek(base)
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0:
        raise UserError(f"{path}: a zip archive without its directory: truncated")
    count, length, start, comment = struct.unpack_from("<H2LH", tail, end + 10)
    if end + 22 + comment != len(tail):
        raise UserError(f"{path}: truncated or damaged: its zip directory does not end with the file")
    if tail[max(end - 20, 0) : end][:4] == b"PK\x06\x07":
        file.seek(struct.unpack_from("<Q", tail, end - 12)[0])
        count, length, start = struct.unpack("<24x4Q", file.read(56))[1:]
    if length > MAX_DIRECTORY or count > MAX_TENSORS or start + length > size:
        raise UserError(f"{path}: a zip directory of {count} records in {length} bytes is damaged, or over the limit")
    file.seek(start)
    directory, at, records = file.read(length), 0, dict[str, _Record]()
    while at < length:
        mark, method, crc, packed, full, names, extra, comment, header = struct.unpack_from("<4s6xH4x3L3H8xL", directory, at)
        name = directory[at + 46 : at + 46 + names].decode()
        wide = iter(struct.iter_unpack("<Q", _zip64(directory[at + 46 + names : at + 46 + names + extra])))
        full, packed, header = (next(wide, (0,))[0] if value == 0xFFFFFFFF else value for value in (full, packed, header))
        if mark != b"PK\x01\x02" or name in records:
            raise UserError(f"{path}: damaged zip directory at {name[:60]!r}")
        if header + packed > size:
            raise UserError(f"{path}: {name[:60]!r} declares {packed} bytes, more than the file has; truncated or damaged")
        if (method or packed != full) and not (method == zlib.DEFLATED and name.partition("/")[2].startswith("code/")):
            raise UserError(f"{path}: {name[:60]!r} is compressed, which torch.save never does (a zip bomb?); unpack it first")
        records[name] = _Record(header, full, crc, packed, method)
        at += 46 + names + extra + comment
    return records


def _zip64(extra: bytes) -> bytes:
    """Returns the 8-byte sizes and offsets in a record's zip64 field."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            return extra[4 : 4 + length // 8 * 8]
        extra = extra[4 + length :]
    return b""


def _start(path: Path, file: BinaryIO, record: _Record, size: int) -> int:
    """Returns the position of the first byte of a record, after the record's own header."""
    header = os.pread(file.fileno(), 30, record.header)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise UserError(f"{path}: damaged: no record at byte {record.header}")
    names, extra = struct.unpack_from("<2H", header, 26)
    start: int = record.header + 30 + names + extra
    if start + record.size > size:
        raise UserError(f"{path}: truncated or damaged: a record of {record.size} bytes at {start} of {size}")
    return start


def _content(path: Path, file: BinaryIO, record: _Record, size: int) -> bytes:
    if record.size > MAX_BYTES:
        raise UserError(f"{path}: a pickle of {record.size:,} bytes, more than {MAX_BYTES:,}; save it as safetensors")
    file.seek(_start(path, file, record, size))
    content = file.read(record.size)
    if record.crc and zlib.crc32(content) != record.crc:
        raise UserError(f"{path}: damaged: its pickle does not have its recorded checksum")
    return content


def _entry(path: Path, stored: Stored, start: int, crc: int, limit: int) -> Entry:
    """Returns the Entry of a stored tensor whose storage begins at byte `start`; `pickles` has checked that the tensor lies
    inside."""
    bytes_each, count = DTYPES[stored.dtype], math.prod(stored.shape)
    if count * bytes_each > limit:
        raise UserError(f"{path}: a tensor of shape {list(stored.shape)} is larger than the file that holds it")
    last = -1 if not count else sum((n - 1) * step for n, step in zip(stored.shape, stored.stride, strict=True))
    length, whole = (last + 1) * bytes_each, stored.storage.elements * DTYPES[stored.storage.dtype]
    piece = Piece(path, start + stored.offset * bytes_each, length, crc if length == whole else 0)
    plain = all(a == b or n == 1 for a, b, n in zip(stored.stride, contiguous(stored.shape), stored.shape, strict=True))
    return Entry(stored.dtype, stored.shape, (piece,), None if plain or not count else stored.stride)
