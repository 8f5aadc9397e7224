"""Decoding of image files, from bytes to pixels; no other module decodes images."""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from eva_mim.core.bands import Bands
from eva_mim.core.contracts import Sample
from eva_mim.core.timing import phase
from eva_mim.data import MAX_CHANNELS, RGB, Pixels
from eva_mim.data.sources.masks import MaskClasses, Segmentation

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Suffixes of image files, in folders and in shards."""
ARRAYS = (".npy",)
"""Suffixes of arrays, which count as images of a folder only with `data.channels` or `data.window`: beside photographs, an array
may hold anything."""
MAX_FILE_BYTES = 2**30
"""Maximum size of an image file, since every loader worker reads whole files into memory."""
MAX_VALUES = 2**28
"""Maximum number of values in all channels of an image; 1 GB as float32."""
ORIENTATION, UPRIGHT = 0x0112, 1
"""EXIF's tag of the orientation, and its value for an image that is stored upright."""
NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF files; the last two are BigTIFF."""
OPEN = (-math.inf, math.inf)
"""Window that leaves values of more than 8 bits unchanged, for statistics."""
Plane = npt.NDArray[Any]
"""[H, W] values of one channel."""


class Raw(NamedTuple):
    """One record before its image is decoded."""

    key: str
    content: bytes
    """Bytes of the image file."""
    label: int | None = None
    captions: tuple[str, ...] = ()
    mask: bytes | None = None
    """Bytes of the semantic mask's file; None if it has none, or masks are not read."""

    def sample(self, pixels: Pixels = RGB, classes: MaskClasses | None = None) -> Sample:
        """Returns the record with its image decoded, and its mask, if there are `classes`. Raises the errors of `decoded`, and
        ValueError for a mask that is missing, has another size than the image, or has values that are no class."""
        image = decoded(self.content, pixels)
        found = None if classes is None else _segmentation(self.mask, image.size, classes)
        return Sample(self.key, image, self.label, self.captions, found)


class FileSource(ABC):
    """A `contracts.Source` of image files, whose records can be counted and copied without being decoded."""

    classes: tuple[str, ...] | None
    mask_classes: MaskClasses | None = None
    """Classes of the semantic masks, which belong to each record then; None if masks are not read."""
    videos: bool = False
    """True if the records are videos."""
    _pixels: Pixels

    @property
    def unnamed(self) -> bool:
        """True if the records have labels but no class list names them; the labels are then not read."""
        return False

    @abstractmethod
    def raw(self, index: int) -> Raw:
        """Reads one record without decoding its image. Raises OSError, and ValueError for a missing or too large image file, an
        invalid label or malformed captions."""

    @abstractmethod
    def class_counts(self) -> npt.NDArray[np.int64] | None:
        """Returns [K] int64, the number of records of each class; None without classes."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """Returns the key of a record."""

    def prefetch(self, indices: Sequence[int]) -> None:
        """Does nothing: local files need no prefetching."""
        return

    def unlabelled(self) -> Sequence[int]:
        """Returns the positions of records without a label, in rising order; none for a source without classes."""
        return ()

    def read(self, index: int) -> Sample:
        """Reads and decodes one record; of a video the frames are decoded later. Raises the errors of `raw` and `decoded`."""
        return self.video(index) if self.videos else self.raw(index).sample(self._pixels, self.mask_classes)

    def video(self, index: int) -> Sample:
        """Reads one record whose file is a video. Raises the errors of `raw`, and PyAV's."""
        from eva_mim.data.sources.videos import VideoFile

        raw = self.raw(index)
        return Sample(raw.key, VideoFile(raw.content), raw.label, raw.captions)


def suffixes(pixels: Pixels) -> tuple[str, ...]:
    """Returns the suffixes of the image files in a folder."""
    return SUFFIXES if pixels._replace(exif=False) in (RGB, RGB._replace(window=OPEN)) else SUFFIXES + ARRAYS


def read_file(path: Path) -> bytes:
    """Reads an image file. Raises OSError, and ValueError for a file of more than `MAX_FILE_BYTES`."""
    with phase("read"):
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise ValueError(f"{size} bytes are too many for an image")
        return path.read_bytes()


