"""Records that a run uses: the training and the held-out source, opened from the settings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from eva_mim.core.bands import Bands
from eva_mim.core.contracts import Sample, Source
from eva_mim.core.distributed import run_on_main
from eva_mim.core.errors import UserError
from eva_mim.core.log import say
from eva_mim.core.registry import SOURCES, lookup
from eva_mim.core.rng import derive
from eva_mim.core.settings import digest
from eva_mim.data import DataSettings, PartSettings, SourceSettings
from eva_mim.data.overlap import refuse_shared
from eva_mim.data.prompts import class_words, prompt_templates
from eva_mim.data.quarantine import Quarantine, read_quarantine
from eva_mim.data.sources.videos import still
from eva_mim.data.subset import NONE, Complement, Mixture, Positions, Subset

LOOKS = 4
"""Images of each split whose pixels are compared when the data lies at another place."""
HOLD_OUT_SEED = 0
"""Seed of the held-out share, the same for every run, so that runs can be compared."""


class Splits(NamedTuple):
    train: Source
    val: Source

    def facts(self) -> dict[str, Any]:
        """Returns sizes and hash of the splits: the facts that decide which records a run uses and in which order. `pixels` is a
        hash of a few images, since the files of a resized copy have the same names. Every rank must call."""
        pixels = run_on_main(lambda: digest([_looks(source) for source in self]))
        records = digest([self.train.fingerprint, self.val.fingerprint])
        return {"train": len(self.train), "val": len(self.val), "sha256": records, "pixels": pixels}


    def without_labels(self) -> list[str]:
        """Returns a text for each split some of whose records have no label: how many, and the first one."""
        found = []
        for name, source in zip(("training", "held-out"), self, strict=True):
            if places := source.unlabelled():
                which = "none" if len(places) == len(source) else f"{len(places)}"
                which = f"{which} of the {len(source)} {name} records {'has a' if which == 'none' else 'have no'} label"
                found.append(f"{which}, such as {source.key(places[0])}" if len(places) < len(source) else which)
        return found


def glances(source: Source, count: int) -> Iterator[Sample | Exception]:
    """Yields at most `count` records, evenly spread; for a broken one its error, since the loader counts those."""
    for place in np.linspace(0, len(source) - 1, min(count, len(source))).astype(np.int64).tolist():
        try:
            yield source.read(place)
        except Exception as error:  # a record may be broken in any way
            yield error


def _looks(source: Source) -> list[str]:
    """Returns hashes of a few images; of a broken one the type of its error."""
    found = []
    for sample in glances(source, LOOKS):
        if isinstance(sample, Exception):
            found.append(type(sample).__name__)
            continue
        image = still(sample.image)
        bands = image.each if isinstance(image, Bands) else [image]
        found.append(hashlib.sha256(b"".join(band.tobytes() for band in bands)).hexdigest())
    return found


class Opened(NamedTuple):
    """Splits of one source; `images` is the number of its training images before the limit."""

    train: Subset
    val: Subset | None
    images: int


def pixels_of(settings: DataSettings) -> list[list[Any]]:
    """Returns the pixel format of each source, in JSON's types."""
    return [[part.channels, part.window and list(part.window), part.exif] for part in settings.sources.values()]


def roots_of(settings: DataSettings) -> list[str]:
    """Returns the folder of each source: two may have files of the same names."""
    return [str(part.root.resolve()) for part in settings.sources.values() if part.root is not None]


