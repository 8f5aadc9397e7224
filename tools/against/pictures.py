"""Drawn pictures as JPEG files, in class folders or with captions in shards."""

from __future__ import annotations

import io
import tarfile
from functools import cache
from pathlib import Path

from PIL import Image

from eva_mim.data.source_settings import SceneSettings
from eva_mim.data.sources.scenes import SceneSource

SIDE, QUALITY, DIFFERENT = 400, 95, 64
"""Side of a picture in pixels, quality of its JPEG file, and how many different ones are drawn; further ones are their copies."""


@cache
def picture(number: int) -> tuple[bytes, str, str]:
    """Returns a picture: JPEG file, caption, class."""
    source, file = SceneSource(SceneSettings(size=SIDE, labels="coarse"), "train"), io.BytesIO()
    sample = source.read(number % DIFFERENT)
    assert source.classes is not None
    assert sample.label is not None
    assert isinstance(sample.image, Image.Image)
    sample.image.save(file, "jpeg", quality=QUALITY)
    return file.getvalue(), sample.captions[0], source.classes[sample.label]


def write_folders(root: Path, count: int) -> int:
    """Writes `count` pictures as ROOT/train/CLASS/NUMBER.jpg, one of each class in ROOT/val; returns the number of classes."""
    classes = set[str]()
    for number in range(count):
        content, _, label = picture(number)
        for split in ("train",) if label in classes else ("train", "val"):
            (root / split / label).mkdir(parents=True, exist_ok=True)
            (root / split / label / f"{number:06d}.jpg").write_bytes(content)
        classes.add(label)
    return len(classes)


def write_shards(root: Path, count: int, shards: int) -> None:
    """Writes `count` pictures with captions (KEY.jpg, KEY.txt), spread over ROOT/train-NUMBER.tar, and one in ROOT/val-0.tar."""
    root.mkdir(parents=True)
    for name, numbers in [*((f"train-{shard}", range(shard, count, shards)) for shard in range(shards)), ("val-0", range(1))]:
        with tarfile.open(root / f"{name}.tar", "w") as archive:
            for number in numbers:
                content, caption, _ = picture(number)
                for suffix, part in (("jpg", content), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(part)
                    archive.addfile(member, io.BytesIO(part))