def decoded(content: bytes, pixels: Pixels = RGB) -> Image.Image | Bands:
    """Returns the image: 8-bit RGB as an `Image`, every other format as `Bands`. Raises ValueError for another number of channels
    and for more than 8 bits without a window, and Pillow's errors, among them the one for decompression bombs (more than 179
    million pixels)."""
    with phase("decode"):
        if pixels.plain and not content.startswith(NPY):
            with Image.open(io.BytesIO(content)) as image:
                if _deep(image) or (image.format == "TIFF" and _would_be_cut(image)):
                    raise _without_window("16 bits or more")
                colours: Image.Image = (ImageOps.exif_transpose(image) if pixels.exif else image).convert("RGB")
            return colours
        bands = tuple(_band(plane, pixels.window) for plane in planes(content, pixels.channels))
        return Image.merge("RGB", bands) if pixels.plain else Bands(bands)


MASK_MODES = ("L", "P", "I;16", "I", "1")
"""Pillow's modes of masks; colours would have to be mapped to values first."""


def decoded_mask(content: bytes) -> npt.NDArray[np.int64]:
    """Returns the values [H, W] of a semantic mask: of one channel, or the numbers of a palette. Raises ValueError for colours
    and too many pixels, and Pillow's errors."""
    with phase("decode"), Image.open(io.BytesIO(content)) as image:
        if image.mode not in MASK_MODES:
            raise ValueError(f"has colours ({image.mode}) in place of class numbers")
        if image.width * image.height > MAX_VALUES:
            raise ValueError(f"has {image.width} x {image.height} pixels")
        return np.asarray(image).astype(np.int64)


def _segmentation(content: bytes | None, size: tuple[int, int], classes: MaskClasses) -> Segmentation:
    """Returns the class numbers [H, W] of the mask of an image of `size` (width, height)."""
    if content is None:
        raise ValueError("no mask")
    try:
        mask = decoded_mask(content)
        found = classes.numbered(mask)
    except UnidentifiedImageError:
        raise ValueError("its mask is no image") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"its mask {error}") from None
    if mask.shape != size[::-1]:
        raise ValueError(f"it has {size[0]} x {size[1]} pixels, its mask {mask.shape[1]} x {mask.shape[0]}")
    return found


class Header(NamedTuple):
    """Facts in the header of an image file."""

    width: int
    height: int
    format: str
    """Pillow's name of the format, or NPY."""
    mode: str
    """Pillow's mode, or number and type of the channels, such as "13 x uint16"."""
    turned: bool = False
    """True if an EXIF tag says that the image is to be turned or mirrored."""


def header(content: bytes) -> Header:
    """Returns the header of an image file. Only a file that Pillow cannot open is decoded for it. Raises the errors of
    `decoded`."""
    array = content.startswith(NPY)
    try:
        if not array:
            with Image.open(io.BytesIO(content)) as image:
                turned = image.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT
                return Header(image.width, image.height, str(image.format), image.mode, turned)
    except UnidentifiedImageError:
        if not content.startswith(TIFF):
            raise
    pixels = _npy(content) if array else _tiff(content, "Pillow cannot read it")
    height, width, channels = (*pixels.shape, 1)[:3] if pixels.ndim > 1 else (0, 0, 0)
    return Header(width, height, "NPY" if array else "TIFF", f"{channels} x {pixels.dtype}")


def planes(content: bytes, channels: int) -> list[Plane]:
    """Returns the channels of an image file, each [H, W], with the values in the file. Raises the errors of `decoded`."""
    if content.startswith(NPY):
        return _of_array(_npy(content), channels)
    try:
        with Image.open(io.BytesIO(content)) as image:
            if math.prod(image.size) * channels > MAX_VALUES:
                raise ValueError(f"{image.width} x {image.height} pixels of {channels} channels are too many")
            if (found := _by_pillow(image, channels)) is not None:
                return found
            fault = f"a {image.format} of mode {image.mode} does not give data.channels={channels}"
            if _would_be_cut(image):
                fault = f"a {image.format} of 16 bits a colour, of which Pillow keeps 8"
    except UnidentifiedImageError:
        fault = "Pillow cannot read it"
    if content.startswith(TIFF):
        return _of_array(_tiff(content, fault), channels)
    raise ValueError(fault)


def _deep(image: Image.Image) -> bool:
    """Returns True for an image with one channel of 16 bits or more, by Pillow's mode."""
    return image.mode.startswith(("I", "F"))


def _would_be_cut(image: Image.Image) -> bool:
    """Returns True if Pillow would truncate several 16-bit channels to 8 bits (seen in the tile's raw mode)."""
    return not _deep(image) and ";16" in str(getattr(image, "tile", ""))