def open_splits(settings: DataSettings) -> Splits:
    """Returns the training and the held-out source. Raises UserError for a missing or empty folder, class lists that differ, no
    held-out images, or an unexpected number of training images."""
    share = settings.held_out is None
    listed = None if settings.quarantine is None else read_quarantine(settings.quarantine)
    sources: Sequence[SourceSettings] = settings.mixture or [settings]
    parts = [_open_source(source, listed, share=share) for source in sources]
    images = sum(part.images for part in parts)
    if settings.expected not in (None, images):
        raise UserError(
            f"data.expected: the recipe was written for {settings.expected} training images, but "
            f"{settings.root or 'the mixture'} has {images} after the held-out ones; its schedule counts epochs of them. "
            "To go on, set data.expected=null"
        )
    held_out = {f"{path}.val": part.val for path, part in zip(settings.sources, parts, strict=False) if part.val is not None}
    if settings.held_out is not None:
        held_out = {"data.held_out": _open_held_out(settings.held_out, listed)}
    if not held_out:
        raise UserError(f"data.val: no held-out images; give {'a part ' if settings.mixture else ''}val, a val_share above 0, or "
                        "data.held_out")
    for path, part in zip(settings.sources, parts, strict=False):
        for other, held in held_out.items():
            if held.source is not part.train.source:  # a share is other records of the same source
                refuse_shared(part.train.source, held.source, path, other)
    apart = list(held_out.values())
    if settings.mixture is None:
        return Splits(parts[0].train, apart[0])
    weights, templates = [part.weight for part in settings.mixture], prompt_templates(settings.templates)
    _say_counts(settings.mixture, parts)
    return Splits(
        Mixture([part.train for part in parts], weights, templates), Mixture(apart, [1.0] * len(apart), templates[:1])
    )


def _open_held_out(settings: SourceSettings, listed: Quarantine | None) -> Subset:
    opener = lookup(SOURCES, settings.source, "data.held_out.source")
    source: Source = opener(settings, "val") or opener(settings, "train")
    every = Complement(_at_most(settings.val_limit, len(source)))
    return Subset(source, every, settings.label_map, class_words(settings), _quarantined(source, listed, settings))


def _quarantined(source: Source, listed: Quarantine | None, settings: SourceSettings) -> dict[int, str]:
    return {} if listed is None else listed.reasons(source, str(settings.root))


def _open_source(settings: SourceSettings, listed: Quarantine | None, *, share: bool) -> Opened:
    """Opens the splits of one source. `share`: whether `val_share` of the training images is held out if there is no `val`."""
    opener = lookup(SOURCES, settings.source, "data.source")
    train: Source = opener(settings, "train")
    val: Source | None = opener(settings, "val")
    held = NONE
    val_indices: Complement | Positions = Complement(_at_most(settings.val_limit, len(val or ())))
    if val is None and share and settings.val_share:
        shuffled = np.random.default_rng(derive(HOLD_OUT_SEED, "hold-out")).permutation(len(train))
        held = np.sort(shuffled[: max(1, round(settings.val_share * len(train)))])
        val, val_indices = train, held[: settings.val_limit]
    if val is not None and train.classes != val.classes:
        raise UserError(f"the training split has classes {train.classes}, the held-out split {val.classes}")
    words, images = class_words(settings), len(train) - len(held)
    reasons = _quarantined(train, listed, settings)
    chosen = Subset(train, Complement(_at_most(settings.limit, images), held), settings.label_map, words, reasons)
    if val is None:
        return Opened(chosen, None, images)
    reasons = reasons if val is train else _quarantined(val, listed, settings)
    return Opened(chosen, Subset(val, val_indices, settings.label_map, words, reasons), images)


def _at_most(limit: int | None, count: int) -> int:
    return count if limit is None else min(limit, count)


def _say_counts(settings: Sequence[PartSettings], parts: Sequence[Opened]) -> None:
    """Logs the images and passes of each part, before the first image is read."""
    images, weights = sum(len(part.train) for part in parts), sum(part.weight for part in settings)
    say(f"data.mixture: an epoch is {images} images")
    for number, (one, part) in enumerate(zip(settings, parts, strict=True)):
        passes = images * one.weight / weights / len(part.train)
        say(f"  {number}: {one.source} {one.root or ''}: {len(part.train)} training images, {len(part.val or ())} held out, "
            f"weight {one.weight:g}: {one.weight / weights:.2%} of the samples, {passes:.3g} passes an epoch")
