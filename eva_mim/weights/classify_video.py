"""Classifies a video with the `program.pt2` beside this file: python classify_video.py VIDEO

Needs torch, numpy, pillow and av. It sees one frame of each equal part of the video, of the middle square.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

FOLDER = Path(__file__).parent


def shown(frames: list[Image.Image], side: int) -> torch.Tensor:
    """Returns [T, 3, side, side] of frames: the short side resized, the middle cropped."""
    factor = side / min(frames[0].size)
    size = [max(side, int(factor * length)) for length in frames[0].size]
    pixels = np.stack([np.array(frame.resize(size, Image.Resampling.BICUBIC)) for frame in frames])
    top, left = round((pixels.shape[1] - side) / 2), round((pixels.shape[2] - side) / 2)
    return torch.from_numpy(pixels[:, top : top + side, left : left + side]).permute(0, 3, 1, 2).float() / 255


if __name__ == "__main__":
    import av

    about = json.loads((FOLDER / "video.json").read_text())
    with av.open(sys.argv[1]) as video:
        every = [frame.to_image() for frame in video.decode(video=0)]
    chosen = [every[int((part + 0.5) * len(every) / about["frames"])] for part in range(about["frames"])]
    program = torch.export.load(FOLDER / "program.pt2").module()
    with torch.inference_mode():
        found = program(shown(chosen, about["image_size"])[None]).softmax(-1)[0]
    for number in found.argsort(descending=True)[:5].tolist():
        sys.stdout.write(f"{100 * found[number]:6.2f} %  {about['classes'][number]}\n")
