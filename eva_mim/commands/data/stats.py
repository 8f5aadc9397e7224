"""`eva-mim data stats`: prints mean and standard deviation of each channel as lines for a recipe, and a window for images of more
than 8 bits."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eva_mim.commands import positive
from eva_mim.commands.data import add_processes
from eva_mim.commands.data.index import read_data
from eva_mim.commands.data.parallel import RecordPool, chunks
from eva_mim.core.bands import Bands
from eva_mim.core.contracts import Source
from eva_mim.core.errors import UserError
from eva_mim.core.log import Progress
from eva_mim.core.rng import derive
from eva_mim.data import DataSettings, SourceSettings
from eva_mim.data.quarantine import Fault
from eva_mim.data.sampler import MixedOrder, MixedPart
from eva_mim.data.sources.decode import OPEN
from eva_mim.data.sources.videos import still
from eva_mim.data.splits import open_splits
from eva_mim.data.subset import Mixture, Subset

CHUNK = 16
VALUES, MOST_VALUES = 2**24, 2**12
"""Maximum number of values kept for the percentiles: in all, and of one image."""
PERCENTILES = (0.1, 99.9)
MAX = 255
"""Largest value of a pixel."""
Window = tuple[float, float]


class Seen(NamedTuple):
    """Statistics of one image."""

    mean: npt.NDArray[np.float64]
    """[channels] mean of the values."""
    square: npt.NDArray[np.float64]
    """[channels] mean of the squared values."""
    values: npt.NDArray[np.float32]
    """Random values of the image, from all channels."""
    whole: bool
    """True if the values are 8-bit integers."""


class Moments(NamedTuple):
    """Mean and std over images, in which each image has the same weight, whatever its size."""

    mean: npt.NDArray[np.float64]
    """[channels] mean over the images."""
    std: npt.NDArray[np.float64]
    error: npt.NDArray[np.float64]
    """[channels] standard error of the mean, from the differences between images."""
    values: npt.NDArray[np.float32]
    whole: bool
    images: int
    faults: list[Fault]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    add_processes(parser)
    parser.add_argument("--images", type=positive, default=5000, help="drawn as training draws them (default 5000)")


def run(options: argparse.Namespace) -> None:
    """Runs the command. Raises UserError."""
    stats(options.what, options.overrides, images=options.images, processes=options.processes)


def stats(what: str, overrides: Sequence[str], *, images: int, processes: int | None = None) -> None:
    """Measures `images` training images, drawn as in training, and prints the settings. Raises UserError for data that cannot be
    used, or a constant channel."""
    settings = read_data(what, overrides)
    if first_of(settings).window is None:
        found = measure(with_window(settings, OPEN), images, processes)
        if not found.whole:
            settings = with_window(settings, proposed(found.values))
            found = measure(settings, images, processes)
    else:
        found = measure(settings, images, processes)
    constant = [str(channel) for channel, std in enumerate(found.std) if std == 0]
    if constant:
        raise UserError(f"{what}: all values of channel {', '.join(constant)} are the same; leave it out, or set data.window")
    sys.stdout.write(_report(found) + "\n" + _lines(settings, found))


def first_of(settings: DataSettings) -> SourceSettings:
    """Returns the settings of the first source of training images; either all these sources have a window or none."""
    return next(iter(settings.sources.values()))


def with_window(settings: DataSettings, window: Window) -> DataSettings:
    """Returns the settings with this window for every source of training images."""
    if settings.mixture is None:
        return settings.model_copy(update={"window": window})
    return settings.model_copy(update={"mixture": [part.model_copy(update={"window": window}) for part in settings.mixture]})


def proposed(values: npt.NDArray[np.float32]) -> Window:
    """Returns the window between two percentiles, each of which is one of the values. Raises UserError if both are equal."""
    low, high = (float(value) for value in np.percentile(values, PERCENTILES, method="nearest"))
    if low == high:
        raise UserError(f"nearly all values are {low:g}: there is no window to propose; set data.window")
    return low, high


def measure(settings: DataSettings, images: int, processes: int | None = None) -> Moments:
    """Returns mean and std of the training images, from the values that `decode.decoded` returns. Raises UserError if no image
    can be read."""
    source, seen, faults = sample_of(open_splits(settings).train, images), list[Seen](), list[Fault]()
    work = partial(look, most=min(MOST_VALUES, max(1, VALUES // len(source))))

    progress = Progress("measuring", len(source))
    with RecordPool(source, processes) as crew:
        for _, one in crew.records(work, chunks(0, len(source), CHUNK)):
            if isinstance(one, Fault):
                faults.append(one)
            else:
                seen.append(one)
            progress.advance()
    if not seen:
        raise UserError(f"none of {len(faults)} training images can be read; the first: {faults[0]}")
    means, squares = (np.stack([getattr(one, name) for one in seen]) for name in ("mean", "square"))
    mean = means.mean(0)
    error = means.std(0, ddof=1) / np.sqrt(len(seen)) if len(seen) > 1 else np.full_like(mean, np.nan)
    std = np.sqrt(np.maximum(squares.mean(0) - mean**2, 0))
    values = np.concatenate([one.values for one in seen])
    return Moments(mean, std, error, values, all(one.whole for one in seen), len(seen), faults)


def sample_of(source: Source, count: int) -> Source:
    """Returns the first `count` images of the first epoch (for a mixture, in proportion to the weights), sorted by position in
    the source."""
    count = min(count, len(source))
    parts = source.parts if isinstance(source, Mixture) else [MixedPart(len(source), 1.0)]
    places = MixedOrder(parts, seed=0, global_batch=count, micro_batch=count).global_step(0)
    return Subset(source, np.sort([place.index for place in places]))


def look(source: Source, record: int, most: int) -> Seen:
    """Returns the statistics of one image, with at most `most` of its values. Raises the errors of reading it."""
    image = still(source.read(record).image)
    planes = [np.asarray(band) for band in (image.each if isinstance(image, Bands) else image.split())]
    mean = np.array([plane.mean(dtype=np.float64) for plane in planes])
    square = np.array([np.square(plane, dtype=np.float64).mean() for plane in planes])
    values = np.stack(planes).ravel()
    if len(values) > most:
        values = values[np.random.default_rng(derive(0, "stats", record)).integers(0, len(values), most)]
    return Seen(mean, square, values.astype(np.float32), planes[0].dtype == np.uint8)


def _report(found: Moments) -> str:
    lines = [f"{found.images} training images of {len(found.mean)} channels; values between 0 and 1"]
    if found.faults:
        lines.append(f"{len(found.faults)} more could not be read; the first: {found.faults[0]}")
    if not found.whole:
        below, above = ((found.values <= 0).mean(), (found.values >= MAX).mean())
        lines.append(f"of the values, {below:.2%} are black at the lower end of the window, {above:.2%} white at the upper")
    lines.append(f"{'channel':>8} {'mean':>10} {'± error':>10} {'std':>10}")
    for channel, figures in enumerate(zip(found.mean, found.error, found.std, strict=True)):
        lines.append(f"{channel:>8} " + " ".join(f"{figure / MAX:>10.4f}" for figure in figures))
    return "\n".join(lines) + "\n"


def _lines(settings: DataSettings, found: Moments) -> str:
    """Returns YAML lines to paste into a recipe."""
    first, lines = first_of(settings), []
    if not first.pixels.plain:
        lines.append("data:" if settings.mixture is None else "data: # in each part of the mixture")
        lines.append(f"  channels: {first.channels}")
        if first.window is not None:
            lines.append(f"  window: [{first.window[0]:.7g}, {first.window[1]:.7g}]")
    lines.append("student:")
    for name, values in (("mean", found.mean), ("std", found.std)):
        lines.append(f"  {name}: [{', '.join(f'{value / MAX:.4g}' for value in values)}]")
    return "\n".join(lines) + "\n"
