"""Which frames of a video are seen, and views of them."""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from eva_mim.core.contracts import Video
from eva_mim.core.timing import phase
from eva_mim.data.view_settings import VideoViewSettings
from eva_mim.data.views import Statistics, TrainView, to_tensor


class FrameChoice(NamedTuple):
    """Choice of frames from a video that has at least `frames`."""

    frames: int
    """T, frames that are seen."""
    sampling: Literal["uniform", "dense"] = "uniform"
    stride: int = 1
    """Distance of frames of dense sampling; shorter in videos that do not last so long."""
    clips: int = 1
    """Held-out choices."""

    def drawn(self, length: int, rng: random.Random) -> list[int]:
        """Returns the positions of T frames of a video of `length` for training, in rising order."""
        if self.sampling == "uniform":
            return [self._in_part(length, part, rng.random()) for part in range(self.frames)]
        return self._from(length, rng.randint(0, length - self._span(length)))

    def held_out(self, length: int) -> list[int]:
        """Returns the positions of each choice's T frames, one choice after another: uniform in the middle of equal pieces of
        each part; dense from evenly spread frames on, one choice from the middle."""
        found = list[int]()
        for number in range(self.clips):
            if self.sampling == "uniform":
                found += [self._in_part(length, part, (number + 0.5) / self.clips) for part in range(self.frames)]
            else:
                place = 0.5 if self.clips == 1 else number / (self.clips - 1)
                found += self._from(length, round(place * (length - self._span(length))))
        return found

    def _in_part(self, length: int, part: int, share: float) -> int:
        """Returns the frame at a share of a part's length."""
        return int((part + share) * length / self.frames)

    def _step(self, length: int) -> int:
        return max(1, min(self.stride, (length - 1) // max(1, self.frames - 1)))

    def _span(self, length: int) -> int:
        return (self.frames - 1) * self._step(length) + 1

    def _from(self, length: int, first: int) -> list[int]:
        return [first + number * self._step(length) for number in range(self.frames)]


class VideoTrainView:
    """View for training: that of `TrainView`, the same crop, flip and augmentation for all frames."""

    def __init__(self, settings: VideoViewSettings, side: int, pixels: Statistics | None = None):
        self.settings, self._side, self._view = settings, side, TrainView(settings, [side], pixels)

    def __call__(self, video: Video, rng: random.Random) -> Tensor:
        """Returns [T, 3, side, side] uint8 of all frames of a video."""
        seed = rng.getrandbits(62)
        frames = video.frames(range(len(video)))
        return torch.stack([self._view(frame, random.Random(seed))[self._side] for frame in frames])


class VideoEvalView:
    """View for evaluation: the short side is resized to floor(side / crop_pct), then the centre is cropped, or three squares
    along the long side: both ends and the middle."""

    def __init__(self, settings: VideoViewSettings, side: int, frames: int):
        """`frames`: T, of each choice."""
        self._side, self._frames, self._short = side, frames, int(side / settings.crop_pct)
        self._places = (0.5,) if settings.crops == 1 else (0.0, 0.5, 1.0)

    def __call__(self, video: Video, rng: random.Random) -> Tensor:
        """Returns [V, T, 3, side, side] uint8, V choices of frames times crops. It draws no random numbers."""
        frames = video.frames(range(len(video)))
        with phase("crop and resize"):
            pixels = torch.stack([to_tensor(resize(frame, self._short, InterpolationMode.BICUBIC)) for frame in frames])
            height, width = pixels.shape[2:]
            crops = []
            for place in self._places:
                down, across = (place, 0.5) if height > width else (0.5, place)
                top, left = round(down * (height - self._side)), round(across * (width - self._side))
                crops.append(pixels[:, :, top : top + self._side, left : left + self._side])
        return torch.stack(crops).reshape(-1, self._frames, *crops[0].shape[1:])
