"""`eva-mim bench data`: measures the time of the training loader by phase, and its speed by number of workers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence

from eva_mim.commands.data.index import DataOnly, read_tree
from eva_mim.core.contracts import Source
from eva_mim.core.errors import UserError
from eva_mim.core.resolve import resolve
from eva_mim.core.timing import Stopwatch, measuring, phase
from eva_mim.data.loader import Reader, TrainLoader
from eva_mim.data.masking import make_mask
from eva_mim.data.preparation import MaskedPreparation
from eva_mim.data.sampler import GlobalOrder
from eva_mim.data.splits import open_splits
from eva_mim.data.subset import order_of
from eva_mim.data.view_settings import MaskSettings, ViewSettings
from eva_mim.data.views import TrainView

BATCH = 64
WARM_UP = 2.0
"""Seconds before a measurement, in which workers start and fill their queues, and files enter the page cache."""


class BenchSettings(DataOnly):
    """The sections of a recipe that determine the work of a loader."""

    view: ViewSettings = ViewSettings()
    mask: MaskSettings = MaskSettings()


def measure(
    what: str, overrides: Sequence[str], sizes: Sequence[int], patch: int, workers: Sequence[int], seconds: float
) -> None:
    """Measures the loader and prints the tables. Raises UserError for settings that cannot be used."""
    settings = read_settings(what, overrides)
    if wrong := [size for size in sizes[:1] if size % patch]:
        raise UserError(f"--size {wrong[0]} is not a multiple of --patch {patch}")
    source = open_splits(settings.data).train
    mask = make_mask((sizes[0] // patch,) * 2, settings.mask)
    made = MaskedPreparation(TrainView(settings.view, sizes), 0, mask)
    _by_phase(source, made, seconds)
    print_ = sys.stdout.write
    print_(f"\n{'workers':>8} {'images/s':>9} {'a worker':>9}\n")
    best = 0.0
    for count in workers:
        loader = TrainLoader(source, made, _order(source), count)
        batches = loader.steps(0, 10**9)
        rate = _rate((batch.size for step in batches for batch in step), seconds)
        best = max(best, rate / max(1, count))
        print_(f"{count:>8} {rate:>9.1f} {rate / max(1, count):>9.1f}\n")
        del batches
    print_(f"\na GPU that takes 1,000 images/s needs {1000 / best:.1f} such workers\n")


def read_settings(what: str, overrides: Sequence[str]) -> BenchSettings:
    """Returns data, view and mask settings of a recipe, whose other sections are ignored, or of a folder. Raises UserError."""
    tree = {name: section for name, section in read_tree(what).items() if name in BenchSettings.model_fields}
    return resolve(BenchSettings, tree, overrides, what)


def _order(source: Source) -> GlobalOrder:
    batch = min(BATCH, len(source))
    return order_of(source, seed=0, global_batch=batch, micro_batch=batch)


def _by_phase(source: Source, made: MaskedPreparation, seconds: float) -> None:
    """Prints CPU milliseconds an image by phase, of one process without workers."""
    reader, order = Reader(source, made), _order(source)
    stopwatch = Stopwatch(clock=time.thread_time)

    def images() -> Iterator[int]:
        for places in order.micro_steps(0, 10**9):
            with phase("all"):
                read = [reader[place] for place in places]
                with phase("collate"):
                    reader.collate(read)
            yield len(places)

    with measuring(stopwatch):
        done, wall = _timed(images(), seconds, stopwatch.take)
        spent = stopwatch.take()
    whole = spent.pop("all")
    rows = {name: 1000 * value / done for name, value in spent.items()}
    rows["other"] = 1000 * whole / done - sum(rows.values())
    rows["all CPU time"] = 1000 * whole / done
    rows["waiting"] = max(0.0, 1000 * wall / done - rows["all CPU time"])
    sys.stdout.write(f"{len(source)} images; {done} of them in one process, ms an image\n")
    sys.stdout.writelines(f"  {name:<18} {value:>7.3f}\n" for name, value in rows.items())


def _rate(images: Iterator[int], seconds: float) -> float:
    done, wall = _timed(images, seconds, lambda: None)
    return done / wall


def _timed(images: Iterator[int], seconds: float, begin: Callable[[], object]) -> tuple[int, float]:
    """Returns (images, seconds), measured after a warm-up, at whose end `begin` is called."""
    started = time.perf_counter()
    for _ in images:
        if time.perf_counter() - started > min(WARM_UP, seconds):
            break
    begin()
    done, started = 0, time.perf_counter()
    for more in images:
        done += more
        if (wall := time.perf_counter() - started) > seconds:
            return done, wall
    raise AssertionError("the order of samples has no end")
