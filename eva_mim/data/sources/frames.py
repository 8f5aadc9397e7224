"""Videos whose frames are image files, a folder each."""

from __future__ import annotations

import os

import numpy as np

from eva_mim.core.contracts import Sample
from eva_mim.core.errors import UserError
from eva_mim.core.settings import digest
from eva_mim.data.sources.decode import FileSource, Raw, read_file
from eva_mim.data.sources.folder import FolderSource
from eva_mim.data.sources.index import Column
from eva_mim.data.sources.videos import FrameFiles


class FrameFolders(FileSource):
    """Videos of a folder: each folder with images below it, in the order of their paths; its frames are the images in the order
    of their names."""

    blocks, videos = None, True

    def __init__(self, images: FolderSource):
        """Raises UserError for a folder with images between whose names another folder's stands."""
        self._images, self.classes = images, images.classes
        self.fingerprint = digest([self._images.fingerprint, "frames"])
        numbers = np.asarray(self._images.index["folder"])
        self._starts = np.concatenate([[0], np.flatnonzero(np.diff(numbers)) + 1, [len(numbers)]]).astype(np.int64)
        again = len(self._starts) - 1 - len(np.unique(numbers))
        if again:
            raise UserError(f"{images.folder}: {again} folders have images and folders side by side; with data.video.frames=true "
                            "each video has a folder of its own")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def key(self, index: int) -> str:
        """Returns the path of the video's folder."""
        return os.path.dirname(self._images.key(int(self._starts[index])))

    def raw(self, index: int) -> Raw:
        """Raises UserError: a video is many files."""
        raise UserError(f"{self._images.folder}: videos of frames are not one file each (data.video.frames=true)")

    def video(self, index: int) -> Sample:
        """Returns a video; its frames are read later."""
        first, end = (int(place) for place in self._starts[index : index + 2])
        files = [self._images.folder / self._images.key(place) for place in range(first, end)]
        label = self._images.label(first)
        return Sample(self.key(index), FrameFiles(len(files), lambda place: read_file(files[place])), label)

    def class_counts(self) -> Column | None:
        """Returns [K] int64, the number of videos of each class; None without classes."""
        if self.classes is None:
            return None
        labels = [self._images.label(int(place)) for place in self._starts[:-1]]
        return np.bincount(np.array(labels, np.int64), minlength=len(self.classes))
