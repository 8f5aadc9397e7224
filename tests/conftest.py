"""Fixtures of all tests, and helpers that write tiny real images. Helpers are imported: `from tests.conftest import ...`."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

REPOSITORY = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long-slice", metavar="TEXT", help="of the tests marked long a tenth; another text, another tenth")


def pytest_configure(config: pytest.Config) -> None:
    """Examples of property tests: few, unless `--hypothesis-profile=long` asks for many."""
    settings.register_profile("short", max_examples=40)
    settings.register_profile("long", max_examples=1000)
    settings.load_profile(config.getoption("--hypothesis-profile") or "short")


def in_slice(text: str, test: str) -> bool:
    """A tenth of all tests, drawn by a hash: over some tens of commits each test has its turn."""
    return hashlib.sha256(f"{text} {test}".encode()).digest()[0] * 10 < 256


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests first: what is left for the end of a parallel run is short."""
    text = config.getoption("--long-slice")
    if text is not None:
        left = [item for item in items if item.get_closest_marker("long") and not in_slice(text, item.nodeid)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the golden fixtures: $EVA_MIM_SHARED, else `shared` beside the repository."""
    folder = Path(os.environ.get("EVA_MIM_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no golden fixtures: {folder / 'golden'} does not exist (set EVA_MIM_SHARED)")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No test touches the user's cache, and none sees another one's. It lies outside `tmp_path`, where it would be a class."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("EVA_MIM_CACHE", str(home / "cache"))
    yield home / "cache"
    shutil.rmtree(home, ignore_errors=True)


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A colourful (width, height) picture that no other seed gives."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR)


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file: nothing is lost."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def make_folder(root: Path, classes: Mapping[str, int], size: tuple[int, int] = (40, 32)) -> Path:
    """`root/CLASS/00000.png` ...: so many pictures of each class; the class "" is `root` itself. Seeds count upwards."""
    seed = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / name / f"{number:05d}.png").write_bytes(png(picture(seed, size)))
            seed += 1
    return root


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar (gzip when the name says so) of exactly these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    path.write_bytes(gzip.compress(buffer.getvalue()) if path.suffix == ".gz" else buffer.getvalue())
    return path


def make_shards(
    root: Path, name: str = "train-000000.tar", *, count: int = 6, first: int = 0, classes: int = 3, captions: bool = True
) -> Path:
    """A shard of pictures `first`, `first + 1`, ...; picture i has label i % classes and caption "picture i"."""
    members: list[tuple[str, bytes]] = []
    for seed in range(first, first + count):
        members.append((f"{seed:05d}.png", png(picture(seed))))
        members.append((f"{seed:05d}.cls", str(seed % classes).encode()))
        if captions:
            members.append((f"{seed:05d}.txt", f"picture {seed}\n".encode()))
    return write_tar(root / name, members)
