"""Positions of a tensor's elements in files, and reading them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from eva_mim.core.errors import UserError
from eva_mim.weights.files.allowlist import DTYPES

if TYPE_CHECKING:
    from torch import Tensor


class Piece(NamedTuple):
    """A range of bytes in a file."""

    file: Path
    start: int
    size: int
    crc: int = 0
    """CRC-32 of these bytes; 0 if the file records none."""


class Entry(NamedTuple):
    """A tensor in files: its elements are the bytes of the pieces, in order."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    stride: tuple[int, ...] | None = None
    """Strides in elements; None for a contiguous tensor."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of all elements."""
        return self.elements * DTYPES[self.dtype]

    def load(self) -> Tensor:
        """Returns the tensor, contiguous and in memory of its own. Raises UserError if the file is missing, too short, or has
        another checksum than the recorded one."""
        import torch

        buffer = bytearray(sum(piece.size for piece in self.pieces))
        view, at = memoryview(buffer), 0
        for piece in self.pieces:
            part = view[at : at + piece.size]
            try:
                with piece.file.open("rb") as file:
                    file.seek(piece.start)
                    whole = file.readinto(part) == piece.size
            except OSError as error:
                raise UserError(f"{piece.file}: {error.strerror}") from None
            if not whole:
                raise UserError(f"{piece.file}: ends too early; the file is truncated")
            if piece.crc and zlib.crc32(part) != piece.crc:
                raise UserError(f"{piece.file}: damaged: the bytes from {piece.start} on do not have their recorded checksum")
            at += piece.size
        dtype = getattr(torch, self.dtype)
        if not buffer:
            return torch.zeros(self.shape, dtype=dtype)
        flat = torch.frombuffer(buffer, dtype=dtype)
        return flat.view(self.shape) if self.stride is None else flat.as_strided(self.shape, self.stride).contiguous()


def cut(pieces: Iterable[Piece], start: int, size: int) -> tuple[Piece, ...]:
    """Returns the pieces of `size` bytes from byte `start` on, counted over all pieces. Raises UserError beyond their end."""
    found: list[Piece] = []
    for piece in pieces:
        first, last = max(start, 0), min(start + size, piece.size)
        if first < last:
            found.append(Piece(piece.file, piece.start + first, last - first, piece.crc if last - first == piece.size else 0))
        start -= piece.size
    if sum(piece.size for piece in found) != size:
        raise UserError("its shards hold fewer elements than its shapes need")
    return tuple(found)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
