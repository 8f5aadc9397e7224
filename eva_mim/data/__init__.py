"""Settings of data sets. The modules that implement them are imported when they are used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from eva_mim.core.settings import PLACE, RUNTIME, For, Settings
from eva_mim.data.source_settings import ColumnSettings, SceneSettings, SegmentationSettings, Share, VideoSettings

MAX_CHANNELS = 512
"""Maximum number of channels; hyperspectral cameras have 200 to 400."""


class Pixels(NamedTuple):
    """Pixel format of decoded images."""

    channels: int = 3
    window: tuple[float, float] | None = None
    exif: bool = False
    """True if photographs are turned as their EXIF tag says."""

    @property
    def plain(self) -> bool:
        """True for 8-bit RGB."""
        return self.channels == 3 and self.window is None


RGB = Pixels()
"""Pixel format of 8-bit RGB images."""


MIN_BROKEN = 10
"""Number of broken images that is tolerated whatever their share."""


def too_many(broken: int, images: int, max_broken: float) -> bool:
    """Returns True if `broken` of `images` are more than both `MIN_BROKEN` and the share `max_broken` (`data.max_broken`)."""
    return broken > max(MIN_BROKEN, max_broken * images)


FILES = For("source", "folder", "shards", "list")
"""Condition of settings that apply to image files; built-in pictures are 8-bit RGB and have held-out images of their own."""
FILES_OF_A_SPLIT = For(FILES.setting, *FILES.values, reread=True)
PAIRS = For("source", "folder", "shards")


class SourceSettings(Settings):
    """Source of images, labels and captions, and the choice of its images that are used."""

    source: str = "folder"
    """"scenes" (built in), "folder" (class folders or a flat folder), "shards" (.tar, .tar.gz) or "list" (.csv, .tsv, .jsonl,
    .parquet)."""
    root: Annotated[Path | None, FILES, PLACE] = None
    """Folder of the dataset. A list may name no image outside it. For shards it may be a URL, such as s3://bucket/folder, for
    which fsspec's driver must be installed (s3fs, gcsfs, aiohttp)."""
    train: Annotated[str | None, FILES_OF_A_SPLIT] = None
    """folder: sub-folder with the training images; shards: file pattern such as "train-*.tar"; list: the list's file."""
    val: Annotated[str | None, FILES_OF_A_SPLIT] = None
    """Sub-folder, file pattern or list of the held-out images, as for `train`; without it `val_share` of `train` is held out."""
    val_share: Annotated[Share, FILES] = 0.05
    """Share of the training images held out when `val` is not given."""
    classes: Annotated[str | None, For("source", "shards", "list")] = None
    """File in `root` with one class name a line, by label."""
    class_names: str | None = None
    """Class names for captions and prompts, by label, which replace the dataset's own names (such as n01440764): "imagenet"
    (open_clip's 1,000), or a file in `root` with one name a line."""
    label_map: dict[str, list[str]] | None = None
    """Mapping of each new class to its old classes; training uses these groups of the dataset's own classes as labels."""
    captions: Annotated[str | None, PAIRS] = None
    """File in `root` with a line {"key": KEY, "captions": [...]} for each image, instead of KEY.txt, KEY.json."""
    val_captions: Annotated[str | None, PAIRS] = None
    """File as `captions` for the images of `val`, if their captions are not in `captions`."""
    caption_lines: Annotated[bool, PAIRS] = False
    """True if KEY.txt holds one caption a line, False if the whole file is one caption."""
    bad_shards: Annotated[Literal["refuse", "skip"], For("source", "shards")] = "refuse"
    """Treatment of damaged shards, which are named in the log: "refuse" refuses the run, "skip" leaves them out."""
    shuffle_gb: Annotated[float, Field(gt=0.0), For("source", "shards")] = 8.0
    """Size of a shuffle pool in 10^9 bytes of shards; the host's memory should hold a pool. Data that fits into one pool is
    shuffled globally. Of larger data, blocks are shuffled globally and records within a pool of blocks, so that reading is
    sequential."""
    columns: Annotated[ColumnSettings, For("source", "list")] = ColumnSettings()
    channels: Annotated[int, FILES] = Field(3, ge=1, le=MAX_CHANNELS)
    """Channels of an image. 3: RGB, to which other colour modes are converted; 1: greyscale, to which colours are converted; any
    other number must be the file's number of channels. See docs/data.md."""
    window: Annotated[tuple[float, float] | None, FILES] = None
    """[low, high] for images of more than 8 bits: values between are mapped linearly to 0 to 255, values outside are clipped, and
    nothing is rounded. `eva-mim data stats` proposes a window."""
    exif: Annotated[bool, FILES] = False
    """True: photographs are turned as their EXIF tag says, as phones and viewers mean it. False: they stay as they are stored, as
    in timm and open_clip."""
    limit: int | None = Field(None, ge=1)
    """Number of training images that are used, the first ones of the source; None: all."""
    val_limit: int | None = Field(None, ge=1)
    """Number of held-out images that are used, the first ones; None: all."""
    segmentation: SegmentationSettings | None = None
    """Semantic segmentation maps of the images, which the stage `segment` learns; null: not read."""
    video: VideoSettings | None = None
    """Videos in place of images, which the stage `video` learns; null: images."""
    scenes: Annotated[SceneSettings, For("source", "scenes")] = SceneSettings()

    @property
    def own_root(self) -> Path:
        """Folder `root` of a source that needs one. Raises ValueError if it is not set."""
        if self.root is None:
            raise ValueError(f"data.root must be given when data.source is {self.source!r}")
        return self.root

    @property
    def pixels(self) -> Pixels:
        """Pixel format that images are decoded into."""
        return Pixels(self.channels, self.window, self.exif)

    @model_validator(mode="after")
    def _pixels_are_there(self) -> SourceSettings:
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError(f"data.window={list(self.window)} must rise")
        if self.exif and not self.pixels.plain:
            raise ValueError("data.exif=true is for 8-bit RGB photographs; leave it out with data.channels other than 3 or "
                             "data.window")
        return self

    @model_validator(mode="after")
    def _masks_fit_the_source(self) -> SourceSettings:
        if (self.source == "list" and self.segmentation is not None) != (self.columns.mask is not None):
            raise ValueError(f"data.columns.mask={self.columns.mask}: a list has it for data.segmentation, and for that alone")
        if self.segmentation is not None:
            self.segmentation.check(self.source, held_out=self.val is not None)
        if self.segmentation is not None and self.exif:
            raise ValueError("data.exif=true would turn images and not their masks; leave it out with data.segmentation")
        return self

    @model_validator(mode="after")
    def _videos_fit_the_source(self) -> SourceSettings:
        if self.video is None:
            return self
        self.video.check(self.source)
        if not self.pixels.plain or self.exif or self.segmentation is not None:
            raise ValueError("data.video: videos are of 8-bit RGB and have no maps; leave data.channels, data.window, data.exif "
                             "and data.segmentation out")
        return self

    @model_validator(mode="after")
    def _captions_of_a_split(self) -> SourceSettings:
        if self.val_captions is not None and self.val is None:
            raise ValueError(f"data.val_captions={self.val_captions} needs data.val: held-out images of `train` have `captions`")
        return self


