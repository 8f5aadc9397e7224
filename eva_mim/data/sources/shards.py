"""Tar shards in WebDataset layout (`KEY.jpg KEY.cls KEY.txt KEY.json`), read by offset in any order.

Each shard is indexed once (`tar_index.py`), and the indexes of a split's shards are concatenated (`shard_index.py`).
Compressed shards are unpacked before (`unpack.py`). No file is written under a name that an archive chose.
"""

from __future__ import annotations

import json
import math
import os
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from eva_mim.core.contracts import Blocks, Sample
from eva_mim.core.distributed import is_main, run_on
from eva_mim.core.errors import UserError
from eva_mim.core.log import say
from eva_mim.core.settings import digest, few
from eva_mim.core.timing import phase
from eva_mim.data import RGB, Pixels, SourceSettings
from eva_mim.data.prompts import class_file, class_words
from eva_mim.data.sources.captions import CaptionFile, open_captions, record_captions
from eva_mim.data.sources.decode import FileSource, Raw
from eva_mim.data.sources.index import Column
from eva_mim.data.sources.masks import MaskClasses, mask_classes
from eva_mim.data.sources.remote import as_url, listed, read_range, read_ranges
from eva_mim.data.sources.shard_index import shards_index
from eva_mim.data.sources.split_names import looks_held_out
from eva_mim.data.sources.tar_index import BLOCK, FIELDS, NO_LABEL, NO_NUMBER, Shard, found
from eva_mim.data.sources.unpack import unpack
from eva_mim.data.sources.videos import FrameFiles, require_decoder

MAX_OPEN = 512
"""Maximum number of shards that a process holds open; systems allow about a thousand files. Two pools fit into it: a loader
process may be at the end of one pool and at the start of the next."""
BLOCKS = 64
"""Blocks in a pool of large shards: each block is read in sequence, and a batch comes from about this many places."""
MAX_TOGETHER = 2**22
"""Maximum number of bytes around a remote record that are read by one request, including other members between its fields."""


