"""Settings of single kinds of data: drawn pictures, lists, segmentation maps."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from eva_mim.core.settings import Settings

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class SceneSettings(Settings):
    """Settings of the built-in dataset: pictures drawn from (seed, index)."""

    size: int = Field(64, ge=8)
    """Side of a picture in pixels."""
    train: int = Field(4000, ge=1)
    """Number of training pictures."""
    val: int = Field(1000, ge=1)
    """Number of held-out pictures."""
    labels: str = Field("fine", pattern="^(fine|coarse)$")
    """"fine": texture and shape of the first object (24 classes); "coarse": its shape (6 classes)."""
    seed: int = 0
    """Seed of the drawings (not of the run)."""


class ColumnSettings(Settings):
    """Names of a list's columns; for JSON lines, of the keys in each line."""

    image: str = "image"
    """Column with the image's path, relative to the list's own folder."""
    captions: str | list[str] | None = None
    """One or more columns with captions; a cell of JSONL or Parquet may hold several."""
    label: str | None = None
    """Column with the image's class: its name, or its number in `data.classes`."""
    mask: str | None = None
    """Column with the path of the image's mask, relative to the list's own folder, for `data.segmentation`."""


class VideoSettings(Settings):
    """Videos in place of images. Shards have them as KEY.mp4 (webm, mkv, avi, mov) or as frames KEY.000.jpg, KEY.001.jpg, ...;
    the `image` column of a list names video files. Built-in pictures move, and the direction is their label."""

    frames: bool = False
    """folder: True: each folder with images is a video, whose frames they are in the order of their names. False: each video file
    is one."""
    length: int = Field(16, ge=1)
    """scenes: frames of a video."""

    def check(self, source: str) -> None:
        """Raises ValueError for settings that do not fit a source."""
        for name, fits in (("frames", "folder"), ("length", "scenes")):
            if getattr(self, name) != type(self).model_fields[name].default and source != fits:
                raise ValueError(f"data.video.{name} has no effect with data.source={source}; leave it out")


class SegmentationSettings(Settings):
    """Semantic segmentation maps: for each pixel of an image the number of a class, in a mask file of the image's size with one
    channel or a palette. Built-in pictures have maps of their own: the ground, and what they show."""

    classes: str | None = None
    """File in `root` with one class a line: its value in masks and its name ("17 sea lion", "17: sea lion"), or names alone,
    whose values are the lines from 0."""
    ignore: int = Field(255, ge=0)
    """Value of pixels that belong to no class; a class with it is left out (ADE20K: 0)."""
    label_map: dict[str, list[str]] | None = None
    """Mapping of each new class to its old classes; pixels of a class that is not named are ignored."""
    train: str | None = None
    """folder: folder in `root` with the masks of `data.train`; the mask of a/b.jpg is a/b and `suffix`. Shards have them as
    KEY.seg.png or KEY.mask.png, lists in the column `data.columns.mask`."""
    val: str | None = None
    """folder: folder in `root` with the masks of `data.val`."""
    suffix: str = Field(".png", pattern=r"^[^/]*\.[^./]+$")
    """folder: end of a mask's name in place of the image's suffix."""

    def check(self, source: str, *, held_out: bool) -> None:
        """Raises ValueError for settings that do not fit a source. `held_out`: `data.val` is set."""
        path, fields = "data.segmentation", type(self).model_fields
        foreign = [] if source == "folder" else ["train", "val", "suffix"]
        foreign += ["classes", "ignore", "label_map"] if source == "scenes" else []
        for name in foreign:
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{path}.{name} has no effect with data.source={source}; leave it out")
        if source != "scenes" and self.classes is None:
            raise ValueError(f"{path}.classes must be given: a file with the class names and their values in masks")
        if source == "folder" and self.train is None:
            raise ValueError(f"{path}.train must be given: the folder of the training images' masks")
        if source == "folder" and held_out != (self.val is not None):
            raise ValueError(f"{path}.val and data.val: either both are given, or none (then `val_share` is held out)")
