"""Index of a split of shards: the indexes of its shards (`tar_index.py`), made in several processes and concatenated."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from eva_mim.core.errors import UserError
from eva_mim.core.log import Progress, say
from eva_mim.core.processes import cores, pool_of
from eva_mim.core.settings import digest, few
from eva_mim.data.sources.index import Column, Content, Index, narrow, open_index, say_indexed
from eva_mim.data.sources.tar_index import BadShard, Shard, tar_index
from eva_mim.data.sources.unpack import check_room, ready, unpack

SHARDS_A_PROCESS = 4
"""Shards for each process; fewer do not justify another process."""
MAX_PROCESSES = 16


def shards_index(shards: Sequence[Shard], skip_bad: bool) -> Index:
    """Returns the concatenated indexes of the shards, with the end of each shard's records (column `shards`). The numbers of
    damaged shards are the fact "left_out". Raises UserError for damaged shards unless `skip_bad`, and if no image is left."""
    folder = shards[0].folder
    stamp = digest([(shard.size, shard.changed) for shard in shards])

    def fresh(index: Index) -> bool:
        left_out = json.loads(index.facts["left_out"])
        used = [shard for number, shard in enumerate(shards) if number not in left_out]
        return index.facts["stamp"] == stamp and all(map(ready, used))

    def make() -> Content:
        began = time.monotonic()
        bad = _index_each(shards)
        if bad and (not skip_bad or len(bad) == len(shards)):
            hint = "mend or remove them, or set data.bad_shards=skip to go on without them"
            raise UserError("\n".join([*list(bad.values())[:5], f"{len(bad)} of {len(shards)} shards cannot be used; {hint}"]))
        parts = {number: tar_index(shard, unpack(shard)) for number, shard in enumerate(shards) if number not in bad}
        columns = _joined(list(parts.values()))
        sizes = [len(parts[number]["image"]) if number in parts else 0 for number in range(len(shards))]
        columns["shards"] = narrow(np.cumsum(sizes))
        used = [shards[number] for number in parts]
        if not columns["image"].any() and "video" not in columns and "frames" not in columns:
            raise UserError(f"{folder}: no images in {few((shard.name for shard in used), 3)} (members KEY.jpg, KEY.png)")
        if empty := [shards[number].name for number, part in parts.items() if not len(part["image"])]:
            say(f"  {folder}: {len(empty)} of {len(shards)} shards hold no records: {few(empty)}")
        say_indexed(f"{len(used)} shards in {folder}", len(columns["image"]), time.monotonic() - began)
        fingerprint = digest([(shard.name, shard.size) for shard in used])
        facts = {"fingerprint": fingerprint, "stamp": stamp, "left_out": json.dumps(sorted(bad))}
        return Content(columns, facts | {"remarks": "; ".join(_remarks(list(parts.values())))})

    name = ["shards", [shard.identity for shard in shards], skip_bad]
    return open_index(name, fresh, make, f"{folder}/{shards[0].name}, ...")


def _remarks(parts: Sequence[Index]) -> list[str]:
    """Returns what else is in the shards than records with an image, each once."""
    repeated, hidden, bare = (sum(int(part.facts.get(name, "0")) for part in parts) for name in ("repeated", "hidden", "bare"))
    found = []
    if repeated:
        found.append(f"{repeated} members have the name of another one in their shard; the last one counts")
    if hidden:
        found.append(f"passed over {hidden} hidden members")
    if bare:
        first = next(part.facts["bare.first"] for part in parts if "bare" in part.facts)
        found.append(f"{bare} records have no image that can be read, such as {first}")
    return found


def _joined(parts: Sequence[Index]) -> dict[str, Column]:
    columns = {name: np.concatenate([part[name] for part in parts]) for name in ("image", "image.size", "label", "key")}
    for field in ("text", "described", "mask", "video"):
        if any(part[field].any() for part in parts):
            columns |= {name: np.concatenate([part[name] for part in parts]) for name in (field, f"{field}.size")}
    if any("frames" in part for part in parts):
        filmed = [part if "frames" in part else _without_frames(len(part["image"])) for part in parts]
        columns |= {name: np.concatenate([part[name] for part in filmed]) for name in ("frames", "frames.size")}
        columns["frames.ends"] = _shifted([part["frames.ends"] for part in filmed], [len(part["frames"]) for part in filmed])
    columns["key.ends"] = _shifted([part["key.ends"] for part in parts], [len(part["key"]) for part in parts])
    return columns


def _without_frames(records: int) -> dict[str, Column]:
    nothing = np.zeros(0, np.uint32)
    return {"frames": nothing, "frames.size": nothing, "frames.ends": np.zeros(records, np.uint64)}


def _shifted(ends: Sequence[Column], lengths: Sequence[int]) -> Column:
    """Returns the ends of all parts in a column that has the parts of these lengths one after another."""
    starts = np.cumsum([0, *lengths])[:-1]
    return narrow(np.concatenate([part + start for part, start in zip(ends, starts, strict=True)]))


def _index_each(shards: Sequence[Shard]) -> dict[int, str]:
    """Unpacks and indexes the shards for which that has not been done, in several processes. Returns {number: fault} of the
    damaged shards. Raises UserError for shards that cannot be read or unpacked."""
    check_room(shards)
    progress, bad = Progress(f"indexing shards in {shards[0].folder}", len(shards)), dict[int, str]()
    for number, fault in enumerate(_each(shards)):
        progress.advance()
        if fault is not None:
            bad[number] = fault
    return bad


def _each(shards: Sequence[Shard]) -> Iterator[str | None]:
    most = MAX_PROCESSES if shards[0].remote else cores()  # remote shards mostly wait for the network
    processes = min(MAX_PROCESSES, most, len(shards) // SHARDS_A_PROCESS)
    if processes < 2:
        yield from map(_fault, shards)
        return
    with pool_of(processes) as pool:
        try:
            yield from pool.map(_fault, shards)
        except BrokenProcessPool:
            raise UserError(f"{shards[0].folder}: a process that indexed shards was killed (for lack of memory?)") from None


def _fault(shard: Shard) -> str | None:
    try:
        tar_index(shard, unpack(shard))
    except BadShard as error:
        return str(error)
    return None
