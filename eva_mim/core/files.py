"""Atomic writing of files, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: Path, writer: str = "") -> Iterator[Path]:
    """Yields a temporary path in the same folder. The file written there is flushed to disk and renamed to `path` when the block
    ends; after an error it is removed, and `path` is unchanged. `writer` is a suffix that differs between processes which may
    write `path` at the same time."""
    temporary = path.with_name(f".{path.name}{writer}.tmp")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_weights(path: Path, weights: dict[str, Any]) -> None:
    """Writes a safetensors file atomically; `weights` are tensors by name."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in weights.items()}, temporary, metadata={"format": "pt"})


def fsync(path: Path) -> None:
    """Flushes a file to disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flushes the names in a folder to disk: only then does a rename survive a power cut."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content, hexadecimal."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            total.update(block)
    return total.hexdigest()


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the names and values of tensors in the order of their names, hexadecimal."""
    import torch

    total = hashlib.sha256()
    for name, value in sorted(weights.items()):
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
