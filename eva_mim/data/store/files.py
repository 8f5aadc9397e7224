"""Files of stored features: of frozen networks, for numbered views of images. `write.py` makes them.

    DIR/store.json                          what the features depend on, and how they are stored
    DIR/train/view-0003/000012.safetensors  rows 12 * S and following, of view 3: for each network "NAME.spatial" [S, N, C],
                                            "NAME.summary" [S, C], perhaps "NAME.scale" [S, N], "NAME.caption" [S, C]; "present"
                                            [S], perhaps "label" [S]
    DIR/val/view-0000/...                   held-out images, in their one view
    DIR/pca.safetensors                     with principal components: "NAME.mean" [C], "NAME.components" [P, C]; above P for C
    DIR/index.json                          size and SHA-256 of every file; written last: without it the store is not whole

Nothing of a crop is stored: a view is a function of seed, number and image.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
ROWS, SUMMARIES = 256, 1024
"""Rows of a file with spatial features, and of one with summaries alone."""
OPEN_FILES = 512
"""Files that a process keeps open."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""Types of stored spatial features; fp8 and int8 have a scale for each patch. Summaries are fp32."""
LARGEST = {"fp8": 448.0, "int8": 127.0}
"""Largest value of the types with a scale, which a patch's largest value becomes."""
Dtype = Literal["fp32", "bf16", "fp16", "fp8", "int8"]


class SplitFacts(BaseModel, extra="forbid", frozen=True):
    """The images of a split that are stored."""

    images: int | list[int]
    """Number of the first ones, or positions in the source, rising."""
    views: int = 1
    """Of each image."""
    hidden: int | None = None
    """M, if only the patches that the mask of a view hides are stored, in rising order, and zeros for the rest of M; None: all N
    patches."""

    @property
    def positions(self) -> Sequence[int]:
        """Positions in the source, one a row."""
        return range(self.images) if isinstance(self.images, int) else self.images


class NetworkFacts(BaseModel, extra="forbid", frozen=True):
    """What is stored of a network."""

    patches: int
    """N, 0 if only summaries are stored."""
    width: int
    """C of spatial features."""
    summary: int
    """Width of a summary."""
    caption: int = 0
    """Width of the embedding of a view's caption; 0 if none is stored."""
    network: dict[str, Any]
    """What its features depend on, with the SHA-256 of its weights."""


class StoreFacts(BaseModel, extra="forbid", frozen=True):
    """What stored features depend on, and how they are stored."""

    format: Literal[2] = 2
    networks: dict[str, NetworkFacts]
    inputs: dict[str, Any]
    """All else that the features depend on: images, views, precision."""
    splits: dict[str, SplitFacts]
    labels: bool = False
    """True if each row has the label of its image."""
    dtype: Dtype = "fp32"
    components: int | None = None
    """Number of principal components that are stored of spatial features; None: the features themselves."""
    variance: dict[str, float] = {}
    """Share of the variance that these keep, by network, on the images of which they were found."""

    @property
    def file_rows(self) -> int:
        """S, rows of a file."""
        return ROWS if any(one.patches for one in self.networks.values()) else SUMMARIES

    def empty(self, split: str, rows: int) -> dict[str, Tensor]:
        """Returns the tensors of a file of so many rows of a split, all zeros."""
        hidden = self.splits[split].hidden
        made = {"present": torch.zeros(rows, dtype=torch.uint8)}
        if self.labels:
            made["label"] = torch.zeros(rows, dtype=torch.int64)
        for name, one in self.networks.items():
            made[f"{name}.summary"] = torch.zeros(rows, one.summary)
            if one.caption:
                made[f"{name}.caption"] = torch.zeros(rows, one.caption)
            patches = one.patches if hidden is None else min(hidden, one.patches)
            if patches:
                made[f"{name}.spatial"] = torch.zeros(rows, patches, self.components or one.width, dtype=DTYPES[self.dtype])
            if patches and self.dtype in LARGEST:
                made[f"{name}.scale"] = torch.zeros(rows, patches)
        return made

    def bytes_of_row(self, split: str) -> int:
        """Returns the bytes of the features of one view of one image of a split."""
        return sum(tensor.nbytes for tensor in self.empty(split, 1).values())

    def rows(self) -> int:
        """Returns the number of rows of all files."""
        return sum(len(split.positions) * split.views for split in self.splits.values())

    def bytes(self) -> int:
        """Returns the bytes of all features."""
        return sum(self.bytes_of_row(name) * len(one.positions) * one.views for name, one in self.splits.items())

    def identity(self) -> dict[str, Any]:
        """Returns all facts in JSON's types, those of `inputs` beside the others."""
        facts = self.model_dump(mode="json")
        return {**facts.pop("inputs"), **facts}


