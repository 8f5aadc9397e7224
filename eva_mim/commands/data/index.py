"""`eva-mim data index`: makes the indexes of all splits of a data set beforehand, and prints the numbers of images and
classes."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from eva_mim.core.contracts import Source
from eva_mim.core.errors import UserError
from eva_mim.core.log import say
from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.registry import SOURCES, lookup
from eva_mim.core.resolve import resolve
from eva_mim.core.settings import Settings, few
from eva_mim.data import DataSettings, SourceSettings
from eva_mim.data.sources.split_names import HELD_OUT, looks_held_out

CLASSES = "classes.txt"
"""File of class names beside shards, as `data pack` writes it."""
MAX_LINE = 2**20
"""Bytes of a line that are read to see whether a file holds captions."""


class DataOnly(Settings):
    """The `data` section of a recipe."""

    data: DataSettings


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds no options: the command has none of its own."""


def run(options: argparse.Namespace) -> None:
    """Runs the command. Raises UserError."""
    describe(options.what, options.overrides)


def describe(what: str, overrides: Sequence[str] = ()) -> None:
    """Opens every split, which makes its index, and prints a line for each. Raises UserError for data that cannot be used."""
    for name, source in every_split(read_data(what, overrides)):
        classes = "no labels" if source.classes is None else f"{len(source.classes)} classes: {few(source.classes, 3)}"
        sys.stdout.write(f"{name:<20} {len(source):>10} images, {classes}\n")


def read_data(what: str, overrides: Sequence[str]) -> DataSettings:
    """Returns the data settings of a recipe, or settings for a folder: shards if it contains tars, else images. Raises
    UserError."""
    tree = {name: section for name, section in read_tree(what).items() if name == "data"}
    return resolve(DataOnly, tree, overrides, what).data


def read_tree(what: str) -> dict[str, Any]:
    """Returns the settings tree of a recipe, or one for a folder. Raises UserError if `what` is neither."""
    folder = Path(what)
    if not folder.is_dir():
        if not folder.is_file() and folder.suffix != ".yaml":
            raise UserError(f"{what}: neither a folder nor a recipe")
        return read_yaml(what)
    if shards := sorted(path.name for path in folder.glob("*.tar*")):
        splits = _splits_of_shards(shards)
        named = {"classes": CLASSES} if (folder / CLASSES).is_file() else {}
        return {"data": {"source": "shards", "root": what} | splits | named | _captions(folder, "val" in splits)}
    data: dict[str, Any] = {"source": "folder", "root": what}
    if (folder / "train").is_dir():
        data["train"] = "train"
        if held_out := [name for name in ("val", "valid", "validation", "test") if (folder / name).is_dir()]:
            data["val"] = held_out[0]
    return {"data": data | _captions(folder, "val" in data)}


def _captions(folder: Path, held_out: bool) -> dict[str, str]:
    """Returns the files of captions by key in a folder, by setting: the only one, or with `held_out` also one for each split, if
    their names say so. Others are named in the log."""
    found = [path.name for path in sorted(folder.glob("*.jsonl")) if _is_captions(path)]
    if len(found) == 1:
        return {"captions": found[0]}
    of_val = [name for name in found if any(HELD_OUT.fullmatch(word) for word in re.split(r"[-_.]", name))]
    of_train = [name for name in found if "train" in re.split(r"[-_.]", name)]
    if held_out and len(of_train) == 1 and len(of_val) == 1:
        return {"captions": of_train[0], "val_captions": of_val[0]}
    if found:
        say(f"  {folder}: captions in {few(found, 4)} are not used; choose with data.captions (and data.val_captions)")
    return {}


def _is_captions(path: Path) -> bool:
    with path.open("rb") as lines, suppress(ValueError):
        first = json.loads(lines.readline(MAX_LINE))
        return isinstance(first, dict) and "key" in first and bool(first.keys() & {"captions", "caption"})
    return False


def _splits_of_shards(names: list[str]) -> dict[str, str]:
    """Returns patterns of both splits, such as train-*.tar* and val-*.tar*, if the names begin with two such words."""
    held_out = looks_held_out(names)
    words = {HELD_OUT.fullmatch(name)[1] for name in held_out}  # type: ignore[index]
    if len(words) != 1 or not all(name.startswith("train") for name in names if name not in held_out):
        return {}
    return {"train": "train*.tar*", "val": f"{words.pop()}*.tar*"}


def every_split(settings: DataSettings) -> Iterator[tuple[str, Source]]:
    """Yields name and source of each split of each data set, with all records: before limits and held-out shares. Raises
    UserError for data that cannot be used."""
    sources: list[tuple[str, SourceSettings]] = [("", settings)]
    if settings.mixture is not None:
        sources = [(f"mixture.{number}.", part) for number, part in enumerate(settings.mixture)]
    if settings.held_out is not None:
        sources.append(("held_out.", settings.held_out))
    for name, one in sources:
        opener = lookup(SOURCES, one.source, f"data.{name}source")
        for split in ("train", "val"):
            source: Source | None = opener(one, split)
            if source is not None:
                yield f"{name}{split}", source
