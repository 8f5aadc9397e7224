"""Images in folders: one folder a class, or one flat folder without labels."""

from __future__ import annotations

import hashlib
import json
import os
import time
from array import array
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eva_mim.core.errors import UserError
from eva_mim.core.log import Progress, say
from eva_mim.core.settings import digest, few
from eva_mim.data import RGB, Pixels, SourceSettings
from eva_mim.data.sources.captions import CaptionFile, open_captions, record_captions
from eva_mim.data.sources.decode import ARRAYS, FileSource, Raw, read_file, suffixes
from eva_mim.data.sources.index import Column, Content, Index, Texts, open_index, say_indexed
from eva_mim.data.sources.masks import Masks, mask_classes
from eva_mim.data.sources.passed_over import CAPTIONS, PassedOver, is_hidden
from eva_mim.data.sources.split_names import looks_held_out
from eva_mim.data.sources.videos import VIDEOS, require_decoder

SETTLED_NS = 2 * 10**9
"""Minimum age of a folder's last change, in nanoseconds, when its index is made. An index made earlier is made again, since a
later change may have the same time stamp (file systems keep times in steps of up to 2 seconds)."""


class FolderSource(FileSource):
    """Image files below a folder, sorted by path; `KEY.txt` or `KEY.json` beside `KEY.jpg` holds its captions. Masks lie in a
    folder of their own, under the images' names."""

    blocks = None

    def __init__(
        self, folder: Path, classes: tuple[str, ...] | None, caption_lines: bool = False, pixels: Pixels = RGB,
        masks: Masks | None = None, *, videos: bool = False,
    ):
        """`videos`: of video files. Every rank must call. Raises UserError for an unreadable folder, no images, images that
        belong to none of `classes` or have no mask."""
        self.folder = folder
        self.classes = classes
        self.captions: CaptionFile | None = None
        self._caption_lines, self._pixels, self.videos = caption_lines, pixels, videos
        self.index = folder_index(folder, VIDEOS if videos else suffixes(pixels))
        self.folders = self.index.texts("folders")
        """Paths of all folders, below `folder`."""
        if passed_over := self.index.facts["passed_over"]:
            say(f"  {folder}: passed over {passed_over}")
        self.fingerprint = self.index.facts["fingerprint"]
        label = {name: number for number, name in enumerate(classes or ())}
        self._labels = [label.get(name.partition("/")[0]) for name in self.folders]
        if classes is not None:
            self._refuse_strangers()
        self._masks = masks
        if masks is not None:
            self.mask_classes = masks.classes
            self.fingerprint = digest([self.fingerprint, masks.classes.fingerprint, self._matched(masks)])

    def _matched(self, masks: Masks) -> str:
        """Returns the fingerprint of the masks. Raises UserError for images without one."""
        found = folder_index(masks.folder, (masks.suffix[masks.suffix.rindex(".") :],))
        folders = found.texts("folders")
        there = {os.path.join(folders[place], found.text("name", row)) for row, place in enumerate(found["folder"])}
        missing = [key for key in map(self.key, range(len(self))) if masks.name(key) not in there]
        if missing:
            raise UserError(f"{masks.folder}: {len(missing)} of {len(self)} images have no mask there, such as "
                            f"{masks.name(missing[0])} for {missing[0]}")
        return found.facts["fingerprint"]

    def _refuse_strangers(self) -> None:
        used = np.bincount(self.index["folder"], minlength=len(self.folders)).nonzero()[0].tolist()
        strangers = {self.folders[number].partition("/")[0] for number in used if self._labels[number] is None}
        if "" in strangers:  # images beside the class folders
            strangers = strangers - {""} | {self.key(int(row)) for row in (self.index["folder"] == 0).nonzero()[0][:5]}
        if strangers:
            raise UserError(f"{self.folder}: {', '.join(sorted(strangers)[:5])}: not among the {len(self.classes or ())} "
                            "training classes")

    def __len__(self) -> int:
        return len(self.index["folder"])

    def key(self, index: int) -> str:
        """Returns the file's path below the folder."""
        return os.path.join(self.folders[self.index["folder"][index]], self.index.text("name", index))

    def raw(self, index: int) -> Raw:
        """Reads one file and its captions. Raises OSError, and ValueError for a too large file or malformed captions."""
        key = self.key(index)
        path = self.folder / key
        label = self.label(index)
        mask = read_file(self._masks.folder / self._masks.name(key)) if self._masks else None
        return Raw(key, read_file(path), label, self.captions[index] if self.captions else self._beside(index, path), mask)

    def label(self, index: int) -> int | None:
        """Returns the class of an image; None without classes."""
        return self._labels[self.index["folder"][index]] if self.classes else None

    def class_counts(self) -> Column | None:
        """Returns [K] int64, the number of images of each class; None without classes."""
        if self.classes is None:
            return None
        label = np.array([-1 if one is None else one for one in self._labels])
        return np.bincount(label[self.index["folder"]], minlength=len(self.classes))

    def stems(self) -> Iterator[str]:
        """Yields the files' paths below the folder without their last suffix, which are the keys in a caption file."""
        return (os.path.splitext(self.key(index))[0] for index in range(len(self)))

    def _beside(self, index: int, path: Path) -> tuple[str, ...]:
        if not self.index["captioned"][self.index["folder"][index]]:  # on network disks a check for each image would be slow
            return ()
        text, described = (file.read_bytes() if file.is_file() else None for file in map(path.with_suffix, CAPTIONS))
        return record_captions(text, described, self._caption_lines)


