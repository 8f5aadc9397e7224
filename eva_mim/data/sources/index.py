"""Index of a dataset's records: one file of columns, made once, memory-mapped by every rank and loader worker, and checked
for staleness.

It is a safetensors file in the cache folder (`$EVA_MIM_CACHE`, else `~/.cache/eva-mim`). All processes of a machine share
its pages in the page cache; a pickled `Index` holds only its path and facts.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from eva_mim.core.distributed import is_main, local_rank, run_on
from eva_mim.core.errors import UserError
from eva_mim.core.files import replacing
from eva_mim.core.log import duration, say
from eva_mim.core.settings import digest

VERSION = 7
"""Version of the columns' layout, which is part of every file's name."""
DTYPES = {"U8": np.uint8, "U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64}
"""safetensors' names of the columns' types."""
Column = npt.NDArray[Any]


class Content(NamedTuple):
    """Columns and facts of an index before it is written. `facts` must have a "fingerprint" of the records and their order."""

    columns: dict[str, Column]
    facts: dict[str, str]


class Texts:
    """Strings for a column: their concatenated bytes, and the end of each string."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("Q")

    def add(self, text: str) -> None:
        """Appends a string."""
        self._bytes += text.encode("utf-8", "surrogatepass")  # file names need not be UTF-8
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def columns(self, name: str) -> dict[str, Column]:
        """Returns the columns that `Index.text` reads."""
        return {name: np.frombuffer(self._bytes, np.uint8), f"{name}.ends": narrow(np.frombuffer(self._ends, np.uint64))}


class Index:
    """Columns by name, read-only and shared with every process that has the file open."""

    def __init__(self, path: Path):
        """Opens the file. Raises OSError or SafetensorError for a file that is no index."""
        self.path = path
        with safe_open(path, framework="numpy") as checked:  # checks that the header fits the file
            self.facts: dict[str, str] = checked.metadata() or {}
        with path.open("rb") as file:
            start = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start))
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._columns = {
            name: np.frombuffer(self._mapped, DTYPES[entry["dtype"]], entry["shape"][0], 8 + start + entry["data_offsets"][0])
            for name, entry in header.items() if name != "__metadata__"
        }

    def __getitem__(self, name: str) -> Column:
        return self._columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def text(self, name: str, row: int) -> str:
        """Returns one string of a column of `Texts`."""
        ends = self._columns[f"{name}.ends"]
        return self._columns[name][ends[row - 1] if row else 0 : ends[row]].tobytes().decode("utf-8", "surrogatepass")

    def texts(self, name: str) -> list[str]:
        """Returns all strings of a column of `Texts`; meant for short columns."""
        return [self.text(name, row) for row in range(len(self._columns[f"{name}.ends"]))]

    def __reduce__(self) -> tuple[Any, ...]:
        return reopen, (self.path, self.facts)


def reopen(path: Path, facts: dict[str, str]) -> Index:
    """Opens the same index in another process. Raises UserError if the file's fingerprint is not that of `facts`."""
    index = Index(path)
    if index.facts["fingerprint"] != facts["fingerprint"]:
        raise UserError(f"{path}: the data set changed and was indexed anew while this run read it; start the run again")
    return index


def open_index(name: Any, fresh: Callable[[Index], bool], make: Callable[[], Content], what: str) -> Index:
    """Returns the index of the name `name` (JSON-able). If it is missing or not `fresh`, rank 0 makes it while the others
    wait.

    Every rank must call. On hosts that do not see rank 0's file, their first process makes another. `what` names the data in
    messages. Raises UserError on every rank if `make` raises it, and if hosts see different data.
    """
    path = cache_folder() / f"{digest([VERSION, name])[:24]}.index"

    def ensure() -> str:
        index = read_index(path)
        if index is None or not fresh(index):
            index = write_index(path, make())
        return index.facts["fingerprint"]

    found = run_on(ensure, is_main()) | run_on(ensure, local_rank() == 0 and not is_main())
    if len(set(found.values())) > 1:
        raise UserError(f"{what}: hosts see different files (rank: fingerprint {found})")
    return Index(path)


def read_index(path: Path) -> Index | None:
    """Reads the index in a file; returns None if the file is missing or damaged."""
    try:
        return Index(path)
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


def write_index(path: Path, content: Content) -> Index:
    """Writes an index under a name of this process, flushes it to disk, renames it, and returns it opened. Raises UserError if
    the cache folder cannot be written."""
    # Names of files, which facts may hold, need not be UTF-8.
    facts = {name: text.encode("utf-8", "backslashreplace").decode() for name, text in content.facts.items()}
    try:
        with replacing(path, writer=f".{socket.gethostname()}.{os.getpid()}") as temporary:
            save_file({name: np.ascontiguousarray(column) for name, column in content.columns.items()}, temporary, facts)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path.parent}: cannot keep an index here ({error}); set EVA_MIM_CACHE to another folder") from None
    return Index(path)


def narrow(numbers: Column) -> Column:
    """Returns non-negative integers as uint32 where all fit, else as uint64."""
    return numbers.astype(np.uint32 if not len(numbers) or int(numbers.max()) < 2**32 else np.uint64)


def cache_folder() -> Path:
    """Returns the folder of indexes, unpacked shards and features, made if missing. Raises UserError if it cannot be made."""
    folder = Path(os.environ.get("EVA_MIM_CACHE", Path.home() / ".cache" / "eva-mim"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; set EVA_MIM_CACHE to a folder that can be written") from None
    return folder


def say_indexed(what: str, records: int, seconds: float) -> None:
    """Logs the number of indexed records and the time that it took."""
    say(f"  indexed {what}: {records} records in {duration(seconds)}")
