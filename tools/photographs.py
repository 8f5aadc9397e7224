"""Photographs of one size for `eva-mim bench data`: 4 : 3 parts of a data set's images, as JPEG files in class folders.

    python -m tools.photographs FOLDER|RECIPE --out FOLDER [--size 500 375] [--quality 95] [data.a=b ...]

At quality 95 the 1,000 photographs of ../shared/data/imagenet_samples have 64 kB in the mean, about as ImageNet's own at that
size; they were enlarged from 341 x 256, so that they are smoother than these.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageOps

from eva_mim.commands.data.index import every_split, read_data


def main(argv: list[str] | None = None) -> int:
    """Write the photographs of the training split and say their mean size."""
    parser = argparse.ArgumentParser(prog="python -m tools.photographs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", metavar="RECIPE|FOLDER")
    parser.add_argument("overrides", nargs="*", metavar="data.a=b")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--quality", type=int, default=95)
    options = parser.parse_intermixed_args(argv)
    source = dict(every_split(read_data(options.what, options.overrides)))["train"]
    total = 0
    for number in range(len(source)):
        sample = source.read(number)
        folder = options.out / (f"{sample.label:04d}" if sample.label is not None else "images")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{number:06d}.jpg"
        ImageOps.fit(sample.image, options.size, Image.Resampling.BICUBIC).save(path, quality=options.quality)
        total += path.stat().st_size
    width, height = options.size
    sys.stdout.write(f"{len(source)} photographs of {width} x {height}, {total / len(source) / 1000:.1f} kB each\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
