"""Records that training and held-out images share: they are refused, since figures on them would say nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from eva_mim.core.contracts import Source
from eva_mim.core.distributed import run_on_main
from eva_mim.core.errors import UserError
from eva_mim.core.settings import few
from eva_mim.data.sources.folder import FolderSource
from eva_mim.data.sources.index import Column, Texts
from eva_mim.data.sources.lists import ListSource
from eva_mim.data.sources.shards import ShardSource

CHUNK = 2**16
"""Texts hashed at once."""
LOOKED_AT = 1000
"""Rows with equal hashes whose texts are compared."""
PRIME = np.uint64(0x100000001B3)
"""FNV's, an odd factor that spreads over 64 bits (IETF draft-eastlake-fnv)."""


def refuse_shared(train: Source, held_out: Source, train_path: str, held_out_path: str) -> None:
    """Raises UserError, with the first names, if records of two sources are the same files. The paths are those of the sources in
    the settings, such as "data.mixture.0"."""
    if found := shared(train, held_out):
        raise UserError(f"{train_path}.train and {held_out_path} share {few(found, 4)}: what is held out would be trained on; "
                        f"choose others by {train_path}.train or {held_out_path}")


def shared(train: Source, held_out: Source) -> list[str]:
    """Returns the shards, the folder or the files of lists that two sources share. Every rank must call."""
    if isinstance(train, ShardSource) and isinstance(held_out, ShardSource):
        return sorted(train.places & held_out.places)
    if isinstance(train, FolderSource) and isinstance(held_out, FolderSource):
        one, other = train.folder.resolve(), held_out.folder.resolve()
        nested = [str(inner) for inner, outer in ((other, one), (one, other)) if outer in (inner, *inner.parents)]
        return nested[:1] or run_on_main(lambda: sorted(_real_folders(train) & _real_folders(held_out))[:5])
    if isinstance(train, ListSource) and isinstance(held_out, ListSource):
        return run_on_main(lambda: _shared_rows(train, held_out))
    if isinstance(train, ListSource) and isinstance(held_out, FolderSource):
        return run_on_main(lambda: _below(held_out.folder, train))
    if isinstance(train, FolderSource) and isinstance(held_out, ListSource):
        return run_on_main(lambda: _below(train.folder, held_out))
    return []


def _real_folders(source: FolderSource) -> set[str]:
    """Returns the folders that hold images of a source, links resolved."""
    used = np.unique(source.index["folder"]).tolist()
    return {os.path.realpath(source.folder / source.folders[number]) for number in used}


def _below(folder: Path, rows: ListSource) -> list[str]:
    inside = str(folder.resolve()) + os.sep
    place = os.path.realpath(rows.folder)
    paths = (os.path.normpath(os.path.join(place, rows.key(row))) for row in range(len(rows)))
    return [path for path in paths if path.startswith(inside)][:5]


def _shared_rows(train: ListSource, held_out: ListSource) -> list[str]:
    base = os.path.realpath(train.folder)
    one, other = (_Paths(rows, base) for rows in (train, held_out))
    mine, theirs = hashes(*one.texts), hashes(*other.texts)
    alike = np.isin(theirs, mine).nonzero()[0][:LOOKED_AT]
    trained = {one.path(int(row)) for row in np.isin(mine, theirs[alike]).nonzero()[0][:LOOKED_AT]}
    return [name for name in (other.path(int(row)) for row in alike) if name in trained]


class _Paths:
    """The images of a list as paths relative to a folder, however they are spelled (`./a.jpg`, `b//../a.jpg`)."""

    def __init__(self, rows: ListSource, base: str):
        self._rows, self._base, self._folder = rows, base, os.path.realpath(rows.folder)
        content = rows.index["image"].tobytes()
        self._plain = self._folder == base and b"./" not in content and b"//" not in content
        columns = {name: rows.index[name] for name in ("image", "image.ends")}
        if not self._plain:
            texts = Texts()
            for row in range(len(rows)):
                texts.add(self.path(row))
            columns = texts.columns("image")
        self.texts = columns["image"], columns["image.ends"]
        """Column of `Texts`."""

    def path(self, row: int) -> str:
        """Returns the path of a row."""
        key = self._rows.key(row)
        return key if self._plain else os.path.relpath(os.path.join(self._folder, key), self._base)


def hashes(content: Column, ends: Column) -> npt.NDArray[np.uint64]:
    """Returns a 64-bit hash [rows] of each text of a column of `Texts`."""
    found = np.zeros(len(ends), np.uint64)
    for first in range(0, len(ends), CHUNK):
        begin = int(ends[first - 1]) if first else 0
        stops = ends[first : first + CHUNK].astype(np.int64) - begin
        starts = np.concatenate([[0], stops[:-1]])
        lengths = stops - starts
        places = np.arange(stops[-1]) - np.repeat(starts, lengths)
        powers = np.cumprod(np.full(int(lengths.max()) + 1, PRIME))
        values = (content[begin : begin + stops[-1]].astype(np.uint64) + np.uint64(1)) * powers[places]
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values, dtype=np.uint64)])
        found[first : first + CHUNK] = sums[stops] - sums[starts]
    return found
