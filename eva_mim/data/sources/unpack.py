"""Compressed shards, unpacked once into the cache folder, since gzip cannot be read from the middle.

The copies stay there until the user removes them. What would take more than the limit, or than the disk has free, is refused.
"""

from __future__ import annotations

import gzip
import math
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

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
    """Path of the unpacked copy of a compressed shard, present or not."""
    return shard.cached(".tar")


def ready(shard: Shard) -> bool:
    """True where the shard can be read by offset: not compressed, or unpacked."""
    return not shard.packed or copy_of(shard).exists()


def unpack(shard: Shard) -> Shard:
    """The shard itself, or its copy, where it now lies. Raises BadShard for a broken or absurd archive, UserError when the disk
    fails. Of several processes one makes the copy, and the others wait for it."""
    if not shard.packed:
        return shard
    target, temporary = copy_of(shard), shard.cached(".unpacking")
    if not target.exists():
        try:
            with FileLock(shard.cached(".lock")):
                if not target.exists():
                    _write(shard, temporary)
                    temporary.replace(target)
        except OSError as error:
            raise UserError(f"{shard.place}: cannot be unpacked into {target.parent} ({_gb(_free(target.parent))} free): "
                            f"{error.strerror or error}; make room there, or set EVA_MIM_CACHE to another folder") from None
    return found(target)


def _write(shard: Shard, temporary: Path) -> None:
    """Write the unpacked content and flush it to the disk; overwrites what a killed process left in the file."""
    left = min(limit(), most_bytes(shard))
    try:
        with temporary.open("wb") as copy, shard.open(DOWNLOAD_AHEAD) as file, gzip.GzipFile(fileobj=file) as packed:
            while block := _next(packed, shard):
                left -= len(block)
                if left < 0:
                    raise BadShard(f"{shard.place}: unpacks to an absurd size; refused")
                copy.write(block)
            copy.flush()
            os.fsync(copy.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _next(packed: gzip.GzipFile, shard: Shard) -> bytes:
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


def check_room(shards: Sequence[Shard]) -> None:
    """Raises UserError, with the sizes, when the copies of these shards that are still to be made will not fit."""
    missing = [shard for shard in shards if not ready(shard)]
    if not missing:
        return
    folder, needed = cache_folder(), sum(map(unpacked_size, missing))
    copies, free = sum(copy.stat().st_size for copy in folder.glob("*.tar")), _free(folder)
    need = f"{missing[0].folder}: {len(missing)} compressed shards take about {_gb(needed)} unpacked in {folder}"
    if copies + needed > limit():
        raise UserError(f"{need}, whose copies take {_gb(copies)} of the {_gb(limit())} of EVA_MIM_UNPACKED_GB; set it higher, "
                        "or remove the .tar files there that no run reads")
    if free < needed:
        raise UserError(f"{need}, where {_gb(free)} are free; remove the .tar files there that no run reads, or set "
                        "EVA_MIM_CACHE to another folder")


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


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
