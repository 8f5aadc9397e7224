"""Videos: frames of a video file, of image files, or drawn; none is decoded before it is asked for."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from PIL import Image

from eva_mim.core.bands import Bands
from eva_mim.core.contracts import Video
from eva_mim.core.errors import UserError
from eva_mim.core.timing import phase
from eva_mim.data.sources.decode import MAX_VALUES, decoded

VIDEOS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v")
"""Suffixes of video files, in folders and in shards."""
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
"""FFmpeg's names of the formats that are opened. Others, such as playlists, could name files and hosts."""
MAX_FRAMES = 10**6


def still(image: Image.Image | Bands | Video) -> Image.Image | Bands:
    """Returns an image as it is, and of a video the frame in the middle. Raises the errors of decoding it."""
    if isinstance(image, (Image.Image, Bands)):
        return image
    return image.frames([len(image) // 2])[0]


def require_decoder() -> None:
    """Raises UserError without PyAV."""
    try:
        import av  # noqa: F401
    except ImportError:
        raise UserError("data.video: video files need PyAV: pip install 'eva-mim[video]'") from None


class VideoFile:
    """Frames of a video file in the order in which they are shown, whatever the time between them. Raises ValueError and PyAV's
    errors for a file that is no video."""

    def __init__(self, content: bytes):
        import av

        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
        self._container = av.open(io.BytesIO(content), "r", options=options)
        if not self._container.streams.video:
            raise ValueError("it has no pictures")
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = 1  # loader processes are many
        if self._stream.codec_context.width * self._stream.codec_context.height > MAX_VALUES:
            raise ValueError(f"it has {self._stream.codec_context.width} x {self._stream.codec_context.height} pixels")

    @cached_property
    def _times(self) -> tuple[list[int], list[int]]:
        """Times of all frames, and of those from which decoding can begin; read from the packets."""
        with phase("read"):
            found = ((packet.pts, packet.is_keyframe) for packet in self._container.demux(self._stream))
            packets = [(time, first) for time, first in found if time is not None]
        if not 0 < len(packets) <= MAX_FRAMES:
            raise ValueError(f"it has {len(packets)} frames")
        return sorted({time for time, _ in packets}), sorted({time for time, first in packets if first})

    def __len__(self) -> int:
        return len(self._times[0])

    def frames(self, indices: Sequence[int]) -> list[Image.Image]:
        """Returns the frames at rising positions, some of which may be the same. Raises ValueError for one that is not there."""
        times, starts = self._times
        if self._container.format.name == "avi":
            return self._counted(indices, len(times))
        wanted = [times[index] for index in indices]
        found: dict[int, Image.Image] = {}
        position: int | None = None
        decoder: Any = iter(())
        with phase("decode"):
            for time in dict.fromkeys(wanted):
                start = starts[max(0, bisect_right(starts, time) - 1)] if starts else times[0]
                if position is None or start > position:  # nearer than what would be decoded next
                    self._container.seek(start, stream=self._stream)
                    decoder = self._container.decode(self._stream)
                for frame in decoder:
                    position = frame.pts
                    if position == time:
                        found[time] = frame.to_image()
                    if position is not None and position >= time:
                        break
                if time not in found:
                    raise ValueError(f"frame {times.index(time)} of {len(times)} cannot be decoded")
        return [found[time] for time in wanted]

    def _counted(self, indices: Sequence[int], length: int) -> list[Image.Image]:
        """Returns frames by decoding all from the first: AVI files do not say when a frame is shown, only when it is decoded."""
        self._container.seek(0)
        found = dict[int, Image.Image]()
        with phase("decode"):
            for number, frame in enumerate(self._container.decode(self._stream)):
                if number in indices:
                    found[number] = frame.to_image()  # type: ignore[no-untyped-call]
                if number >= max(indices):
                    break
        if missing := set(indices) - found.keys():
            raise ValueError(f"frame {min(missing)} of {length} cannot be decoded")
        return [found[index] for index in indices]


class FrameFiles:
    """Frames in image files."""

    def __init__(self, count: int, read: Callable[[int], bytes]):
        """`read`: returns the bytes of a frame's file."""
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    def frames(self, indices: Sequence[int]) -> list[Image.Image]:
        """Returns the frames at rising positions, some of which may be the same. Raises the errors of decoding, and ValueError
        for frames of several sizes."""
        found: dict[int, Any] = {index: decoded(self._read(index)) for index in dict.fromkeys(indices)}
        if len(sizes := {image.size for image in found.values()}) > 1:
            raise ValueError(f"its frames have several sizes: {', '.join(f'{w} x {h}' for w, h in sorted(sizes))}")
        return [found[index] for index in indices]


class DecodedFrames:
    """Frames that are decoded."""

    def __init__(self, pictures: Sequence[Image.Image]):
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def frames(self, indices: Sequence[int]) -> list[Image.Image]:
        """Returns the frames at some positions."""
        return [self._pictures[index] for index in indices]


class DrawnFrames:
    """Frames that are drawn."""

    def __init__(self, count: int, draw: Callable[[int], Image.Image]):
        self._count, self._draw = count, draw

    def __len__(self) -> int:
        return self._count

    def frames(self, indices: Sequence[int]) -> list[Image.Image]:
        """Returns the frames at some positions."""
        return [self._draw(index) for index in indices]
