"""Tar shards in WebDataset layout (`KEY.jpg KEY.cls KEY.txt KEY.json`), read by offset in any order.

Each shard is indexed once (`tars.py`), and the shards of a split are joined in one index. Compressed ones are unpacked before
(`unpack.py`). Nothing is ever written under a name that an archive chose.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import BinaryIO

import numpy as np

from eva_mim.config import UserError, digest, few
from eva_mim.contracts import Blocks, Sample
from eva_mim.data import SourceSettings
from eva_mim.data.captions import CaptionFile, open_captions, record_captions
from eva_mim.data.decode import Raw
from eva_mim.data.index import Column, Content, Index, Progress, narrow, open_index, say_indexed
from eva_mim.data.names import class_file, class_words
from eva_mim.data.tars import BLOCK, NO_LABEL, NO_NUMBER, BadShard, Shard, found, tar_index
from eva_mim.data.unpack import hold, make_room, plain, unpack
from eva_mim.log import say
from eva_mim.phases import phase

MAX_OPEN = 128
"""Shards that a process holds open; systems allow about a thousand files."""
POOLED = MAX_OPEN // 2
"""Blocks that are shuffled together: loader processes may be at the end of one pool and at the start of the next."""
SHARDS_A_PROCESS = 4
"""Fewer shards to index are not worth another process."""
MAX_PROCESSES = 16


class ShardSource:
    """Records of several shards, in the order of the sorted file names."""

    def __init__(
        self, paths: Sequence[Path], classes: tuple[str, ...] | None, caption_lines: bool = False, skip_bad: bool = False
    ):
        """`skip_bad`: damaged shards are left out and named, not refused. Every rank must call. Raises UserError."""
        self.classes = classes
        self.captions: CaptionFile | None = None
        self.blocks: Blocks | None = None
        self._caption_lines = caption_lines
        shards = [found(path) for path in paths]
        self._held = hold(shards)
        self.index = shards_index(shards, skip_bad)
        if left_out := json.loads(self.index.facts["left_out"]):
            names = few(shards[number].name for number in left_out)
            say(f"  data.bad_shards: {len(left_out)} of {len(shards)} shards in {paths[0].parent} are left out: {names}")
        self._ends: list[int] = self.index["shards"].tolist()
        self._names = [shard.name for shard in shards]
        self._tars = [found(plain(shard)) if shard.packed and number not in left_out else shard
                      for number, shard in enumerate(shards)]
        self._open: dict[tuple[int, int], BinaryIO] = {}
        self._asked: dict[int, None] = {}
        self.fingerprint = self.index.facts["fingerprint"]

    def __len__(self) -> int:
        return len(self.index["image"])

    def key(self, index: int) -> str:
        """SHARD/KEY."""
        return f"{self._names[self._shard(index)]}/{self.index.text('key', index)}"

    def read(self, index: int) -> Sample:
        """Decode one record as RGB. Raises ValueError for a record without image or with a label that does not fit."""
        return self.raw(index).sample()

    def raw(self, index: int) -> Raw:
        """Read one record. Raises ValueError as `read` does."""
        self._read_ahead(index)
        with phase("read"):
            content = self._bytes(index, "image")
        if content is None:
            raise ValueError("no image member")
        label = int(self.index["label"][index]) if self.classes else NO_LABEL
        if label == NO_NUMBER or (self.classes and label >= len(self.classes)):
            raise ValueError(f"its label is none of the {len(self.classes or ())} classes")
        captions = self.captions[index] if self.captions else self._own_captions(index)
        return Raw(self.key(index), content, label if label != NO_LABEL else None, captions)

    def class_counts(self) -> Column | None:
        """Images of each class."""
        labels = self.index["label"]
        return None if self.classes is None else np.bincount(labels[labels >= 0], minlength=len(self.classes))

    def keys(self) -> list[str]:
        """The records' keys as a caption file has them: without their shard."""
        return self.index.texts("key")

    def check_labels(self, setting: str) -> None:
        """A class list that does not fit is found now and not in the third epoch. Raises UserError."""
        labels = self.index["label"]
        wrong = ((labels == NO_NUMBER) | (labels >= len(self.classes or ()))).nonzero()[0]
        if self.classes is not None and len(wrong):
            label = int(labels[wrong[0]])
            raise UserError(f"data.classes: {setting} has {len(self.classes)} names, but {self.key(int(wrong[0]))} has "
                            f"{'a label that is no number' if label == NO_NUMBER else f'label {label}'}")

    def cut(self, pool: float) -> Blocks | None:
        """Blocks of which `POOLED` have `pool` bytes, each within a shard; None where all shards together have no more."""
        sizes, ends = np.array([tar.size for tar in self._tars]), np.array([0, *self._ends])
        if sizes.sum() <= pool:
            return None
        pieces = np.ceil(sizes * POOLED / pool).astype(int)
        cuts = [np.linspace(start, end, count + 1)[1:].round() for start, end, count in zip(ends, ends[1:], pieces, strict=False)]
        found = np.unique(np.concatenate(cuts).astype(np.int64))
        return Blocks(found[found > 0], POOLED)

    def _own_captions(self, index: int) -> tuple[str, ...]:
        return record_captions(self._bytes(index, "text"), self._bytes(index, "described"), self._caption_lines)

    def _shard(self, index: int) -> int:
        return bisect_right(self._ends, index)

    def _bytes(self, index: int, field: str) -> bytes | None:
        block = int(self.index[field][index]) if field in self.index else 0
        if not block:
            return None
        number, size = self._shard(index), int(self.index[f"{field}.size"][index])
        content = os.pread(self._opened(number).fileno(), size, block * BLOCK)
        if len(content) < size:
            raise ValueError(f"{self._names[number]} ends after {len(content)} of its {size} bytes")
        return content

    def _read_ahead(self, index: int) -> None:
        """Ask the system, once a block and process, to read a block in sequence into its page cache, which processes share."""
        if self.blocks is None or sys.platform != "linux":
            return
        block = int(np.searchsorted(self.blocks.ends, index, side="right"))
        if block in self._asked:
            return
        while len(self._asked) >= 2 * POOLED:
            self._asked.pop(next(iter(self._asked)))
        self._asked[block] = None
        first, last = int(self.blocks.ends[block - 1]) if block else 0, int(self.blocks.ends[block]) - 1
        places, sizes = self.index["image"], self.index["image.size"]
        start, end = int(places[first]) * BLOCK, int(places[last]) * BLOCK + int(sizes[last])
        if end > start:
            os.posix_fadvise(self._opened(self._shard(index)).fileno(), start, end - start, os.POSIX_FADV_WILLNEED)

    def _opened(self, number: int) -> BinaryIO:
        place = os.getpid(), number  # a forked worker must not share a file position
        if place not in self._open:
            while len(self._open) >= MAX_OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[place] = self._tars[number].path.open("rb")
        file, tar = self._open[place], self._tars[number]
        stat = os.fstat(file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != (tar.size, tar.changed):
            raise UserError(f"{tar.path}: has changed since this run opened it; start the run again, which indexes it anew")
        return file

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}, "_asked": {}, "_held": None}