def open_folder(settings: SourceSettings, split: str) -> FileSource | None:
    """Returns the source of a split ("train" or "val"); None if the split has no folder of its own. Raises UserError for a
    missing or unusable folder."""
    root, chosen = settings.own_root, settings.train if split == "train" else settings.val
    if split == "val" and chosen is None:
        return None
    folder = root / (chosen or "")
    if not folder.is_dir():
        raise UserError(f"data.{split}: {folder} is not a folder")
    if settings.train is None and (root / "train").is_dir():
        raise UserError(f"data.train: {root} has a sub-folder 'train'; set data.train=train (and data.val)")
    classes = class_folders(root / (settings.train or ""))
    if settings.train is None and (found := looks_held_out(classes or ())):
        raise UserError(f"data.train: {root} has a sub-folder '{found[0]}' beside others. If it is held out, set data.train and "
                        f"data.val={found[0]}; if it is a class, set data.train=.")
    # The training folder alone decides the labels, so that a split with fewer classes keeps them.
    if settings.video is not None and settings.video.frames:
        from eva_mim.data.sources.frames import FrameFolders

        return FrameFolders(FolderSource(folder, classes))
    if settings.video is not None:
        require_decoder()
    masks, videos = _masks(settings, split), settings.video is not None
    source = FolderSource(folder, classes, settings.caption_lines, settings.pixels, masks, videos=videos)
    if split == "train":
        if settings.train != ".":
            _refuse_splits_below(source)
        _say_deep_classes(source)
    source.captions = open_captions(settings, split, source.stems, source.fingerprint, f"images in {folder}")
    return source


def _masks(settings: SourceSettings, split: str) -> Masks | None:
    classes, chosen = mask_classes(settings), settings.segmentation
    if classes is None or chosen is None:
        return None
    folder = settings.own_root / str(chosen.train if split == "train" else chosen.val)
    if not folder.is_dir():
        raise UserError(f"data.segmentation.{split}: {folder} is not a folder")
    return Masks(folder, classes, chosen.suffix)


def _refuse_splits_below(source: FolderSource) -> None:
    """Raises UserError if a folder of the source holds a "train" folder and one of held-out images: `data.root` is then too high,
    and both would be trained on."""
    below = dict[str, list[str]]()
    for path in source.folders:
        parent, _, name = path.rpartition("/")
        below.setdefault(parent, []).append(name)
    for parent, names in below.items():
        if "train" in names and (found := looks_held_out(names)):
            root = source.folder / parent
            raise UserError(f"data.root: {root} has sub-folders 'train' and '{found[0]}', which would be trained on together; "
                            f"set data.root={root} data.train=train data.val={found[0]}; if they are classes, set data.train=.")


def _say_deep_classes(source: FolderSource) -> None:
    """Says so if no class folder holds images itself: the classes may be meant to be the folders below."""
    inner = [source.folders[number] for number in np.unique(source.index["folder"]).tolist()]
    if source.classes is not None and all("/" in path for path in inner) and len(inner) > len(source.classes):
        say(f"  {source.folder}: the classes are {few(source.classes, 3)}, not the folders below them ({few(inner, 3)})")


def class_folders(folder: Path) -> tuple[str, ...] | None:
    """Returns the names of the sub-folders in sorted order (the labels); None for a flat folder, and for a single sub-folder: one
    class says nothing about an image."""
    names = sub_folders(folder)
    return names if len(names) > 1 else None


def sub_folders(folder: Path) -> tuple[str, ...]:
    """Returns the names of the folders in a folder that are not hidden, in sorted order."""
    with os.scandir(folder) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)))


def single_folder(settings: SourceSettings) -> str:
    """Returns a hint, to be appended to a message, if the training folder has a single sub-folder; else an empty text."""
    if settings.source != "folder" or settings.root is None:
        return ""
    folder = settings.root / (settings.train or "")
    names = sub_folders(folder)
    return f"; its only folder is {names[0]}; did you mean data.root={folder / names[0]}?" if len(names) == 1 else ""


