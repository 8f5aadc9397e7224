"""Images in folders: one folder a class, or one flat folder without labels."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from eva_mim.config import UserError, digest
from eva_mim.contracts import Sample
from eva_mim.data import DataSettings

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


class FolderSource:
    """Image files below a folder, sorted by path; `KEY.txt` beside `KEY.jpg` is its caption."""

    def __init__(self, folder: Path, classes: tuple[str, ...] | None):
        self.folder = folder
        self.classes = classes
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
        text = path.with_suffix(".txt")
        return Sample(self.key(index), pixels, label, text.read_text().strip() if text.is_file() else None)


def open_folder(settings: DataSettings, split: str) -> FolderSource | None:
    """The source of a split ("train" or "val"); None when the split has no folder of its own. Raises UserError."""
    assert settings.root is not None
    chosen = settings.train if split == "train" else settings.val
    if split == "val" and chosen is None:
        return None
    folder = settings.root / (chosen or "")
    if not folder.is_dir():
        raise UserError(f"data.{split}: {folder} is not a folder")
    if settings.train is None and (settings.root / "train").is_dir():
        raise UserError(f"data.train: {settings.root} has a sub-folder 'train'; set data.train=train (and data.val)")
    # The training folder alone decides the labels, so that a split with fewer classes keeps them.
    return FolderSource(folder, class_folders(settings.root / (settings.train or "")))


def class_folders(folder: Path) -> tuple[str, ...] | None:
    """Names of the sub-folders in sorted order (the labels), or None for a flat folder."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return tuple(names) or None