def open_shards(settings: SourceSettings, split: str) -> ShardSource | None:
    """The source of a split ("train" or "val"); None when it has no pattern. Raises UserError."""
    root, pattern = settings.own_root, settings.train if split == "train" else settings.val
    if pattern is None and split == "val":
        return None
    if not root.is_dir():
        raise UserError(f"data.root: {root} is not a folder")
    if Path(pattern or "").is_absolute():
        raise UserError(f"data.{split}: {pattern} must be a pattern below data.root={root}")
    paths = sorted(root.glob(pattern or "*.tar*"))
    if not paths:
        raise UserError(f"data.{split}: no shard matches {root / (pattern or '*.tar*')}")
    classes, skip_bad = class_file(settings) or class_words(settings), settings.bad_shards == "skip"
    source = ShardSource(paths, classes, settings.caption_lines, skip_bad)
    source.check_labels(str(settings.classes or settings.class_names))
    source.blocks = source.cut(settings.shuffle_gb * 1e9)
    source.captions = open_captions(settings, split, source.keys, f"records of {root / (pattern or '*.tar*')}")
    return source


def shards_index(shards: Sequence[Shard], skip_bad: bool) -> Index:
    """The indexes of shards joined: their columns one after another, and where each shard ends (`shards`). Numbers of bad ones
    are the fact "left_out". Raises UserError."""
    folder = shards[0].path.parent
    stamp = digest([(shard.size, shard.changed) for shard in shards])

    def fresh(index: Index) -> bool:
        left_out = json.loads(index.facts["left_out"])
        used = [shard for number, shard in enumerate(shards) if number not in left_out]
        return index.facts["stamp"] == stamp and all(plain(shard).exists() for shard in used)

    def make() -> Content:
        began = time.monotonic()
        bad = _index_each(shards)
        if bad and (not skip_bad or len(bad) == len(shards)):
            hint = "mend or remove them, or set data.bad_shards=skip to go on without them"
            raise UserError("\n".join([*list(bad.values())[:5], f"{len(bad)} of {len(shards)} shards cannot be used; {hint}"]))
        parts = {number: tar_index(shard, plain(shard)) for number, shard in enumerate(shards) if number not in bad}
        columns = _joined(list(parts.values()))
        sizes = [len(parts[number]["image"]) if number in parts else 0 for number in range(len(shards))]
        columns["shards"] = narrow(np.cumsum(sizes))
        used = [shards[number] for number in parts]
        if not columns["image"].any():
            raise UserError(f"{folder}: no images in {few((shard.name for shard in used), 3)} (members KEY.jpg, KEY.png)")
        if empty := [shards[number].name for number, part in parts.items() if not len(part["image"])]:
            say(f"  {folder}: {len(empty)} of {len(shards)} shards hold no records: {few(empty)}")
        if repeated := sum(int(part.facts["repeated"]) for part in parts.values()):
            say(f"  {folder}: {repeated} members have the name of another one in their shard; the last one counts")
        say_indexed(f"{len(used)} shards in {folder}", len(columns["image"]), time.monotonic() - began)
        fingerprint = digest([(shard.name, shard.size) for shard in used])
        return Content(columns, {"fingerprint": fingerprint, "stamp": stamp, "left_out": json.dumps(sorted(bad))})

    name = ["shards", [str(shard.path.resolve()) for shard in shards], skip_bad]
    return open_index(name, fresh, make, f"{folder}/{shards[0].name}, ...")