class Basis(NamedTuple):
    """Principal components of a network's spatial features."""

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
    """Returns the principal components of each network; none if the features themselves are stored. Raises UserError."""
    if facts.components is None:
        return {}
    try:
        found = load_file(folder / PCA)
        return {name: Basis(found[f"{name}.mean"], found[f"{name}.components"]) for name in facts.networks}
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


def unpacked(spatial: Tensor, scale: Tensor | None = None) -> Tensor:
    """Returns stored features [B, N, C]: with a scale in fp32, else as they are stored."""
    return spatial if scale is None else spatial.float() * scale[..., None]


class FeatureStore:
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
        self._rows = {name: _row_numbers(split) for name, split in self.facts.splits.items()}

    def row(self, split: str, view: int, index: int, networks: Collection[str] | None = None) -> dict[str, Tensor]:
        """Returns the tensors of one image, without the first dimension, by the names in a file: of all networks, or of some.
        Raises UserError for an image without features."""
        number, row = divmod(self._rows[split][index], self.facts.file_rows)
        file = _opened(str(self.folder / file_name(split, view, number)))
        try:
            found = {name: file.get_slice(name)[row] for name in file.keys()  # noqa: SIM118
                     if networks is None or "." not in name or name.partition(".")[0] in networks}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.folder}: row {row} of {split}: {error}") from None
        if not found.pop("present"):
            raise UserError(f"{self.folder}: image {index} of {split} could not be read when the cache was made")
        return found

    def mapped(self, split: str, view: int = 0) -> list[dict[str, Tensor]]:
        """Returns the tensors of each file of a view, in order, by their names in it: mapped into memory, so that they are read
        when they are looked at. What is written into them reaches no file. Raises UserError."""
        count = -(-len(self.facts.splits[split].positions) // self.facts.file_rows)
        paths = [self.folder / file_name(split, view, number) for number in range(count)]
        try:
            return [load_file(path) for path in paths]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.folder}: {error}") from None

    def damaged(self, progress: Progress | None = None) -> list[str]:
        """Returns the files whose bytes are not those that were written. It reads all."""
        found = []
        for name, known in self.files.items():
            if sha256(self.folder / name) != known["sha256"]:
                found.append(name)
            if progress is not None:
                progress.advance()
        return found


def hidden_places(masked: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns of masks [B, N] the places of the hidden patches in rising order [B, count], and which of these are there."""
    places = masked.int().sort(dim=1, descending=True, stable=True).indices[:, :count]
    return places, masked.gather(1, places)


def _row_numbers(split: SplitFacts) -> Mapping[int, int] | Sequence[int]:
    """Returns the row of each stored position."""
    return range(split.images) if isinstance(split.images, int) else {place: row for row, place in enumerate(split.images)}


@lru_cache(OPEN_FILES)
def _opened(path: str) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {error}") from None


def file_name(split: str, view: int, number: int) -> str:
    """Returns the path of a file in a store."""
    return f"{split}/view-{view:04d}/{number:06d}.safetensors"


def read_facts(folder: Path) -> StoreFacts:
    """Returns the facts of a store, whole or not. Raises UserError."""
    try:
        return StoreFacts.model_validate_json((folder / STORE).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is no cache of features: it has no {STORE}") from None
    except (OSError, ValidationError) as error:
        raise UserError(f"{folder / STORE}: {str(error).splitlines()[0]}") from None