def _by_pillow(image: Image.Image, channels: int) -> list[Plane] | None:
    """Returns the channels of an image, each [H, W]; None if Pillow does not read that number of channels."""
    if _would_be_cut(image):
        return None
    if image.format == "TIFF" and len(pages := list(_pages(image, channels + 1))) > 1:
        return pages if len(pages) == channels else None
    if _deep(image):
        return [np.asarray(image)] * channels if channels in (1, 3) else None
    if image.mode in ("P", "PA", "1"):
        clear = image.mode == "PA" or "transparency" in image.info
        image = image.convert("L" if image.mode == "1" else "RGBA" if clear else "RGB")
    if channels in (1, 3):
        image = image.convert("L" if channels == 1 else "RGB")
    return [np.asarray(band) for band in image.split()] if len(image.getbands()) == channels else None


def _pages(image: Image.Image, most: int) -> Iterator[Plane]:
    """Yields the pages of a TIFF that hold one channel each, at most `most`: those of one channel and of the first page's size
    (smaller pages are overviews)."""
    size, found = image.size, 0
    for page in ImageSequence.Iterator(image):
        if page.size == size and len(page.getbands()) == 1:
            found += 1
            yield np.asarray(page)
        if found == most:
            break
    image.seek(0)


def _npy(content: bytes) -> Plane:
    """Returns the array of a .npy file, without a copy. Raises ValueError for an invalid file."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array of format {version}; save it with numpy.save")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    # Arrays of objects would be unpickled, and a declared size beyond the file's own would be allocated.
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"{len(content) - file.tell()} bytes are no array {list(shape)} of {dtype}")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")


def _tiff(content: bytes, fault: str) -> Plane:
    """Returns [H, W, channels] or [H, W] of a TIFF that Pillow cannot read; `fault` is Pillow's reason, for the message. Raises
    ValueError without tifffile or for no image, and tifffile's errors."""
    try:
        import tifffile
    except ImportError:
        raise ValueError(f"{fault}; tifffile may: pip install 'eva-mim[tiff]'") from None
    # Pages are read, not tifffile's series, which may include other files that the metadata names.
    with tifffile.TiffFile(io.BytesIO(content), _multifile=False) as file:
        first = file.pages.first
        pages = [page for page in islice(file.pages, MAX_CHANNELS + 1) if page.shape == first.shape]
        if first.axes not in ("YX", "YXS", "SYX") or (len(pages) > 1 and first.axes != "YX"):
            raise ValueError(f"a TIFF of {len(pages)} pages with axes {first.axes} is no image with channels")
        if math.prod(first.shape) * len(pages) > MAX_VALUES:
            raise ValueError(f"{len(pages)} pages of {list(first.shape)} are too many values")
        arrays = [page.asarray(maxworkers=1) for page in pages]
    if len(arrays) > 1:
        return np.stack(arrays, axis=2)
    return np.moveaxis(arrays[0], 0, 2) if first.axes == "SYX" else arrays[0]


def _of_array(array: Plane, channels: int) -> list[Plane]:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.shape[2] == 1 and channels == 3:
        array = array.repeat(3, axis=2)
    if array.ndim != 3 or array.shape[2] != channels or not 0 < array.size <= MAX_VALUES or array.dtype.kind not in "uif":
        turned = "; it seems to be [channels, height, width]" if array.ndim == 3 and array.shape[0] == channels else ""
        raise ValueError(f"an array {list(array.shape)} of {array.dtype} is no image [height, width, {channels}]{turned} "
                         f"(data.channels={channels})")
    return [array[:, :, channel] for channel in range(channels)]


def _band(plane: Plane, window: tuple[float, float] | None) -> Image.Image:
    """Returns one channel as an image: mode "L" for 8 bits, mode "F" for values mapped through a window. Raises ValueError for
    more than 8 bits without a window, and for values that are not finite."""
    if plane.dtype == np.uint8 and window in (None, OPEN):
        return Image.fromarray(np.ascontiguousarray(plane))
    if window is None:
        raise _without_window(str(plane.dtype))
    values = plane.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{np.size(values) - np.isfinite(values).sum()} values are not finite")
    if window != OPEN:
        low, high = window
        values = ((values - np.float32(low)) * np.float32(255 / (high - low))).clip(0, 255)
    return Image.fromarray(values)


def _without_window(what: str) -> ValueError:
    return ValueError(f"{what} need data.window=[low, high], the values that become black and white; `eva-mim data stats` "
                      "proposes one")
