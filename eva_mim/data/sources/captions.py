"""Captions of images: from the text of a record, from its JSON, or from one file with a line for each image."""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Callable, Iterable
from hashlib import blake2b
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from eva_mim.core.errors import UserError
from eva_mim.core.files import sha256
from eva_mim.core.log import Progress, say
from eva_mim.core.settings import few
from eva_mim.data import SourceSettings
from eva_mim.data.sources.index import Column, Content, narrow, open_index, say_indexed

Keys = Callable[[], Iterable[str]]


def record_captions(text: bytes | None, described: bytes | None, lines: bool) -> tuple[str, ...]:
    """Returns the captions in KEY.json (`described`), else in KEY.txt (`text`): the whole text, or with `lines` one a line.
    Raises ValueError for malformed files."""
    found = _described(json.loads(described)) if described is not None else ()
    if found or text is None:
        return found
    whole = text.decode()
    return tuple(line.strip() for line in whole.splitlines() if line.strip()) or ("",) if lines else (whole.strip(),)


def _described(value: Any) -> tuple[str, ...]:
    """Returns the texts under "captions", else under "caption"; none if both are missing or null. Raises ValueError for values of
    other types."""
    if not isinstance(value, dict):
        raise ValueError('expected {"captions": [...]} or {"caption": ...}')
    return as_captions(value["captions"] if value.get("captions") is not None else value.get("caption"))


def as_captions(value: Any) -> tuple[str, ...]:
    """Returns one text or a list of texts, stripped, as a tuple; an empty tuple for None. Raises ValueError for other types."""
    texts = [] if value is None else [value] if isinstance(value, str) else list(value) if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a caption must be a text, found {type(next(t for t in texts if not isinstance(t, str))).__name__}")
    return tuple(text.strip() for text in texts)


class CaptionFile:
    """Captions by record number, read from the lines of a file on demand. An index holds the byte offset of each line."""

    def __init__(self, path: Path, setting: str, keys: Keys, of: str, records: str):
        """`keys` returns the keys of all records in order, `of` is a value that changes with them, and `records` names the
        records in messages. Every rank must call. Raises UserError for malformed lines, and unless every record has a line of its
        own. Lines without a record are counted, and named in the log."""
        self.path = path
        stat = path.stat()
        self._stamp = f"{stat.st_size} {stat.st_mtime_ns}"

        def make() -> Content:
            began = time.monotonic()
            places = _places(path, setting, keys, records)
            say_indexed(f"{path}, for {records}", len(places), time.monotonic() - began)
            return Content({"place": narrow(places)}, {"fingerprint": sha256(path), "stamp": self._stamp})

        name = ["captions", str(path.absolute()), of]
        self.index = open_index(name, lambda index: index.facts["stamp"] == self._stamp, make, str(path))
        self.fingerprint = self.index.facts["fingerprint"]

    def __getitem__(self, record: int) -> tuple[str, ...]:
        with self.path.open("rb") as lines:
            stat = os.fstat(lines.fileno())
            if f"{stat.st_size} {stat.st_mtime_ns}" != self._stamp:
                raise UserError(f"{self.path}: has changed since this run opened it; start the run again")
            lines.seek(int(self.index["place"][record]))
            return _described(json.loads(lines.readline()))


def _places(path: Path, setting: str, keys: Keys, records: str) -> Column:
    """Returns the byte offset of each record's line. Raises UserError for every mistake of the file. Keys are compared by 64-bit
    hashes, since the keys of 14 million records are gigabytes of text."""
    lines, starts = _read_lines(path)
    wanted = np.fromiter((_number(key) for key in keys()), np.uint64)
    if len(repeated := _again(wanted)):
        raise UserError(f"{setting}: {len(np.unique(wanted[repeated]))} keys stand for several {records}, such as "
                        f"{next(islice(keys(), int(repeated[0]), None))}; captions by key cannot tell them apart")
    order = np.argsort(lines)
    found = np.searchsorted(lines, wanted, sorter=order)
    line = order[np.minimum(found, len(lines) - 1)] if len(lines) else np.zeros(len(wanted), np.int64)
    missing = (lines[line] != wanted).nonzero()[0] if len(lines) else np.arange(len(wanted))
    if len(missing):
        first = set(missing[:5].tolist())
        named = few(key for number, key in enumerate(islice(keys(), max(first) + 1)) if number in first)
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{setting}: {path} has no captions for {len(missing)} of the {len(wanted)} {records}: {named}{more}")
    if len(strangers := np.setdiff1d(np.arange(len(lines)), line)):
        named = few(sorted(_key_at(path, int(starts[number])) for number in strangers[:5]))
        say(f"  {path}: {len(strangers)} of {len(lines)} keys are none of the {len(wanted)} {records}: {named}"
            f"{' and more' if len(strangers) > 5 else ''}")
    return starts[line]


def _read_lines(path: Path) -> tuple[Column, Column]:
    """Returns the hash of each line's key and the byte offset of each line. Raises UserError for malformed lines and repeated
    keys."""
    numbers, starts, start, progress = array("Q"), array("Q"), 0, Progress(f"reading {path}, captions")
    with path.open("rb") as lines:
        for row, line in enumerate(lines, start=1):
            if line.strip():
                numbers.append(_number(_key(line, f"{path}:{row}")))
                starts.append(start)
                progress.advance()
            start += len(line)
    found = np.frombuffer(numbers, np.uint64), np.frombuffer(starts, np.uint64)
    if len(again := _again(found[0])):
        at = int(found[1][again[0]])
        with path.open("rb") as lines:
            row = sum(1 for _ in takewhile(lambda _: lines.tell() <= at, iter(lines.readline, b""))) + 1
        raise UserError(f"{path}:{row}: key {_key_at(path, at)} stands on an earlier line as well; give all its captions in one")
    return found


def _again(numbers: Column) -> Column:
    """Returns the positions of the numbers that occur at an earlier position as well."""
    return np.setdiff1d(np.arange(len(numbers)), np.unique(numbers, return_index=True)[1])


def _number(key: str) -> int:
    """Returns a 64-bit hash of a key; the chance that any two of 14 million keys have the same one is 5 in a million."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _key_at(path: Path, start: int) -> str:
    with path.open("rb") as lines:
        lines.seek(start)
        return str(json.loads(lines.readline())["key"])


def _key(line: bytes, where: str) -> str:
    try:
        value = json.loads(line)
        texts = _described(value)
        key = value["key"]
    except KeyError:
        raise UserError(f'{where}: no "key"') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a line of captions: {error}") from None
    if not isinstance(key, str):
        raise UserError(f"{where}: the key must be a text, not {key!r}")
    if not texts or "" in texts:
        raise UserError(f"{where}: {'an empty caption' if texts else 'no captions'} for key {key}")
    return key


def open_captions(settings: SourceSettings, split: str, keys: Keys, of: str, records: str) -> CaptionFile | None:
    """Returns the caption file of a split; None if the settings name none, in which case `keys` is not called. `of` is a value
    that changes with the keys. Every rank must call. Raises UserError for a file that is missing or does not fit the records."""
    setting = "data.val_captions" if split == "val" and settings.val_captions else "data.captions"
    name = settings.val_captions if setting == "data.val_captions" else settings.captions
    if name is None:
        return None
    path = settings.own_root / name
    if not path.is_file():
        raise UserError(f"{setting}: {path} does not exist")
    return CaptionFile(path, setting, keys, of, records)