def _joined(parts: Sequence[Index]) -> dict[str, Column]:
    columns = {name: np.concatenate([part[name] for part in parts]) for name in ("image", "image.size", "label", "key")}
    for field in ("text", "described"):
        if any(part[field].any() for part in parts):
            columns |= {name: np.concatenate([part[name] for part in parts]) for name in (field, f"{field}.size")}
    starts = np.cumsum([0] + [len(part["key"]) for part in parts])
    columns["key.ends"] = narrow(
        np.concatenate([part["key.ends"] + start for part, start in zip(parts, starts[:-1], strict=True)])
    )
    return columns


def _index_each(shards: Sequence[Shard]) -> dict[int, str]:
    """Unpack and index every shard for which that has not been done, in several processes. By number, what is wrong with the bad
    ones. Raises UserError."""
    make_room(shards)
    progress, bad = Progress(f"indexing shards in {shards[0].path.parent}", len(shards)), dict[int, str]()
    for number, fault in enumerate(_each(shards)):
        progress.advance()
        if fault is not None:
            bad[number] = fault
    return bad


def _each(shards: Sequence[Shard]) -> Iterator[str | None]:
    processes = min(MAX_PROCESSES, len(os.sched_getaffinity(0)), len(shards) // SHARDS_A_PROCESS)
    if processes < 2:
        yield from map(_fault, shards)
        return
    # Spawned: a fork of a process with threads may hang.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _ignore_interrupts) as pool:
        try:
            yield from pool.map(_fault, shards)
        except BrokenProcessPool:
            raise UserError(f"{shards[0].path.parent}: a process that indexed shards was killed (for lack of memory?)") from None


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _fault(shard: Shard) -> str | None:
    try:
        tar_index(shard, unpack(shard))
    except BadShard as error:
        return str(error)
    return None
