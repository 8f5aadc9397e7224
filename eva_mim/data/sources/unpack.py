"""Compressed shards, unpacked once into the cache folder, since gzip cannot be read from the middle.

The copies together stay below a limit: those that were not used for longest make room. A process locks a list of the copies that
it uses (`hold`), which the system unlocks when the process ends, however it ends: nothing in use is removed, and nothing stale
stays in the way.
"""

from __future__ import annotations

import fcntl
import gzip
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from eva_mim.core.errors import UserError
from eva_mim.data.sources.index import cache_folder
from eva_mim.data.sources.tar_index import BadShard, Shard, found

MAX_RATIO = 100
"""A tar of small images packs about 8 : 1, most of it padding; gzip itself stops at 1032 : 1, and a bomb is near that."""
DOWNLOAD_AHEAD = 2**23
"""Bytes read at once by URL."""
DEFAULT_GB = 200
"""Of all copies together, in 10^9 bytes; the environment variable EVA_MIM_UNPACKED_GB sets another limit."""


def copy_of(shard: Shard) -> Path:
    """Where the unpacked copy of a compressed shard lies or will lie."""
    return shard.cached(".tar")


def ready(shard: Shard) -> bool:
    """It can be read by offset now."""
    return not shard.packed or copy_of(shard).exists()


def unpack(shard: Shard) -> Shard:
    """The shard itself, or its copy, where it now lies. Raises BadShard for a broken or absurd archive, UserError when the disk
    fails."""
    target = copy_of(shard)
    if ready(shard):
        return found(target) if shard.packed else shard
    left = min(limit(), most_bytes(shard))
    copy, temporary = _locked(".unpacking")
    try:
        with copy, shard.open(DOWNLOAD_AHEAD) as file, gzip.GzipFile(fileobj=file) as packed:
            while block := _next(packed, shard):
                left -= len(block)
                if left < 0:
                    raise BadShard(f"{shard.place}: unpacks to an absurd size; refused")
                copy.write(block)
            copy.flush()
            os.fsync(copy.fileno())
            temporary.replace(target)
    except OSError as error:
        raise UserError(f"{shard.place}: cannot be unpacked into {target.parent}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return found(target)


def _locked(suffix: str, content: bytes = b"") -> tuple[BinaryIO, Path]:
    """A new file of the cache that this process has locked. It gets its suffix only then: without a lock it is left behind.
    Raises UserError."""
    folder = cache_folder()
    try:
        number, name = tempfile.mkstemp(dir=folder)
        file = os.fdopen(number, "w+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(content)
        file.flush()
        os.rename(name, name + suffix)
    except OSError as error:
        raise UserError(f"{folder}: no file can be locked here ({error.strerror}); set EVA_MIM_CACHE to another folder") from None
    return file, Path(name + suffix)


def _next(packed: BinaryIO | gzip.GzipFile, shard: Shard) -> bytes:
    try:
        return packed.read(2**20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadShard(f"{shard.place}: not a readable .tar.gz: {error}") from None


def limit() -> int:
    """Bytes that all unpacked copies together may take. Raises UserError."""
    text = os.environ.get("EVA_MIM_UNPACKED_GB", str(DEFAULT_GB))
    try:
        value = float(text)
        if not 0 < value < 2**40:
            raise ValueError
    except ValueError:
        raise UserError(f"EVA_MIM_UNPACKED_GB={text}: must be a number of gigabytes") from None
    return int(value * 1e9)


def hold(shards: Sequence[Shard]) -> BinaryIO | None:
    """Keep the copies of these shards, also those still to be made, as long as the returned file is open here or in a child."""
    copies = [copy_of(shard) for shard in shards if shard.packed]
    if not copies:
        return None
    _in_use(cache_folder())  # lists of dead processes go
    held, _ = _locked(".use", "\n".join(copy.name for copy in copies).encode())
    for copy, stat in _stats(copies).items():  # what was used last, also where a disk does not keep times of access
        os.utime(copy, ns=(time.time_ns(), stat.st_mtime_ns))
    return held


def make_room(shards: Sequence[Shard]) -> None:
    """Remove old copies until those of these shards fit. Raises UserError, with the sizes, when they never will."""
    copies = {copy_of(shard): shard for shard in shards if shard.packed}
    missing = [shard for copy, shard in copies.items() if not copy.exists()]
    if not missing:
        return
    folder, allowed = cache_folder(), limit()
    needed, kept = sum(map(unpacked_size, missing)), sum(stat.st_size for stat in _stats(copies).values())
    where = f"{missing[0].folder}: {len(copies)} compressed shards"
    if needed + kept > allowed:
        raise UserError(f"{where} take about {_gb(needed + kept)} unpacked, more than the {_gb(allowed)} of EVA_MIM_UNPACKED_GB; "
                        "set it higher, or unpack them yourself (gunzip) and use the .tar files")
    in_use = _in_use(folder) | copies.keys()
    others = _stats(folder.glob("*.tar"))
    total = sum(stat.st_size for stat in others.values())
    for path in sorted(others, key=lambda path: others[path].st_atime_ns):
        if total + needed > allowed and path not in in_use:
            path.unlink(missing_ok=True)
            total -= others[path].st_size
    if total + needed > allowed:
        raise UserError(f"{where} need about {_gb(needed)} more, and other runs use {_gb(total - kept)} of the {_gb(allowed)} of "
                        "EVA_MIM_UNPACKED_GB; set it higher, or wait for them")
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(f"{where} need about {_gb(needed)} more in {folder}, where {_gb(free)} are free; "
                        "set EVA_MIM_CACHE to another folder")


def unpacked_size(shard: Shard) -> int:
    """Bytes of its copy, as gzip's last four bytes tell them (RFC 1952, 2.3.1): modulo 2^32, and of the last member alone: it
    may be more. Images hardly pack: a size far below the packed one has lost multiples of 2^32."""
    with shard.open(4) as file:
        file.seek(max(0, shard.size - 4))
        told = int.from_bytes(file.read(4), "little")
    if shard.size < 2**31:
        return max(shard.size, min(told, most_bytes(shard)))
    return told + max(0, math.ceil((shard.size * 0.9 - told) / 2**32)) * 2**32


def most_bytes(shard: Shard) -> int:
    """More than a shard of images can have when it is unpacked."""
    return shard.size * MAX_RATIO + 2**20


def _stats(paths: Iterable[Path]) -> dict[Path, os.stat_result]:
    """Of those that are there; another process may just have removed one."""
    stats = dict[Path, os.stat_result]()
    for path in paths:
        with suppress(FileNotFoundError):
            stats[path] = path.stat()
    return stats


def _in_use(folder: Path) -> set[Path]:
    """Copies that a living process holds. What dead ones left behind is removed."""
    used = set[Path]()
    for path in (*folder.glob("*.use"), *folder.glob("*.unpacking")):
        try:
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    if path.suffix == ".use":
                        used.update(folder / name for name in file.read().decode().split())
                else:
                    path.unlink(missing_ok=True)
        except FileNotFoundError:
            continue
    return used


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