class PartSettings(SourceSettings):
    """One source of a mixture."""

    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Training images are drawn from the parts in proportion to their weights."""
    val_share: Annotated[Share, FILES] = 0.0
    """Share of this part's training images held out when `val` is not given; 0 holds out none."""

    @model_validator(mode="after")
    def _root_is_given(self) -> PartSettings:
        if self.source != "scenes":
            _ = self.own_root
        return self


class DataSettings(SourceSettings):
    """The data of a stage: one source, or a mixture of several."""

    held_out: SourceSettings | None = None
    """Separate dataset of the held-out images: its `val`, or all of it if `val` is not set. The training images may then come
    from other sources: web pairs, for example, with zero-shot accuracy measured on ImageNet's validation images."""
    mixture: list[PartSettings] | None = Field(None, min_length=1)
    """Several sources, each with a weight. An epoch has as many images as all parts together. Each part is sampled without
    replacement, pass after pass: an image is repeated only after all other images of its part."""
    templates: str | list[str] = ["a photo of a {}."]
    """Templates of captions for labelled images without a caption, and of zero-shot prompts; "{}" stands for the class name. The
    value is a list, or "openai" (80) or "simple" (7): templates of CLIP's authors for ImageNet, as open_clip has them."""
    expected: Annotated[int | None, RUNTIME] = Field(None, ge=1)
    """Number of training images that the recipe was written for; a source with another number is refused."""
    quarantine: Annotated[Path | None, RUNTIME] = None
    """File of records that are not read, as written by `eva-mim data verify`. A listed record is replaced by the same sample as a
    broken one, but is not counted as broken."""
    workers: Annotated[int, RUNTIME] = Field(1, ge=0)
    """Loader processes of each rank; no result depends on it."""
    max_broken: Share = 0.01
    """The run stops when more than this share of the images read is broken."""

    @model_validator(mode="after")
    def _one_source_or_several(self) -> DataSettings:
        if self.mixture:
            own = [name for name, field in SourceSettings.model_fields.items() if getattr(self, name) != field.default]
            if own:
                raise ValueError(f"data.{own[0]} belongs to one source: set it in the parts of data.mixture")
        elif self.source != "scenes":
            _ = self.own_root
        return self

    @classmethod
    def chosen_in(cls, tree: Mapping[str, Any], setting: str) -> Any:
        """Returns the value of `setting` that other settings depend on; None for the source of a mixture, which has one in each
        part (settings of a single source beside a mixture are refused together)."""
        return None if setting == "source" and isinstance(tree.get("mixture"), list) else super().chosen_in(tree, setting)

    @property
    def sources(self) -> dict[str, SourceSettings]:
        """Every source of images by its dotted path, those of training images first."""
        mixed = {f"data.mixture.{number}": part for number, part in enumerate(self.mixture or ())}
        found: dict[str, SourceSettings] = {**mixed} or {"data": self}
        return found if self.held_out is None else found | {"data.held_out": self.held_out}

    @property
    def channels_of_all(self) -> int:
        """Number of channels of the images, the same for all sources."""
        return next(iter(self.sources.values())).channels

    @property
    def plain(self) -> bool:
        """True if all images are 8-bit RGB."""
        return all(source.pixels.plain for source in self.sources.values())

    @model_validator(mode="after")
    def _channels_are_the_same(self) -> DataSettings:
        (first, one), *others = self.sources.items()
        for path, other in others:
            if other.channels != one.channels:
                raise ValueError(f"{path}.channels={other.channels} must be the {one.channels} of {first}.channels")
            if path != "data.held_out" and (other.window is None) != (one.window is None):
                raise ValueError(f"{path}.window and {first}.window: either all parts have one, or none: a batch has one type")
        return self

    @model_validator(mode="after")
    def _held_out_once(self) -> DataSettings:
        if self.held_out is None:
            return self
        if self.held_out.source != "scenes":
            _ = self.held_out.own_root
        parts: list[tuple[str, SourceSettings]] = [("data", self)]
        parts += [(f"data.mixture.{number}", part) for number, part in enumerate(self.mixture or ())]
        for path, part in parts:
            if part.val is not None:
                raise ValueError(f"{path}.val={part.val}: the held-out images are those of data.held_out; leave one of them out")
        return self

    @model_validator(mode="after")
    def _templates_have_a_place(self) -> DataSettings:
        if isinstance(self.templates, str):
            if self.templates not in ("openai", "simple"):
                raise ValueError(f'data.templates: {self.templates!r} is not known; "openai", "simple" or a list of templates')
        elif not self.templates:
            raise ValueError("data.templates must name at least one")
        for template in self.templates if isinstance(self.templates, list) else ():
            if "{}" not in template:
                raise ValueError(f"data.templates: {template!r} has no {{}} for the class name")
        return self