def folder_index(folder: Path, images: tuple[str, ...] = suffixes(RGB)) -> Index:
    """Returns the index of the files with one of the suffixes `images`, sorted by path. Columns: `name` of each file and number
    of its `folder`; for each folder, in the order of sorted paths, its path (`folders`), its change time (`changed`) and whether
    captions are in it (`captioned`). Raises UserError for an unreadable folder or no images."""

    def fresh(index: Index) -> bool:
        if int(index.facts["made"]) - int(index["changed"].max()) < SETTLED_NS:
            return False
        times = zip(index.texts("folders"), index["changed"].tolist(), strict=True)
        return all(_changed(folder / name) == changed for name, changed in times)

    return open_index(["folder", str(folder.resolve()), sorted(images)], fresh, lambda: _scan(folder, images), str(folder))


class _Images(NamedTuple):
    """Consecutive images among the sorted names of one folder."""

    folder: int
    path: str
    names: list[str]


def _scan(root: Path, images: tuple[str, ...]) -> Content:
    """Walks the tree once, through links to folders too, and returns its index. Raises UserError for an unreadable folder, a
    folder that is there twice, or no images."""
    began, made = time.monotonic(), time.time_ns()
    names, folders, numbers, changed, captioned = Texts(), Texts(), array("I"), array("q"), array("B")
    fingerprint, todo, progress = hashlib.sha256(), list[str | _Images]([""]), Progress(f"walking {root}, images")
    passed_over, walked = PassedOver(images), _Walked(root)
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            walked.add(item)
            folders.add(item)
            changed.append(_changed(root / item))  # before the names are read, so that a later change is noticed
            contents, texts = _contents(root, item, len(changed) - 1, images, passed_over)
            captioned.append(texts)
            todo += reversed(contents)
            continue
        paths = json.dumps([os.path.join(item.path, name) for name in item.names])[1:-1]
        fingerprint.update(((", " if len(names) else "[") + paths).encode())
        numbers.extend([item.folder] * len(item.names))
        progress.advance(len(item.names))
        for name in item.names:
            names.add(name)
    if not len(names):
        more = "" if set(ARRAYS) <= set(images) else "; .npy count where data.channels or data.window is set"
        there = f"; there are {passed_over}" if str(passed_over) else ""
        raise UserError(f"{root}: no images here (looked for {', '.join(sorted(images))}{more}{there})")
    fingerprint.update(b"]")
    say_indexed(str(root), len(names), time.monotonic() - began)
    own: dict[str, Column] = {"folder": np.frombuffer(numbers, np.uint32), "changed": np.frombuffer(changed, np.int64),
                              "captioned": np.frombuffer(captioned, np.uint8)}
    facts = {"fingerprint": fingerprint.hexdigest(), "made": str(made), "passed_over": str(passed_over)}
    return Content(own | names.columns("name") | folders.columns("folders"), facts)


class _Walked:
    """Folders that were walked, so that one to which a link leads is not walked twice, or for ever."""

    def __init__(self, root: Path):
        self._root = root
        self._found: dict[tuple[int, int], str] = {}

    def add(self, path: str) -> None:
        """Adds a folder. Raises UserError for one that was walked under another path."""
        try:
            stat = (self._root / path).stat()
        except OSError:
            return  # reading it will say so
        same = self._found.setdefault((stat.st_dev, stat.st_ino), path) if stat.st_ino else path
        if same != path:
            raise UserError(f"{self._root}: {path} and {same or 'the folder itself'} are one folder, by a link; its images would "
                            "be read twice. Remove one of them")


def _contents(
    root: Path, path: str, number: int, images: tuple[str, ...], passed_over: PassedOver
) -> tuple[list[str | _Images], bool]:
    """Returns the sub-folders and images of a folder in the order of their names, and whether captions may be in it; counts what
    is neither. Raises UserError for an unreadable folder."""
    try:
        with os.scandir(root / path) as entries:
            found = sorted((entry.name, entry.is_dir(), entry.is_symlink()) for entry in entries)
    except OSError as error:
        raise UserError(f"{root / path}: cannot be read: {error.strerror}") from None
    contents: list[str | _Images] = []
    for is_folder, group in groupby(found, itemgetter(1)):
        chosen = []
        for name, _, is_link in group:
            inner = os.path.join(path, name)
            if is_folder and is_hidden(name):
                passed_over.folder(inner)
            elif is_folder:
                contents.append(inner)
            elif os.path.splitext(name)[1].lower() in images and not is_hidden(name):
                chosen.append(name)
            elif is_link and not os.path.exists(root / inner):
                passed_over.link(inner)
            else:
                passed_over.file(inner)
        if chosen:
            contents.append(_Images(number, path, chosen))
    return contents, any(name.endswith(CAPTIONS) for name, is_folder, _ in found if not is_folder)


def _changed(folder: Path) -> int:
    """Returns the time at which a name in the folder was last added, removed or changed, in nanoseconds; -1 if there is no
    folder."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1
