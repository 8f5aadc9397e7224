"""The folders of a suite's sets, checked before anything is computed.

    DIR/wds_imagenet1k_test/test/0.tar ...        records KEY.jpg (.png, .webp) KEY.cls, perhaps KEY.npy; of retrieval KEY.txt
                                                  with a caption a line
    DIR/wds_imagenet1k_test/test/nshards.txt      number of tars
    DIR/wds_imagenet1k_test/train/...             the same for training images, which a linear probe needs
    DIR/wds_imagenet1k_test/classnames.txt        a class a line, by label
    DIR/wds_imagenet1k_test/zeroshot_classification_templates.txt       a template a line, "{c}" for the class
    DIR/winogavil/winogavil_dataset.csv, winogavil_images/NAME.jpg
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eva_mim.core.contracts import Source
from eva_mim.core.errors import UserError
from eva_mim.core.log import say
from eva_mim.core.settings import few
from eva_mim.data.sources.folder import FolderSource
from eva_mim.data.sources.shards import ShardSource
from eva_mim.data.sources.tar_index import members_of
from eva_mim.evaluate.suite import SuiteSet

CLASSES, TEMPLATES, SHARDS = "classnames.txt", "zeroshot_classification_templates.txt", "nshards.txt"
PROBLEMS, PICTURES = "winogavil_dataset.csv", "winogavil_images"
MAX_TEXT = 2**26
"""Largest size in bytes of a text beside the images."""


class Problem(NamedTuple):
    """A problem of WinoGAViL: which of some images belong to a word."""

    cue: str
    candidates: tuple[int, ...]
    """Positions of the images in the source."""
    correct: tuple[bool, ...]


class Opened(NamedTuple):
    """A set that is there."""

    set: SuiteSet
    source: Source
    classes: tuple[str, ...] = ()
    """Names for prompts, by label; none for retrieval and problems."""
    templates: tuple[str, ...] = ()
    groups: Tensor | None = None
    """[N] group of each image."""
    problems: tuple[Problem, ...] = ()
    train: Source | None = None
    """Its training images, if they were asked for and are there."""

    @property
    def size(self) -> int:
        """Number of its images or problems."""
        return len(self.problems) or len(self.source)


def folder_of(one: SuiteSet, root: Path) -> Path | None:
    """Returns the folder of a set below `root`; None if there is none."""
    return next((root / place for place in one.homes if (root / place).is_dir()), None)


def open_set(one: SuiteSet, folder: Path, *, train: bool = False) -> Opened:
    """Returns the set in a folder; with `train` also its training images. Every rank must call. Raises UserError for another
    layout, missing class names, templates, labels, captions or groups."""
    if one.metric == "jaccard":
        return _open_problems(one, folder)
    retrieval = one.metric == "mean_r1"
    classes = None if retrieval else _lines(folder / CLASSES, one)
    source = _shards(folder / "test", classes, one)
    if retrieval:
        _check_captions(source, one)
        return Opened(one, source)
    assert classes is not None
    more = _shards(folder / "train", classes, one) if train and (folder / "train").is_dir() else None
    groups = None if one.column is None else _groups(source, folder, one.column)
    return Opened(one, source, classes, _templates(folder / TEMPLATES, one), groups, train=more)


def _shards(folder: Path, classes: tuple[str, ...] | None, one: SuiteSet) -> ShardSource:
    paths = sorted(folder.glob("*.tar"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise UserError(f"{one.name}: no shards {folder}/0.tar, ...: the layout is that of DataComp's wds_*_test folders")
    if (told := folder / SHARDS).is_file() and (count := _text(told).strip()) != str(len(paths)):
        raise UserError(f"{one.name}: {told} says {count} shards, but {len(paths)} are there")
    source = ShardSource(paths, classes, caption_lines=True)
    if classes is None:
        return source
    source.check_labels(str(folder.parent / CLASSES))
    if missing := source.unlabelled():
        raise UserError(f"{one.name}: {len(missing)} records of {folder} have no label (KEY.cls), such as "
                        f"{source.key(missing[0])}")
    return source


def _check_captions(source: ShardSource, one: SuiteSet) -> None:
    """Raises UserError for a record without the member that holds captions; none is read."""
    fields = [source.index[field] for field in ("text", "described") if field in source.index]
    without = np.flatnonzero(np.add.reduce([field > 0 for field in fields]) == 0) if fields else np.arange(len(source))
    if len(without):
        raise UserError(f"{one.name}: {len(without)} of {len(source)} records have no caption (KEY.txt), such as "
                        f"{source.key(int(without[0]))}")


def _lines(path: Path, one: SuiteSet) -> tuple[str, ...]:
    if not path.is_file():
        raise UserError(f"{one.name}: {path} is missing, from which the prompts are made")
    lines = tuple(line.strip() for line in _text(path).splitlines())
    if not any(lines):
        raise UserError(f"{one.name}: {path} is empty")
    if blank := lines.count(""):
        say(f"  {one.name}: {blank} of {len(lines)} lines of {path.name} are empty, and count like the others")
    return lines


def _templates(path: Path, one: SuiteSet) -> tuple[str, ...]:
    lines = _lines(path, one)
    if without := [line for line in lines if "{c}" not in line]:
        say(f'  {one.name}: {len(without)} of {len(lines)} templates have no "{{c}}" for the class, and are used as they are: '
            f"{few(map(repr, without), 3)}")
    return tuple(line.replace("{c}", "{}") for line in lines)


def _groups(source: ShardSource, folder: Path, column: int) -> Tensor:
    """Returns the groups [N] of the records, the number at `column` of each KEY.npy."""
    known = dict[str, float]()
    for shard in source.shards:
        for key, content in members_of(shard, "npy"):
            try:
                known[f"{shard.name}/{key}"] = float(np.load(io.BytesIO(content), allow_pickle=False).ravel()[column])
            except (ValueError, EOFError, OSError, TypeError, IndexError) as error:
                raise UserError(f"{shard.place}: {key}.npy has no number at place {column}: {error}") from None
    keys = [source.key(index) for index in range(len(source))]
    if missing := [key for key in keys if key not in known]:
        raise UserError(f"{folder}: {len(missing)} records have no group (KEY.npy), such as {missing[0]}")
    return torch.tensor([known[key] for key in keys], dtype=torch.float64)


def _open_problems(one: SuiteSet, folder: Path) -> Opened:
    table, pictures = folder / PROBLEMS, folder / PICTURES
    if not table.is_file() or not pictures.is_dir():
        raise UserError(f"{one.name}: expected {table} and the folder {pictures}, unpacked from {PICTURES}.zip of the data set "
                        "nlphuji/winogavil of Hugging Face")
    source = FolderSource(pictures, None)
    place = {Path(source.key(index)).stem: index for index in range(len(source))}
    problems = []
    for number, row in enumerate(csv.DictReader(io.StringIO(_text(table))), 2):
        try:
            cue, candidates, right = row["cue"], json.loads(row["candidates"]), set(json.loads(row["associations"]))
            chosen = tuple(place[name] for name in candidates)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{table}, line {number}: expected cue, candidates and associations, with an image for each "
                            f"candidate: {error!r}") from None
        correct = tuple(name in right for name in candidates)
        if not cue or not any(correct):
            raise UserError(f"{table}, line {number}: no cue, or none of the candidates belongs to it")
        problems.append(Problem(cue, chosen, correct))
    if not problems:
        raise UserError(f"{table}: no problems")
    return Opened(one, source, problems=tuple(problems))


def captions_of(source: ShardSource, places: Sequence[int], one: SuiteSet) -> tuple[list[str], Tensor]:
    """Returns the captions [T] of the images at these places, and the row of each caption's image [T]. Raises UserError for an
    image without."""
    texts, owners = list[str](), list[int]()
    for row, place in enumerate(places):
        found = [text for text in source.captions_of(place) if text]
        if not found:
            raise UserError(f"{one.name}: the caption of {source.key(place)} is empty")
        texts += found
        owners += [row] * len(found)
    return texts, torch.tensor(owners)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT:
            raise UserError(f"{path}: {path.stat().st_size} bytes is too large for a text")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
