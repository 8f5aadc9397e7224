"""What lies in a data set and is no record of it: hidden files, files of systems, and files of other formats. It is counted and
named."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import PurePosixPath

from eva_mim.core.settings import few

SYSTEM = ("__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information")
"""Names, in lower case, of folders that archives, network disks and systems make."""
CAPTIONS = (".txt", ".json")
"""Suffixes of caption files, which otherwise have the name of their image."""


def is_hidden(path: str) -> bool:
    """Returns True if a part of a relative path is hidden, as `._photo.jpg` and `.ipynb_checkpoints` are, or a system's."""
    parts = PurePosixPath(path).parts  # without "." parts, which paths in archives begin with
    return any((part.startswith(".") and part != "..") or part.lower() in SYSTEM for part in parts)


class PassedOver:
    """Counts of the files that are no records, by kind."""

    def __init__(self, images: tuple[str, ...]):
        """`images`: suffixes of image files."""
        self._images = images
        self._suffixes, self._hidden, self._folders, self._links = Counter[str](), list[str](), list[str](), list[str]()

    def file(self, path: str) -> None:
        """Counts a file that is hidden or no image. Hidden files that are no images, and captions, are not counted."""
        suffix = os.path.splitext(path)[1].lower()
        if is_hidden(path):
            self._hidden += [path] if suffix in self._images else []
        elif suffix not in CAPTIONS:
            self._suffixes[suffix] += 1

    def folder(self, path: str) -> None:
        """Counts a hidden folder, whose files are not read."""
        self._folders.append(path)

    def link(self, path: str) -> None:
        """Counts a link to nothing."""
        self._links.append(path)

    def __str__(self) -> str:
        """Names all of it; empty if there is nothing."""
        found = [f"{count} {suffix or 'without a suffix'}" for suffix, count in self._suffixes.most_common(8)]
        if len(self._suffixes) > 8:
            found.append(f"{sum(self._suffixes.values()) - sum(dict(self._suffixes.most_common(8)).values())} of other suffixes")
        if self._hidden:
            found.append(f"{len(self._hidden)} hidden ({few(self._hidden, 2)})")
        if self._links:
            found.append(f"{len(self._links)} links to nothing ({few(self._links, 2)})")
        if self._folders:
            found.append(f"folders {few(self._folders, 3)}")
        return ", ".join(found)
