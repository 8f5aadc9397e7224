"""Files of stored targets: features of frozen teachers for numbered views of every image. `write.py` makes them.

    DIR/store.json                          what the targets depend on, and how they are stored
    DIR/train/view-0003/000012.safetensors  rows 12 * SHARD and following, of view 3: for each teacher "NAME.spatial" [S, N, C],
                                            "NAME.summary" [S, C], perhaps "NAME.scale" [S, N]; and "present" [S]
    DIR/val/view-0000/...                   held-out images, in their one view
    DIR/pca.safetensors                     with principal components: "NAME.mean" [C], "NAME.components" [P, C]; above P for C
    DIR/index.json                          size and SHA-256 of every file; written last: without it the store is not whole

Nothing of a crop is stored: a view is a function of seed, number and image.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from eva_mim.core.errors import UserError
from eva_mim.core.files import sha256
from eva_mim.core.log import Progress
from eva_mim.core.run_folder import STORE, store_index

PCA = "pca.safetensors"
SHARD = 256
"""Rows of a file."""
OPEN_FILES = 512
"""Files that a process keeps open."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""Types of stored spatial features; fp8 and int8 have a scale for each patch. Summaries are fp32."""
LARGEST = {"fp8": 448.0, "int8": 127.0}
"""Largest value of the types with a scale, which a patch's largest value becomes."""
Dtype = Literal["fp32", "bf16", "fp16", "fp8", "int8"]


class StoreFacts(BaseModel, extra="forbid", frozen=True):
    """What stored targets depend on, and how they are stored."""

    format: Literal[1] = 1
    teachers: dict[str, dict[str, Any]]
    """By name: `Teacher.facts`, and the SHA-256 of the weights."""
    precision: str
    """Precision of the teachers' forward passes."""
    view: dict[str, Any]
    """Settings of the views, with their seed."""
    data: dict[str, Any]
    """`Splits.facts`, and the settings that make pixels of records."""
    views: int
    """Number of views of a training image."""
    val: list[int]
    """Positions of the held-out images that are stored, rising."""
    dtype: Dtype
    components: int | None = None
    """Number of principal components that are stored of spatial features; None: the features themselves."""
    variance: dict[str, float] = {}
    """Share of the variance that these keep, by teacher, on the images of which they were found."""

    def rows(self, split: str) -> int:
        """Returns the number of rows of a view of "train" or "val"."""
        return int(self.data["train"]) if split == "train" else len(self.val)

    def empty(self, rows: int) -> dict[str, Tensor]:
        """Returns the tensors of a file of so many rows, all zeros."""
        made = {"present": torch.zeros(rows, dtype=torch.uint8)}
        for name, teacher in self.teachers.items():
            patches = int(np.prod(teacher["grid"]))
            made[f"{name}.spatial"] = torch.zeros(rows, patches, self.components or teacher["width"], dtype=DTYPES[self.dtype])
            made[f"{name}.summary"] = torch.zeros(rows, teacher["summary_width"])
            if self.dtype in LARGEST:
                made[f"{name}.scale"] = torch.zeros(rows, patches)
        return made

    def bytes_of_row(self) -> int:
        """Returns the bytes of the targets of one view of one image."""
        return sum(tensor.nbytes for tensor in self.empty(1).values())

    def bytes(self) -> int:
        """Returns the bytes of all targets."""
        return self.bytes_of_row() * (self.rows("train") * self.views + self.rows("val"))


class Basis(NamedTuple):
    """Principal components of a teacher's spatial features."""

    mean: Tensor
    """[C]."""
    components: Tensor
    """[P, C] orthonormal rows."""

    def to(self, device: Any) -> Basis:
        """Returns the basis on the device."""
        return Basis(self.mean.to(device), self.components.to(device))

    def down(self, spatial: Tensor) -> Tensor:
        """Returns the coordinates [B, N, P] of features [B, N, C], in fp32."""
        return (spatial.float() - self.mean) @ self.components.T

    def up(self, coordinates: Tensor) -> Tensor:
        """Returns the features [B, N, C] of coordinates, in fp32."""
        return coordinates.float() @ self.components + self.mean


def read_bases(folder: Path, facts: StoreFacts) -> dict[str, Basis]:
    """Returns the principal components of each teacher; none if the features themselves are stored. Raises UserError."""
    if facts.components is None:
        return {}
    try:
        found = load_file(folder / PCA)
        return {name: Basis(found[f"{name}.mean"], found[f"{name}.components"]) for name in facts.teachers}
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{folder / PCA}: {error}") from None


def packed(spatial: Tensor, dtype: Dtype) -> tuple[Tensor, Tensor | None]:
    """Returns features [B, N, C] as they are stored, and for fp8 and int8 the scale of each patch [B, N]."""
    if dtype not in LARGEST:
        return spatial.to(DTYPES[dtype]), None
    exact = spatial.float()
    scale = exact.abs().amax(-1) / LARGEST[dtype]
    scaled = exact / scale.clamp(min=1e-30)[..., None]
    return (scaled.round() if dtype == "int8" else scaled).to(DTYPES[dtype]), scale


def unpacked(spatial: Tensor, scale: Tensor | None) -> Tensor:
    """Returns stored features [B, N, C]: with a scale in fp32, else as they are stored."""
    return spatial if scale is None else spatial.float() * scale[..., None]


class TargetStore:
    """A whole store, open for reading. Any number of processes may read it."""

    def __init__(self, folder: Path):
        """Raises UserError for a folder that is no store, one that is not whole, and a file of another size."""
        index = store_index(folder)
        self.folder, self.facts = folder, read_facts(folder)
        try:
            self.files: dict[str, dict[str, Any]] = json.loads(index.read_text())["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index}: {error}") from None
        for name, known in self.files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != known["size"]:
                raise UserError(f"{path} is missing or has another size than {index} says")
        self.bases = read_bases(folder, self.facts)
        self._val = {index: row for row, index in enumerate(self.facts.val)}

    def row(self, split: str, view: int, index: int) -> dict[str, Tensor]:
        """Returns the tensors of one image, without the first dimension, by the names in a file. Raises UserError for an image
        without targets."""
        row = index if split == "train" else self._val[index]
        file = _opened(str(self.folder / shard_name(split, view, row // SHARD)))
        try:
            found = {name: file.get_slice(name)[row % SHARD] for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.folder}: row {row} of {split}: {error}") from None
        if not found.pop("present"):
            raise UserError(f"{self.folder}: image {index} of {split} could not be read when the cache was made")
        return found

    def damaged(self, progress: Progress | None = None) -> list[str]:
        """Returns the files whose bytes are not those that were written. It reads all."""
        found = []
        for name, known in self.files.items():
            if sha256(self.folder / name) != known["sha256"]:
                found.append(name)
            if progress is not None:
                progress.advance()
        return found


@lru_cache(OPEN_FILES)
def _opened(path: str) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {error}") from None


def shard_name(split: str, view: int, shard: int) -> str:
    """Returns the path of a file in a store."""
    return f"{split}/view-{view:04d}/{shard:06d}.safetensors"


def read_facts(folder: Path) -> StoreFacts:
    """Returns the facts of a store, whole or not. Raises UserError."""
    try:
        return StoreFacts.model_validate_json((folder / STORE).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is no cache of targets: it has no {STORE}") from None
    except (OSError, ValidationError) as error:
        raise UserError(f"{folder / STORE}: {str(error).splitlines()[0]}") from None
