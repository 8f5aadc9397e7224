"""Segments an image with the `program.pt2` beside this file: python segment_image.py IMAGE MAP.png

Needs torch, numpy and pillow. The values of the map are the class numbers of segmentation.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

FOLDER = Path(__file__).parent


def segment(program: torch.nn.Module, about: dict[str, Any], image: Image.Image) -> torch.Tensor:
    """Returns [H, W] class numbers of an RGB image, from windows of it. `about`: what is in segmentation.json."""
    side, step = about["image_size"], max(1, round(about["image_size"] * about["stride"]))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    short = min(side / min(pixels.shape[2:]), 4 * side / max(pixels.shape[2:]))
    height, width = size = [max(side, round(short * length)) for length in pixels.shape[2:]]
    resized = interpolate(pixels, size, mode="bilinear", antialias=True).float() / 255
    scores, counts = torch.zeros(len(about["classes"]), height, width), torch.zeros(height, width)
    for top in [*range(0, height - side, step), height - side]:
        for left in [*range(0, width - side, step), width - side]:
            scores[:, top : top + side, left : left + side] += program(resized[:, :, top : top + side, left : left + side])[0]
            counts[top : top + side, left : left + side] += 1
    return interpolate((scores / counts)[None], pixels.shape[2:], mode="bilinear")[0].argmax(0)


if __name__ == "__main__":
    about = json.loads((FOLDER / "segmentation.json").read_text())
    program = torch.export.load(FOLDER / "program.pt2").module()
    with torch.inference_mode(), Image.open(sys.argv[1]) as opened:
        found = segment(program, about, opened.convert("RGB"))
    Image.fromarray(found.numpy().astype(np.uint16)).save(sys.argv[2])
