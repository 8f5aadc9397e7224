"""Unpacking of compressed shards, once, into the cache folder, since gzip cannot be read from the middle.

The copies stay until the user removes them. Copies that exceed the size limit or the free disk space are refused.
"""

from __future__ import annotations

import gzip
import math
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

from eva_mim.core.errors import UserError
from eva_mim.core.lock import lease
from eva_mim.data.sources.index import cache_folder
from eva_mim.data.sources.tar_index import BadShard, Shard, found

MAX_RATIO = 100
"""Maximum ratio of unpacked to packed size. A tar of small images packs about 8 : 1, most of it padding; gzip's own limit is
1032 : 1, which decompression bombs approach."""
DOWNLOAD_AHEAD = 2**23
"""Bytes read at once from a URL."""
DEFAULT_GB = 200
"""Maximum size of all copies together, in 10^9 bytes; the environment variable EVA_MIM_UNPACKED_GB sets another limit."""


def copy_of(shard: Shard) -> Path:
    """Returns the path of the unpacked copy of a compressed shard, which may not exist yet."""
    return shard.cached(".tar")


def ready(shard: Shard) -> bool:
    """Returns True if the shard can be read by offset: it is not compressed, or its copy exists."""
    return not shard.packed or copy_of(shard).exists()


def unpack(shard: Shard) -> Shard:
    """Returns the shard itself if it is not compressed, else its copy, made if missing. If several processes call, one makes the
    copy while the others wait. Raises BadShard for a damaged archive or an impossible size, UserError if the disk fails."""
    if not shard.packed:
        return shard
    target, temporary = copy_of(shard), shard.cached(".unpacking")
    if not target.exists():
        try:
            with lease(shard.cached(".lock")):
                if not target.exists():
                    _write(shard, temporary)
                    temporary.replace(target)
        except OSError as error:
            raise UserError(f"{shard.place}: cannot be unpacked into {target.parent} ({_gb(_free(target.parent))} free): "
                            f"{error.strerror or error}; make room there, or set EVA_MIM_CACHE to another folder") from None
    return found(target)


def _write(shard: Shard, temporary: Path) -> None:
    """Writes the unpacked content and flushes it to the disk; overwrites the incomplete file of a killed process. Raises BadShard
    for a damaged archive or an impossible size, OSError."""
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
    """Returns the maximum size of all unpacked copies together, in bytes. Raises UserError for an invalid EVA_MIM_UNPACKED_GB."""
    text = os.environ.get("EVA_MIM_UNPACKED_GB", str(DEFAULT_GB))
    try:
        value = float(text)
        if not 0 < value < 2**40:
            raise ValueError
    except ValueError:
        raise UserError(f"EVA_MIM_UNPACKED_GB={text}: must be a number of gigabytes") from None
    return int(value * 1e9)


def check_room(shards: Sequence[Shard]) -> None:
    """Raises UserError, with the sizes, if the missing copies of these shards exceed the size limit or the free disk space."""
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
    """Returns an estimate of the copy's size in bytes. gzip's last four bytes hold the size of the last member modulo 2^32 (RFC
    1952, 2.3.1), so the true size may be larger. Since images hardly pack, multiples of 2^32 are added to a size far below the
    packed one."""
    with shard.open(4) as file:
        file.seek(max(0, shard.size - 4))
        told = int.from_bytes(file.read(4), "little")
    if shard.size < 2**31:
        return max(shard.size, min(told, most_bytes(shard)))
    return told + max(0, math.ceil((shard.size * 0.9 - told) / 2**32)) * 2**32


def most_bytes(shard: Shard) -> int:
    """Returns an upper bound of the unpacked size of a shard of images, in bytes."""
    return shard.size * MAX_RATIO + 2**20


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