def cut_shards(sizes: Sequence[int], ends: Sequence[int], pool: float) -> Blocks | None:
    """Returns the blocks for a shuffle in pools of `pool` bytes; None if all records fit into one pool. `sizes`: bytes of each
    shard; `ends`: end of each shard's records. A block lies in one shard and has at most 1 / `BLOCKS` of a pool; small shards
    give more and smaller blocks."""
    total = sum(sizes)
    if total <= pool:
        return None
    pieces = [math.ceil(size * BLOCKS / pool) for size in sizes]
    cuts = [np.linspace(start, end, count + 1)[1:].round() for start, end, count in zip([0, *ends], ends, pieces, strict=False)]
    found = np.unique(np.concatenate(cuts).astype(np.int64))
    found = found[found > 0]
    return Blocks(found, max(1, min(MAX_OPEN // 2, round(len(found) * pool / total))))


class ShardSource(FileSource):
    """Records of several shards, in the order of `paths`."""

    def __init__(
        self, paths: Sequence[Path | Shard], classes: tuple[str, ...] | None, caption_lines: bool = False,
        pixels: Pixels = RGB, *, skip_bad: bool = False,
    ):
        """`skip_bad`: damaged shards are left out and named in the log, not refused. Every rank must call. Raises UserError for
        shards that cannot be used."""
        self.classes = classes
        self.captions: CaptionFile | None = None
        self.blocks: Blocks | None = None
        self._caption_lines, self._pixels = caption_lines, pixels
        shards = self.shards = [found(path) if isinstance(path, Path) else path for path in paths]
        self.index = shards_index(shards, skip_bad)
        if remarks := self.index.facts["remarks"]:
            say(f"  {shards[0].folder}: {remarks}")
        if left_out := json.loads(self.index.facts["left_out"]):
            names = few(shards[number].name for number in left_out)
            say(f"  data.bad_shards: {len(left_out)} of {len(shards)} shards in {shards[0].folder} are left out: {names}")
        self._ends: list[int] = self.index["shards"].tolist()
        self._names = [shard.name for shard in shards]
        self.places = {shard.place if shard.remote else os.path.realpath(shard.place) for shard in shards}
        self._tars = [shard if number in left_out else unpack(shard) for number, shard in enumerate(shards)]
        self._open: dict[tuple[int, int], BinaryIO] = {}
        self._asked: dict[int, None] = {}
        self._last: tuple[int, int, bytes] | None = None
        self._arrived: dict[int, tuple[int, bytes]] = {}
        self.fingerprint = self.index.facts["fingerprint"]

    def __len__(self) -> int:
        return len(self.index["image"])

    def key(self, index: int) -> str:
        """Returns SHARD/KEY."""
        return f"{self._names[self._shard(index)]}/{self.index.text('key', index)}"

    def raw(self, index: int) -> Raw:
        """Reads one record. Raises ValueError for a record without image or with an invalid label, and OSError."""
        self._read_ahead(index)
        with phase("read"):
            content = self._bytes(index, "video" if self.videos else "image")
        if content is None:
            raise ValueError(f"no {'video' if self.videos else 'image'} member")
        mask = self._bytes(index, "mask") if self.mask_classes else None
        return Raw(self.key(index), content, self._label(index), self.captions_of(index), mask)

    def _label(self, index: int) -> int | None:
        """Returns the label of a record; None for one without. Raises ValueError for one that is no class."""
        label = int(self.index["label"][index]) if self.classes else NO_LABEL
        if label == NO_NUMBER or (self.classes and label >= len(self.classes)):
            raise ValueError(f"its label is none of the {len(self.classes or ())} classes")
        return label if label != NO_LABEL else None

    def captions_of(self, index: int) -> tuple[str, ...]:
        """Returns the captions of a record. Raises ValueError for malformed ones, and OSError."""
        if self.captions:
            return self.captions[index]
        return record_captions(self._bytes(index, "text"), self._bytes(index, "described"), self._caption_lines)

    def class_counts(self) -> Column | None:
        """Returns [K] int64, the number of images of each class; None without classes."""
        labels = self.index["label"]
        return None if self.classes is None else np.bincount(labels[labels >= 0], minlength=len(self.classes))

    def unlabelled(self) -> Sequence[int]:
        """Returns the positions of records without KEY.cls, in rising order; none without a class list."""
        found: list[int] = (self.index["label"] == NO_LABEL).nonzero()[0].tolist() if self.classes else []
        return found

    @property
    def unnamed(self) -> bool:
        """True if the records have labels but no class list names them; the labels are then not read."""
        return self.classes is None and bool((self.index["label"] >= 0).any())

    def keys(self) -> Iterator[str]:
        """Yields the records' keys without their shard, which are the keys in a caption file."""
        return (self.index.text("key", index) for index in range(len(self)))

    def check_labels(self, setting: str) -> None:
        """Raises UserError if a label does not fit the class list, so that the mistake is found before training. `setting` names
        the list in the message."""
        labels = self.index["label"]
        wrong = ((labels == NO_NUMBER) | (labels >= len(self.classes or ()))).nonzero()[0]
        if self.classes is not None and len(wrong):
            label = int(labels[wrong[0]])
            raise UserError(f"data.classes: {setting} has {len(self.classes)} names, but {self.key(int(wrong[0]))} has "
                            f"{'a label that is no number' if label == NO_NUMBER else f'label {label}'}")

    def read_masks(self, classes: MaskClasses) -> None:
        """Reads each record's mask from here on. Raises UserError if no record has one."""
        if "mask" not in self.index:
            raise UserError(f"data.segmentation: no record of {self.shards[0].folder} has a mask (KEY.seg.png, KEY.mask.png)")
        self.mask_classes = classes
        self.fingerprint = digest([self.fingerprint, classes.fingerprint])

    def read_videos(self) -> None:
        """Reads videos from here on: video files, or the frames of records without one. Raises UserError if no record has any."""
        if "video" in self.index:
            require_decoder()
        elif "frames" not in self.index:
            raise UserError(f"data.video: no record of {self.shards[0].folder} has a video (KEY.mp4, KEY.000.jpg)")
        self.videos = True
        self.fingerprint = digest([self.fingerprint, "videos"])

    def video(self, index: int) -> Sample:
        """Returns a video; its frames are read later. Raises the errors of `raw`, and PyAV's."""
        if "frames" not in self.index or ("video" in self.index and self.index["video"][index]):
            return super().video(index)
        first, end = int(self.index["frames.ends"][index - 1]) if index else 0, int(self.index["frames.ends"][index])
        if first == end:
            raise ValueError("no video member, and no frames")
        frames = FrameFiles(end - first, lambda place: self._member(self._shard(index), "frames", first + place))
        return Sample(self.key(index), frames, self._label(index), self.captions_of(index))

    def cut(self, pool: float) -> Blocks | None:
        """Returns the blocks of this source; see `cut_shards`."""
        return cut_shards([tar.size for tar in self._tars], self._ends, pool)

    def _shard(self, index: int) -> int:
        return bisect_right(self._ends, index)

    def _bytes(self, index: int, field: str) -> bytes | None:
        if field not in self.index or not self.index[field][index]:
            return None
        return self._member(self._shard(index), field, index, index)

    def _member(self, number: int, field: str, place: int, record: int | None = None) -> bytes:
        """Returns the bytes of a member of a shard by its place in a column. `record`: whose fields come with one request, if the
        shard is remote; None: it is read alone."""
        start, size = int(self.index[field][place]) * BLOCK, int(self.index[f"{field}.size"][place])
        if not self._tars[number].remote:
            content = os.pread(self._opened(number).fileno(), size, start)
        elif record is None:
            content = read_range(self._tars[number].place, start, start + size)
        else:
            content = self._fetched(record, number, start, size)
        if len(content) < size:
            raise ValueError(f"{self._names[number]} ends after {len(content)} of its {size} bytes")
        return content

    def prefetch(self, indices: Sequence[int]) -> None:
        """Reads remote records together, if the driver supports it."""
        asked = {index: span for index in indices if self._tars[self._shard(index)].remote and (span := self._span(index))}
        with phase("read"):
            found = zip(asked.items(), read_ranges(list(asked.values())), strict=True)
        self._arrived = {index: (span[1], content) for (index, span), content in found if content is not None}

    def _span(self, index: int) -> tuple[str, int, int] | None:
        """Returns (URL, start, end) around a record; None if it has no fields, or if they are too far apart for one request."""
        fields = [field for field in FIELDS if field in self.index and self.index[field][index]]
        starts = [int(self.index[field][index]) * BLOCK for field in fields]
        ends = [first + int(self.index[f"{field}.size"][index]) for field, first in zip(fields, starts, strict=True)]
        if not fields or max(ends) - min(starts) > MAX_TOGETHER:
            return None
        return str(self._tars[self._shard(index)].place), min(starts), max(ends)

    def _fetched(self, index: int, number: int, start: int, size: int) -> bytes:
        """Returns the bytes of one field of a remote record; fields that are close together in the file come with one request."""
        if self._last is None or self._last[0] != index:
            arrived, span = self._arrived.pop(index, None), self._span(index)
            if span is None:
                return read_range(self._tars[number].place, start, start + size)
            self._last = index, *(arrived or (span[1], read_range(*span)))
        _, first, content = self._last
        return content[start - first : start - first + size]

    def _read_ahead(self, index: int) -> None:
        """Requests, once a block and process, that the system reads a block in sequence into its page cache, which all processes
        share."""
        if self.blocks is None or self._tars[self._shard(index)].remote or sys.platform != "linux":
            return
        block = int(np.searchsorted(self.blocks.ends, index, side="right"))
        if block in self._asked:
            return
        while len(self._asked) >= 2 * self.blocks.pooled:
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
            self._open[place] = self._tars[number].open()
        file, tar = self._open[place], self._tars[number]
        stat = os.fstat(file.fileno())
        if (stat.st_size, str(stat.st_mtime_ns)) != tar[1:]:
            raise UserError(f"{tar.place}: has changed since this run opened it; start the run again, which indexes it anew")
        return file

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}, "_asked": {}, "_last": None, "_arrived": {}}


def open_shards(settings: SourceSettings, split: str) -> ShardSource | None:
    """Returns the source of a split ("train" or "val"); None if the split has no pattern. Raises UserError for shards that are
    missing or cannot be used."""
    root, pattern = settings.own_root, settings.train if split == "train" else settings.val
    if pattern is None and split == "val":
        return None
    paths = _find(root, pattern or "*.tar*", split)
    if not paths:
        raise UserError(f"data.{split}: no shard matches {as_url(root) or root}/{pattern or '*.tar*'}")
    if settings.train is None and settings.val is None and (named := looks_held_out(path.name for path in paths)):
        raise UserError(f"data.train: {as_url(root) or root} has {few(named, 3)} beside other shards. If they are held out, set "
                        "data.train and data.val, such as data.train='train-*'; to train on all of them, set data.train='*.tar*'")
    if as_url(root) is not None:
        _refuse_names_by_url(settings)
    classes, skip_bad = class_file(settings) or class_words(settings), settings.bad_shards == "skip"
    source = ShardSource(paths, classes, settings.caption_lines, settings.pixels, skip_bad=skip_bad)
    if settings.video is not None:
        source.read_videos()
    if (masks := mask_classes(settings)) is not None:
        source.read_masks(masks)
    source.check_labels(str(settings.classes or settings.class_names))
    source.blocks = source.cut(settings.shuffle_gb * 1e9)
    records = f"records of {as_url(root) or root}/{pattern or '*.tar*'}"
    source.captions = open_captions(settings, split, source.keys, source.index.facts["stamp"], records)
    return source


def _find(root: Path, pattern: str, split: str) -> Sequence[Path | Shard]:
    if Path(pattern).is_absolute():
        raise UserError(f"data.{split}: {pattern} must be a pattern below data.root={root}")
    if (url := as_url(root)) is not None:
        return run_on(lambda: [Shard(*file) for file in listed(url, pattern)], is_main())[0]
    if not root.is_dir():
        raise UserError(f"data.root: {root} is not a folder")
    return sorted(root.glob(pattern))


def _refuse_names_by_url(settings: SourceSettings) -> None:
    names = {"classes": settings.classes, "captions": settings.captions, "val_captions": settings.val_captions,
             "class_names": None if settings.class_names == "imagenet" else settings.class_names}
    for setting, name in names.items():
        if name is not None and not Path(name).is_absolute():
            raise UserError(f"data.{setting}: {name} must be the absolute path of a file here, since data.root is a URL")
