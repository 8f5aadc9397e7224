"""`eva-mim data pack`: writes a data set as tar shards. The command can be interrupted and repeated; a shard is complete or
absent."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import numpy as np

from eva_mim.commands import positive
from eva_mim.commands.data import add_processes
from eva_mim.commands.data.index import CLASSES, every_split, read_data
from eva_mim.commands.data.parallel import RecordPool
from eva_mim.core.errors import UserError
from eva_mim.core.files import flush_folder, replacing, write_json, write_text
from eva_mim.core.lock import is_lock, locked
from eva_mim.core.log import Progress, duration, say
from eva_mim.core.rng import derive
from eva_mim.core.settings import few
from eva_mim.data import DataSettings, too_many
from eva_mim.data.quarantine import read_quarantine
from eva_mim.data.sources.decode import FileSource, Raw, header
from eva_mim.data.sources.index import Column

FORMAT = "eva-mim pack 1"
PLAN, SEGMENTS = "pack.json", "segments.txt"
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "NPY": "npy"}
"""Image formats -> extensions of the members of a shard."""


class Job(NamedTuple):
    """Description of a split's shards, for the processes that write them."""

    out: Path
    split: str
    seed: int | None
    records: int
    left_out: frozenset[int]
    max_broken: float


class Written(NamedTuple):
    records: int
    size: int
    faults: list[str]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    add_processes(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the shards: empty, or begun before")
    parser.add_argument("--per-shard", type=positive, default=10_000, metavar="N", help="records in a shard (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of records (default 0)")
    parser.add_argument("--keep-order", action="store_true", help="records stay in their order, which may be by class")


def run(options: argparse.Namespace) -> None:
    """Runs the command. Raises UserError."""
    seed = None if options.keep_order else options.seed
    pack(options.what, options.overrides, options.out, per_shard=options.per_shard, seed=seed, processes=options.processes)


def pack(
    what: str, overrides: Sequence[str], out: Path, *, per_shard: int, seed: int | None, processes: int | None = None
) -> None:
    """Writes `OUT/SPLIT-000000.tar`, ... of `per_shard` records each, in an order drawn by `seed` (None: in their own order), and
    the class names. Image files are copied unchanged. Raises UserError for data that cannot be packed."""
    settings = read_data(what, overrides)
    if settings.mixture is not None:
        raise UserError("data.mixture: pack its parts one by one")
    splits = {name: source for name, source in every_split(settings) if not name.startswith("held_out.")}
    for name, source in splits.items():
        if not isinstance(source, FileSource):
            raise UserError(f"data.source={settings.source} has no image files to pack")
        if source.unnamed:
            raise UserError(f"{name}: its records have labels, which would be lost: set data.classes to the file that names them")
        say(f"  {name}: {len(source)} records in {-(-len(source) // per_shard)} shards")
    with locked(out):
        _write(settings, splits, out, per_shard, seed, processes)


def _write(
    settings: DataSettings, splits: dict[str, Any], out: Path, per_shard: int, seed: int | None, processes: int | None
) -> None:
    _begin(out, {
        "format": FORMAT, "per_shard": per_shard, "seed": seed,
        "splits": {name: {"records": len(source), "fingerprint": source.fingerprint} for name, source in splits.items()},
    })
    classes = next(iter(splits.values())).classes
    if classes is not None:
        write_text(out / CLASSES, "".join(f"{name}\n" for name in classes))
    if (maps := settings.segmentation) is not None and maps.classes is not None:
        write_text(out / SEGMENTS, (settings.own_root / maps.classes).read_text(encoding="utf-8"))
    jobs = {name: Job(out, name, seed, len(source), _left_out(settings, source), settings.max_broken)
            for name, source in splits.items()}
    for name, source in splits.items():
        _pack_split(source, jobs[name], per_shard, processes)
    _prove(jobs, classes, settings)


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Marks the output folder with this plan. Raises UserError if it holds anything else."""
    try:
        if (out / PLAN).exists():
            if json.loads((out / PLAN).read_text()) != plan:
                raise UserError(f"--out {out} holds shards of other data or other settings; choose another folder")
        elif strangers := sorted(path.name for path in out.iterdir() if not is_lock(path.name)):
            raise UserError(f"--out {out} is not empty ({few(strangers, 3)}); choose another folder")
        write_json(out / PLAN, plan)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    for stale in out.glob(".*.tmp"):
        stale.unlink()


def _left_out(settings: DataSettings, source: Any) -> frozenset[int]:
    listed = None if settings.quarantine is None else read_quarantine(settings.quarantine)
    return frozenset() if listed is None else frozenset(listed.reasons(source, str(settings.root)))


def _pack_split(source: Any, job: Job, per_shard: int, processes: int | None) -> None:
    every = [range(first, min(first + per_shard, job.records)) for first in range(0, job.records, per_shard)]
    names = {records: shard_name(job.split, number) for number, records in enumerate(every)}
    todo = [records for records in every if not (job.out / names[records]).exists()]
    done = job.records - sum(map(len, todo))
    if done:
        say(f"  {job.split}: {len(every) - len(todo)} of {len(every)} shards are there already")
    began, faults, size, count = time.monotonic(), list[str](), 0, 0
    progress = Progress(f"packing {job.split}", job.records, done)
    with RecordPool(source, processes) as crew:
        for records, written in crew.each(partial(write_shard, job, per_shard), todo):
            for fault in written.faults:
                say(f"  left out: {fault}")
            faults, size, count = faults + written.faults, size + written.size, count + written.records
            progress.advance(len(records))
    flush_folder(job.out)
    seconds = max(time.monotonic() - began, 1e-9)
    say(f"  {job.split}: {count} records, {size / 1e9:.3g} GB in {duration(seconds)}, {len(faults)} unreadable")


def shard_name(split: str, number: int) -> str:
    """Returns the file name of a shard; the order of sorted names is the order of the numbers."""
    return f"{split}-{number:06d}.tar"


def write_shard(job: Job, per_shard: int, source: Any, places: range) -> Written:
    """Writes one shard, under a temporary name until it is on the disk; returns its numbers of records and bytes, and its faults.
    Raises UserError for a full disk or too many unreadable records."""
    target = job.out / shard_name(job.split, places.start // per_shard)
    faults, count = list[str](), 0
    try:
        with replacing(target) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
            for place in places:
                record = int(_order(job.seed, job.split, job.records)[place])
                if record in job.left_out:
                    continue
                try:
                    members = list(_members(source.raw(record)))
                except UserError:  # the error concerns more than one record
                    raise
                except Exception as error:  # a record may be broken in any way
                    faults.append(f"{source.key(record)}: {type(error).__name__}: {error}")
                    _not_too_many(faults, len(places), job.max_broken)
                    continue
                for extension, content in members:
                    info = tarfile.TarInfo(f"{place:09d}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
                count += 1
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}; what is there is whole, the same command goes on") from None
    return Written(count, target.stat().st_size, faults)


def _not_too_many(faults: list[str], records: int, share: float) -> None:
    if too_many(len(faults), records, share):
        raise UserError(f"{len(faults)} records cannot be read, more than data.max_broken={share:.2%} of a shard; "
                        f"the last: {faults[-1]}")


def _members(raw: Raw) -> Iterator[tuple[str, bytes]]:
    """Yields extension and content of each member of a record. Raises the errors of `decode.header` if the file is no image."""
    yield EXTENSIONS[header(raw.content).format], raw.content
    if raw.mask is not None:
        if (kind := header(raw.mask).format) != "PNG":
            raise ValueError(f"its mask is a {kind}, and shards have PNG masks")
        yield "seg.png", raw.mask
    if raw.label is not None:
        yield "cls", str(raw.label).encode()
    told: dict[str, Any] = {"key": raw.key} | ({"captions": raw.captions} if raw.captions else {})
    yield "json", json.dumps(told, ensure_ascii=False).encode("utf-8", "surrogatepass")


@cache
def _order(seed: int | None, split: str, records: int) -> Column:
    """Returns [records], the record at each place in the shards."""
    return np.arange(records) if seed is None else np.random.default_rng(derive(seed, f"pack-{split}")).permutation(records)


def _prove(jobs: dict[str, Job], classes: tuple[str, ...] | None, packed: DataSettings) -> None:
    """Opens the shards as training would, and prints the settings for it. Raises UserError if too many records are missing."""
    out, pixels, maps = next(iter(jobs.values())).out, packed.pixels, packed.segmentation
    settings = ["data.source=shards", *(f"data.{name}={name}-*.tar" for name in jobs)]
    settings += [] if classes is None else [f"data.classes={CLASSES}"]
    settings += ["data.exif=true"] if pixels.exif else []
    if not pixels.plain:
        settings += [f"data.channels={pixels.channels}", f"data.window={json.dumps(pixels.window)}"]
    if maps is not None:
        settings += [f"data.segmentation.classes={SEGMENTS}", f"data.segmentation.ignore={maps.ignore}"]
        settings += [] if maps.label_map is None else [f"data.segmentation.label_map={json.dumps(maps.label_map)}"]
    for name, source in every_split(read_data(str(out), settings)):
        job = jobs[name]
        missing = job.records - len(job.left_out) - len(source)
        sys.stdout.write(f"{name:<20} {len(source):>10} of {job.records} records, {len(job.left_out)} in quarantine, "
                         f"{missing} unreadable\n")
        if missing < 0 or too_many(missing, job.records, job.max_broken):
            raise UserError(f"{out}: {missing} records of {name} are not in the shards; remove them and begin again")
    sys.stdout.write(f"\ntrain on them: data.root={out} {' '.join(map(quote, settings))}\n")
