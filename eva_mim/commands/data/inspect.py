"""`eva-mim data inspect`: prints number, sizes, classes and captions of the images, and writes contact sheets."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from eva_mim.commands import positive
from eva_mim.commands.data import add_processes
from eva_mim.commands.data.index import every_split, read_data
from eva_mim.commands.data.parallel import RecordPool, chunks
from eva_mim.core.bands import Bands
from eva_mim.core.contracts import Sample, Source
from eva_mim.core.errors import UserError
from eva_mim.core.log import Progress
from eva_mim.data.class_lists import spoken
from eva_mim.data.quarantine import Fault
from eva_mim.data.sources.decode import FileSource, header
from eva_mim.data.sources.masks import segment_names
from eva_mim.evaluate.sheet import coloured, write_sheet

CHUNK = 64
BARS, BAR = 24, 40
"""Number of classes that are listed, and the length of the longest bar in characters."""
COLUMNS, ROWS = 8, 6
"""Pictures across and down on a contact sheet."""


class Look(NamedTuple):
    """Width and height in pixels, file size in bytes, format, mode, whether EXIF turns it, and numbers of captions and words of
    a record; the image is not decoded for them."""

    width: int
    height: int
    size: int
    format: str
    mode: str
    turned: bool
    captions: int
    words: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    add_processes(parser)
    parser.add_argument("--images", type=positive, default=2000, help="looked at, spread over each split (default 2000)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a contact sheet of each split there")


def run(options: argparse.Namespace) -> None:
    """Runs the command. Raises UserError."""
    inspect(options.what, options.overrides, images=options.images, out=options.out, processes=options.processes)


def inspect(
    what: str, overrides: Sequence[str], *, images: int, out: Path | None, processes: int | None = None
) -> None:
    """Prints a report on every split; with `out`, writes a contact sheet of each there. At most `images` images of a split are
    examined, evenly spread; classes are counted over all images. Raises UserError if no image can be read."""
    settings = read_data(what, overrides)
    videos, maps = (any(getattr(one, section) is not None for one in settings.sources.values())
                    for section in ("video", "segmentation"))
    for name, source in every_split(settings):
        sys.stdout.write(f"{name}: {len(source)} {'videos' if videos else 'images'}\n")
        if isinstance(source, FileSource) and source.videos:
            _report_videos(source, min(images, len(source)))
        elif isinstance(source, FileSource):
            _report_images(_look_around(name, source, min(images, len(source)), processes), len(source))
        if isinstance(source, FileSource):
            counts = source.class_counts()
            if counts is not None and source.classes is not None:
                _report_classes(source.classes, counts)
            elif source.unnamed:
                sys.stdout.write("  labels that no class list names: set data.classes to use them\n")
        if out is not None:
            places = spread(len(source), min(COLUMNS * ROWS, len(source)))
            cells, count = _cells(source, places), len(places)
            if videos:
                places = spread(len(source), min(ROWS, len(source)))
                cells, count = _video_cells(source, places), COLUMNS * len(places)
            if maps:
                places = places[: COLUMNS * ROWS // 2]
                cells, count = _mapped_cells(source, places, segment_names(settings)), 2 * len(places)
            sheet = write_sheet(cells, count, COLUMNS, out / f"{name}.png")
            sys.stdout.write(f"  contact sheet: {sheet}\n")
        sys.stdout.write("\n")


def look(source: FileSource, record: int) -> Look:
    """Returns the facts of a record. Raises the errors of reading its header."""
    raw = source.raw(record)
    image, words = header(raw.content), sum(len(text.split()) for text in raw.captions)
    size, kind = (image.width, image.height, len(raw.content)), (image.format, image.mode, image.turned)
    return Look(*size, *kind, len(raw.captions), words)


def spread(total: int, count: int) -> list[int]:
    """Returns `count` evenly spread positions below `total`; a folder is sorted by class, so its first images would be of one
    class."""
    return [int(one) for one in np.linspace(0, total - 1, count).round()]


def _look_around(name: str, source: Source, count: int, processes: int | None) -> list[Look | Fault]:
    every = list(chunks(0, len(source), CHUNK))  # ranges of neighbours, so that shards are read sequentially
    ranges = [every[number] for number in spread(len(every), min(len(every), -(-count // CHUNK)))]
    found = list[Look | Fault]()
    progress = Progress(f"looking at {name}", sum(map(len, ranges)))
    with RecordPool(source, processes) as crew:
        for _, one in crew.records(look, ranges):
            found.append(one)
            progress.advance()
    return found


def _report_images(found: Sequence[Look | Fault], total: int) -> None:
    looks, faults = [one for one in found if isinstance(one, Look)], [one for one in found if isinstance(one, Fault)]
    if not looks:
        raise UserError(f"none of {len(found)} images can be read; the first: {faults[0]}")
    lines = [f"looked at {len(found)}, {len(faults)} unreadable", *(f"  {fault}" for fault in faults[:3])]
    lines.append(f"{'':<12} {'min':>8} {'5 %':>8} {'median':>8} {'95 %':>8} {'max':>8}")
    values = {"width": [one.width for one in looks], "height": [one.height for one in looks],
              "short side": [min(one.width, one.height) for one in looks], "bytes": [one.size for one in looks]}
    for label, numbers in values.items():
        lines.append(f"{label:<12} " + " ".join(f"{value:>8.0f}" for value in np.percentile(numbers, (0, 5, 50, 95, 100))))
    mean = float(np.mean(values["bytes"]))
    lines.append(f"{mean / 1e3:.3g} kB an image, about {mean * total / 1e9:.3g} GB in all")
    for label, kinds in (("format", Counter(one.format for one in looks)), ("mode", Counter(one.mode for one in looks))):
        lines.append(f"{label:<12} " + "  ".join(f"{kind} {number / len(looks):.1%}" for kind, number in kinds.most_common()))
    if turned := sum(one.turned for one in looks):
        lines.append(f"EXIF         {turned / len(looks):.1%} are to be turned; they are read as stored, unless data.exif=true")
    captions = np.array([one.captions for one in looks])
    if captions.any():
        words = sum(one.words for one in looks) / captions.sum()
        lines.append(f"captions     {captions.min()} to {captions.max()} an image, {words:.1f} words each; "
                     f"{(captions == 0).mean():.1%} of the images have none")
    sys.stdout.writelines(f"  {line}\n" for line in lines)


def _report_videos(source: Any, count: int) -> None:
    """Prints numbers of frames. Raises UserError if no video can be read."""
    lengths, faults = list[int](), list[str]()
    progress = Progress("looking at videos", count)
    for place in spread(len(source), count):
        found = _read(source, place)
        progress.advance()
        if isinstance(found, str):
            faults.append(found)
        else:
            assert not isinstance(found.image, (Image.Image, Bands))
            lengths.append(len(found.image))
    if not lengths:
        raise UserError(f"none of {count} videos can be read; the first: {faults[0]}")
    low, middle, high = (int(value) for value in np.percentile(lengths, (0, 50, 100)))
    sys.stdout.write(f"  looked at {count} videos, {len(faults)} unreadable\n")
    sys.stdout.writelines(f"    {fault}\n" for fault in faults[:3])
    sys.stdout.write(f"  {low} to {high} frames, median {middle}\n")


def _video_cells(source: Source, places: Sequence[int]) -> Iterator[tuple[Any, str]]:
    """Yields of each video evenly spread frames, the first one with its class and number of frames."""
    for found in (_read(source, place) for place in places):
        try:
            if isinstance(found, str):
                raise ValueError(found)
            assert not isinstance(found.image, (Image.Image, Bands))
            chosen = spread(len(found.image), COLUMNS)
            frames = found.image.frames(chosen)
        except Exception as error:  # a video may be broken in any way
            yield from [(None, str(error))] * COLUMNS
            continue
        words = f"{_words(found, source.classes)}, {len(found.image)} frames"
        yield from zip(frames, [words, *(f"frame {place}" for place in chosen[1:])], strict=True)


def _report_classes(classes: Sequence[str], counts: Any) -> None:
    labelled = counts[counts > 0]
    sys.stdout.write(f"  {len(classes)} classes, {(counts == 0).sum()} empty; the others have {labelled.min()} to "
                     f"{labelled.max()} images, median {np.median(labelled):.0f}\n")
    order = np.argsort(-counts, kind="stable")
    if len(order) > BARS:
        sys.stdout.write(f"  the {BARS // 2} largest and the {BARS // 2} smallest:\n")
        order = np.concatenate([order[: BARS // 2], order[-BARS // 2 :]])
    width = min(30, max(len(classes[label]) for label in order))
    for label in order:
        bar = "#" * max(int(counts[label] > 0), round(BAR * counts[label] / counts.max()))
        sys.stdout.write(f"    {classes[label][:width]:<{width}} {counts[label]:>8} {bar}\n")


def _read(source: Source, place: int) -> Sample | str:
    """Returns a record; of a broken one the error, for its cell."""
    try:
        return source.read(place)
    except UserError:  # the error concerns more than one record
        raise
    except Exception as error:  # a record may be broken in any way
        return f"{source.key(place)}: {type(error).__name__}"


def _cells(source: Source, places: Sequence[int]) -> Iterator[tuple[Any, str]]:
    """Yields each record's image, and its class or caption."""
    for found in (_read(source, place) for place in places):
        yield (None, found) if isinstance(found, str) else (found.image, _words(found, source.classes))


def _mapped_cells(source: Source, places: Sequence[int], names: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """Yields each record's image and its segmentation map, with the largest classes of the map."""
    for found in (_read(source, place) for place in places):
        if isinstance(found, str) or found.segmentation is None:
            yield from [(None, found if isinstance(found, str) else f"{found.key}: no map")] * 2
            continue
        yield found.image, _words(found, source.classes)
        counts = np.bincount(found.segmentation[found.segmentation >= 0], minlength=len(names))
        largest = [number for number in np.argsort(-counts)[:3].tolist() if counts[number]]
        yield coloured(found.segmentation), ", ".join(names[number] for number in largest) or "no class"


def _words(sample: Sample, classes: Sequence[str] | None) -> str:
    named = spoken(classes[sample.label]) if classes is not None and sample.label is not None else ""
    return " | ".join(text for text in (named, *sample.captions[:1]) if text) or sample.key
