"""`eva-mim data merge`: joins data sets of class folders by the names of their classes, and leaves out what is held out."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from eva_mim.commands.data.index import CLASSES, every_split, read_data
from eva_mim.core.errors import UserError
from eva_mim.core.files import sha256, write_text
from eva_mim.core.lock import is_lock, locked
from eva_mim.core.log import Progress
from eva_mim.core.settings import few
from eva_mim.data.class_lists import spoken
from eva_mim.data.sources.folder import FolderSource

YOUTUBE = re.compile(r"(.{11})_\d{6}_\d{6}")
"""Names of Kinetics' files: the video's id, and the seconds that were cut from it."""


class Item(NamedTuple):
    """A file with its class."""

    path: Path
    label: str

    @property
    def id(self) -> str:
        """Name of the recording, the same in several sets: Kinetics' video id, else the file's name without suffix."""
        match = YOUTUBE.fullmatch(self.path.stem)
        return match[1] if match else self.path.stem


class Part(NamedTuple):
    """One of the data sets."""

    what: str
    classes: int
    train: list[Item]
    val: list[Item]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the lists; more data sets follow the first")


def run(options: argparse.Namespace) -> None:
    """Runs the command. Raises UserError."""
    more = [word for word in options.overrides if "=" not in word]
    merge([options.what, *more], [word for word in options.overrides if "=" in word], options.out)


def merge(whats: Sequence[str], overrides: Sequence[str], out: Path) -> None:
    """Writes lists of the training and the held-out files of all data sets, and the joined classes. Classes are the same if their
    names are, whatever the case and what stands between words. Raises UserError for data that is not in class folders."""
    if len(whats) < 2:
        raise UserError("data merge joins two or more data sets: eva-mim data merge A B --out FOLDER")
    names: dict[str, str] = {}
    parts = [_open(what, overrides, names) for what in whats]
    column = "video" if any(read_data(what, overrides).video is not None for what in whats) else "image"
    held = [item for part in parts for item in part.val]
    ids, sizes = {item.id for item in held}, _by_size(held)
    hashes: dict[Path, str] = {}
    kept, seen, rows = list[Item](), set[str](), list[str]()
    progress = Progress("comparing training files", sum(len(part.train) for part in parts))
    for part in parts:
        counts = {"id": 0, "content": 0, "copy": 0}
        for item in part.train:
            progress.advance()
            reason = "id" if item.id in ids else "content" if _same(item, sizes, hashes) else "copy" if item.id in seen else None
            if reason:
                counts[reason] += 1
                continue
            seen.add(item.id)
            kept.append(item)
        rows.append(f"{part.what[-24:]:<24} {part.classes:>7} {len(part.train):>8} {len(part.val):>8} " +
                    " ".join(f"{count:>8}" for count in counts.values()) + "\n")
    with locked(out):
        if strangers := sorted(path.name for path in out.iterdir() if not is_lock(path.name)):
            raise UserError(f"--out {out} is not empty ({few(strangers, 3)}); choose another folder")
        for split, items in (("train", kept), ("val", held)):
            write_text(out / f"{split}.jsonl", "".join(_line(item, out, column) for item in items))
        write_text(out / CLASSES, "".join(f"{name}\n" for name in sorted(names.values())))
    sys.stdout.write(f"{'data set':<24} {'classes':>7} {'training':>8} {'held out':>8} {'id':>8} {'content':>8} {'copies':>8}\n")
    sys.stdout.writelines(rows)
    sys.stdout.write(f"{len(names)} classes; {len(kept)} training files, {len(held)} held out; left out are training files whose "
                     "id or content is held out in any set, and copies of others\n\n")
    root = Path(os.path.commonpath([out.resolve(), *(item.path.resolve().parent for item in (*kept, *held))]))
    where = Path(os.path.relpath(out.resolve(), root))
    settings = ["data.source=list", f"data.root={root}", *(f"data.{split}={where / split}.jsonl" for split in ("train", "val")),
                f"data.classes={where / CLASSES}", f"data.columns.image={column}", "data.columns.label=label"]
    settings += ["data.video={}"] if column == "video" else []
    sys.stdout.write(f"train on them: {' '.join(map(quote, settings))}\n")


def _open(what: str, overrides: Sequence[str], names: dict[str, str]) -> Part:
    """Returns the files of a data set; adds its classes to `names`, by what they sound like."""
    found: dict[str, list[Item]] = {"train": [], "val": []}
    classes: tuple[str, ...] = ()
    for split, source in every_split(read_data(what, overrides)):
        if split not in found or not isinstance(source, FolderSource) or source.classes is None:
            raise UserError(f"{what}: data merge joins files in class folders, with folders of their own for training and for "
                            "held-out ones")
        classes = source.classes
        own = [names.setdefault(_sound(name), name) for name in classes]
        labels: list[Any] = [source.label(index) for index in range(len(source))]
        found[split] = [Item(source.folder / source.key(index), own[label]) for index, label in enumerate(labels)]
    return Part(what, len(classes), found["train"], found["val"])


def _sound(name: str) -> str:
    """Returns a class name in lower case, with single spaces between its words."""
    return " ".join(re.split(r"[\W_]+", spoken(name).lower())).strip()


def _by_size(items: Sequence[Item]) -> dict[int, list[Path]]:
    found: dict[int, list[Path]] = {}
    for item in items:
        found.setdefault(item.path.stat().st_size, []).append(item.path)
    return found


def _same(item: Item, sizes: dict[int, list[Path]], hashes: dict[Path, str]) -> bool:
    """Returns whether a held-out file has the same bytes; only files of one size are read."""
    others = sizes.get(item.path.stat().st_size, [])
    for path in (others and [item.path, *others]):
        if path not in hashes:
            hashes[path] = sha256(path)
    return any(hashes[path] == hashes[item.path] for path in others)


def _line(item: Item, out: Path, column: str) -> str:
    path = os.path.relpath(item.path.resolve(), out.resolve())
    return json.dumps({column: path, "label": item.label}, ensure_ascii=False) + "\n"
