"""Files by URL (`s3://`, `gs://`, `https://`, ...), through fsspec and the driver that the user has installed for it.

A read is a range of bytes with a time-out and a few retries. The file system is looked up at each call, since fsspec keeps
one for each process, which must not be used after a fork.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple, TypeVar

from fsspec.core import url_to_fs
from fsspec.spec import AbstractBufferedFile

from eva_mim.core.errors import UserError

T = TypeVar("T")
TIMEOUT = 60.0
"""Seconds to wait for one response."""
WAITS = (1.0, 4.0, 16.0)
"""Seconds to wait before each retry."""
CHANGED = ("ETag", "etag", "generation", "LastModified", "last_modified", "mtime", "updated", "created")
"""Names that file systems use for the value that changes with a file; the first one present is taken."""


class RemoteFile(NamedTuple):
    """URL of a remote file, its size in bytes, and a value that changes with its content."""

    url: str
    size: int
    changed: str


def as_url(root: PurePath) -> str | None:
    """Returns the URL that a path was written as ("s3://bucket/x", which `Path` turns into "s3:/bucket/x"); None for a local
    path."""
    found = re.match(r"([a-z][a-z0-9+.-]+):/+(.*)", root.as_posix())
    if found is None:
        return None
    scheme, rest = found.groups()
    return f"{scheme}://{'/' if scheme in ('file', 'local') else ''}{rest}"


def listed(root: str, pattern: str) -> list[RemoteFile]:
    """Returns the files below a URL that match a pattern, sorted by URL. Raises UserError if they cannot be listed."""
    system, below = _system(root)

    def find() -> list[RemoteFile]:
        system.invalidate_cache()
        # By default fsspec leaves out the folders whose listing fails.
        found = system.glob(f"{below.rstrip('/')}/{pattern}", detail=True, on_error="raise")
        return sorted(_file(system, name, about) for name, about in found.items() if about["type"] == "file")

    try:
        return _persistent(find, root)
    except OSError as error:
        raise UserError(f"{root}: cannot be listed: {type(error).__name__}: {error}") from None


def _file(system: Any, name: str, about: dict[str, Any]) -> RemoteFile:
    about = about if about.get("size") is not None else system.info(name)
    if about.get("size") is None:
        raise UserError(f"{system.unstrip_protocol(name)}: the server does not tell its size, without which it cannot be read")
    changed = next((str(about[key]) for key in CHANGED if key in about), "")
    return RemoteFile(system.unstrip_protocol(name), int(about["size"]), changed)


def read_range(url: str, start: int, end: int) -> bytes:
    """Returns bytes start .. end - 1 of a file, fewer at its end. Raises OSError for a missing or forbidden file, UserError if
    the server does not respond or does not support ranges."""
    if end <= start:
        return b""
    system, path = _system(url)
    content: bytes = _persistent(lambda: system.cat_file(path, start=start, end=end), url)
    if len(content) > end - start:
        raise UserError(f"{url}: its server answers with {len(content)} bytes where {end - start} were asked for: it knows no "
                        "ranges; copy the shards to a disk")
    return content


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
    """Returns bytes start .. end - 1 of each (URL, start, end), requested together if the driver supports it. All files must be
    on one file system. A range that failed or is incomplete is None; `read_range` then retries and reports the error. Raises
    UserError without a driver."""
    if not ranges:
        return []
    system = _system(ranges[0][0])[0]
    urls, starts, ends = (list(column) for column in zip(*ranges, strict=True))
    try:
        found = _timed(lambda: system.cat_ranges([system._strip_protocol(url) for url in urls], starts, ends, on_error="return"))
    except Exception:  # drivers raise exceptions of their own types
        return [None] * len(ranges)
    return [content if isinstance(content, bytes) and len(content) == end - start else None
            for content, (_, start, end) in zip(found, ranges, strict=True)]


class Reading(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """A seekable remote file: fsspec's buffered file, with the time-out and retries of `read_range` for every request."""

    def __init__(self, url: str, size: int, ahead: int):
        """`size`: bytes of the file; `ahead`: bytes that are read beyond a request."""
        super().__init__(None, url, block_size=ahead, cache_type="readahead", size=size)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return read_range(self.path, start, end)


def _system(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system of this process and the path in it. Raises UserError without a driver or for an invalid
    URL."""
    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: no driver for such URLs is installed: {error}") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None
    return system, str(path)


def _persistent(call: Callable[[], T], url: str) -> T:
    """Returns the result of `call`, with retries. Raises the errors of `call` that no retry changes (file not found, no
    permission, a folder, UserError), and UserError after the last attempt."""
    for wait in (*WAITS, None):
        try:
            return _timed(call)
        except (FileNotFoundError, PermissionError, IsADirectoryError, UserError):
            raise
        except Exception as error:  # drivers raise exceptions of their own types
            if wait is None:
                tried = f"{len(WAITS) + 1} attempts of up to {TIMEOUT:g} s"
                raise UserError(f"{url}: no answer in {tried}; the last: {type(error).__name__}: {error}") from None
            time.sleep(wait)
    raise AssertionError


def _timed(call: Callable[[], T]) -> T:
    """Returns the result of `call`, run in a thread that is abandoned after `TIMEOUT`, since not every driver has a time-out.
    Raises the errors of `call`, TimeoutError."""
    answers: list[T] = []
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer in {TIMEOUT:g} s")
    return answers[0]
