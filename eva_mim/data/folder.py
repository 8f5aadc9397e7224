"""Images in folders: one folder a class, or one flat folder without labels."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from eva_mim.config import UserError, digest
from eva_mim.contracts import Sample
from eva_mim.data import SourceSettings
from eva_mim.data.captions import CaptionFile, open_captions, record_captions

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


class FolderSource:
    """Image files below a folder, sorted by path; `KEY.txt` or `KEY.json` beside `KEY.jpg` holds its captions."""

    def __init__(self, folder: Path, classes: tuple[str, ...] | None, caption_lines: bool = False):
        self.folder = folder
        self.classes = classes
        self.captions: CaptionFile | None = None
        self._caption_lines = caption_lines
        self._paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self._paths:
            raise UserError(f"{folder}: no images here (looked for {', '.join(sorted(SUFFIXES))})")
        self.fingerprint = digest([str(path.relative_to(folder)) for path in self._paths])
        self._labels = {name: label for label, name in enumerate(classes or ())}
        strangers = {path.relative_to(folder).parts[0] for path in self._paths} - self._labels.keys()
        if classes is not None and strangers:
            raise UserError(
                f"{folder}: {', '.join(sorted(strangers)[:5])}: not among the {len(classes)} training classes"
            )

    def __len__(self) -> int:
        return len(self._paths)

    def key(self, index: int) -> str:
        """The file's path below the folder."""
        return str(self._paths[index].relative_to(self.folder))

    def read(self, index: int) -> Sample:
        """Decode one file as RGB. Raises what Pillow raises."""
        path = self._paths[index]
        with Image.open(path) as image:
            pixels = image.convert("RGB")
        label = self._labels[path.relative_to(self.folder).parts[0]] if self.classes else None
        return Sample(self.key(index), pixels, label, self.captions[index] if self.captions else self._beside(path))

    def stems(self) -> list[str]:
        """The files' paths below the folder without their last suffix: what a caption file calls them."""
        return [path.relative_to(self.folder).with_suffix("").as_posix() for path in self._paths]

    def _beside(self, path: Path) -> tuple[str, ...]:
        files = (path.with_suffix(suffix) for suffix in (".txt", ".json"))
        text, described = (file.read_bytes() if file.is_file() else None for file in files)
        return record_captions(text, described, self._caption_lines)


def open_folder(settings: SourceSettings, split: str) -> FolderSource | None:
    """The source of a split ("train" or "val"); None when the split has no folder of its own. Raises UserError."""
    root, chosen = settings.own_root, settings.train if split == "train" else settings.val
    if split == "val" and chosen is None:
        return None
    folder = root / (chosen or "")
    if not folder.is_dir():
        raise UserError(f"data.{split}: {folder} is not a folder")
    if settings.train is None and (root / "train").is_dir():
        raise UserError(f"data.train: {root} has a sub-folder 'train'; set data.train=train (and data.val)")
    # The training folder alone decides the labels, so that a split with fewer classes keeps them.
    source = FolderSource(folder, class_folders(root / (settings.train or "")), settings.caption_lines)
    source.captions = open_captions(settings, split, source.stems(), f"images in {folder}")
    return source


def class_folders(folder: Path) -> tuple[str, ...] | None:
    """Names of the sub-folders in sorted order (the labels), or None for a flat folder."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return tuple(names) or None
