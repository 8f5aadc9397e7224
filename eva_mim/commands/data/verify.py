"""`eva-mim data verify`: decodes every image of a data set and lists the broken ones, or reads a cache of targets whole."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from eva_mim.commands.data import add_processes
from eva_mim.commands.data.index import every_split, read_data
from eva_mim.commands.data.inspect import spread
from eva_mim.commands.data.parallel import RecordPool, chunks
from eva_mim.core.bands import Bands
from eva_mim.core.contracts import Source
from eva_mim.core.errors import UserError
from eva_mim.core.log import Progress, duration, say
from eva_mim.core.run_folder import STORE, STORE_INDEX
from eva_mim.core.settings import few
from eva_mim.data.quarantine import Checked, Quarantine, read_quarantine

CHUNK = 64
"""Records that a process receives at once."""
KEEP_EVERY = 30.0
"""Seconds between writings of the list, from which an interrupted command continues."""
SHOWN = 3
FRAMES = 8
"""Frames of a video that are decoded, evenly spread."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    add_processes(parser)
    parser.add_argument("--out", type=Path, default=Path("quarantine.json"), help="the list (default quarantine.json)")


def run(options: argparse.Namespace) -> None:
    """Runs the command. Raises UserError."""
    if (Path(options.what) / STORE).is_file():
        return verify_store(Path(options.what))
    verify(options.what, options.overrides, options.out, options.processes)


def verify_store(folder: Path) -> None:
    """Reads all files of a cache of targets. Raises UserError for files whose bytes are not those that were written."""
    from eva_mim.data.store.files import FeatureStore

    store = FeatureStore(folder)
    damaged = store.damaged(Progress("files of the cache", len(store.files)))
    if damaged:
        raise UserError(f"{folder}: {len(damaged)} of {len(store.files)} files are not as they were written: {few(damaged, 5)}; "
                        f"remove them and {STORE_INDEX}, and the same `eva-mim cache` command makes them anew")
    sys.stdout.write(f"{folder}: {len(store.files)} files of features are as they were written\n")


def verify(what: str, overrides: Sequence[str], out: Path, processes: int | None = None) -> None:
    """Decodes all records of every split and writes the list. Sources that are in the list already, with the same records, are
    not decoded again. Raises UserError for data or a list that cannot be used."""
    settings = read_data(what, overrides)
    listed = read_quarantine(out) if out.exists() else Quarantine(out, {})
    _write(listed)  # a path that cannot be written is noticed before the work
    for name, source in every_split(settings):
        _check(name, source, listed, processes)
        _report(name, listed.sources[source.fingerprint])
    if any(one.broken for one in listed.sources.values()):
        sys.stdout.write(f"\ntrain without them: data.quarantine={out.absolute()}\n")
    else:
        sys.stdout.write(f"\nnothing is broken; the list of what was decoded: {out.absolute()}\n")


def _check(name: str, source: Source, listed: Quarantine, processes: int | None) -> None:
    known = listed.sources.get(source.fingerprint, Checked(name, len(source), 0, {}))
    began = kept = time.monotonic()
    first = checked = known.checked
    broken = dict(known.broken)
    if checked == len(source):
        say(f"  {name}: checked before; to decode it again, remove {listed.path}")

    def keep() -> None:
        listed.sources[source.fingerprint] = Checked(name, len(source), checked, broken)
        _write(listed)

    try:
        progress = Progress(f"decoding {name}", len(source), checked)
        with RecordPool(source, processes) as crew:
            for record, fault in crew.records(decode, chunks(checked, len(source), CHUNK)):
                if fault is not None:
                    broken[record] = fault
                checked = record + 1
                progress.advance()
                if time.monotonic() - kept > KEEP_EVERY:
                    keep()
                    kept = time.monotonic()
    finally:
        keep()
    if (seconds := time.monotonic() - began) and checked > first:
        say(f"  {name}: {checked - first} images in {duration(seconds)}, {(checked - first) / seconds:.1f} images/s")


def decode(source: Source, record: int) -> None:
    """Decodes one record, of a video a few frames. Raises the errors of reading it."""
    image = source.read(record).image
    if not isinstance(image, (Image.Image, Bands)):
        image.frames(spread(len(image), min(FRAMES, len(image))))


def _write(listed: Quarantine) -> None:
    try:
        listed.write()
    except OSError as error:
        raise UserError(f"--out {listed.path}: {error.strerror}") from None


def _report(name: str, checked: Checked) -> None:
    share = len(checked.broken) / max(1, checked.records)
    sys.stdout.write(f"{name:<20} {checked.records:>10} images, {len(checked.broken)} broken ({share:.3%})\n")
    kinds = Counter(fault.reason.partition(":")[0] for fault in checked.broken.values())
    for kind, count in kinds.most_common():
        sys.stdout.write(f"  {count:>8} {kind}\n")
        shown = [fault for fault in checked.broken.values() if fault.reason.startswith(kind)][:SHOWN]
        sys.stdout.writelines(f"           {str(fault)[:300]}\n" for fault in shown)
