"""Images that are not 8-bit RGB: decoding against numpy, Pillow and tifffile, views against Pillow band by band."""

from __future__ import annotations

import io
import math
import random
import re
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from eva_mim.cli import main
from eva_mim.core.bands import Bands
from eva_mim.core.errors import UserError
from eva_mim.core.settings import parse
from eva_mim.data import RGB, Pixels
from eva_mim.data.sources.decode import decoded, header, planes
from eva_mim.data.sources.folder import FolderSource, open_folder
from eva_mim.data.sources.lists import open_list
from eva_mim.data.sources.shards import ShardSource, open_shards
from eva_mim.data.view_settings import ViewSettings
from eva_mim.data.views import EvalView, TrainView
from eva_mim.trunks.pixels import normalise
from finetune.classify import StageRecipe as ClassifyRecipe
from pretrain.clip import StageRecipe as ClipRecipe
from pretrain.mim_recipe import StageRecipe as MimRecipe
from tests import tiny
from tests.conftest import picture, png, write_tar

Array = npt.NDArray[Any]
HERE = {"source": "folder", "root": ".", "train": "train"}
FIVE = {"mean": [0.5] * 5, "std": [0.2] * 5}


def numbers(channels: int, dtype: str = "uint16", size: tuple[int, int] = (20, 30)) -> Array:
    """[H, W, channels], the same every time."""
    return np.random.default_rng(channels).integers(0, 4000, (*size, channels)).astype(dtype)


def npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pages(array: Array, overviews: bool = False) -> bytes:
    """A TIFF with a page for each channel, and smaller ones behind them."""
    first, *others = [Image.fromarray(np.ascontiguousarray(array[:, :, channel])) for channel in range(array.shape[2])]
    others += [first.resize((15, 10)), first.resize((7, 5))] if overviews else []
    return saved(first, "tiff", save_all=True, append_images=others)


def tiff(array: Array, **options: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


FILES: dict[str, tuple[Callable[[], bytes], Array]] = {
    "npy": (lambda: npy(numbers(5)), numbers(5)),
    "npy, columns first": (lambda: npy(np.asfortranarray(numbers(5))), numbers(5)),
    "npy, big-endian": (lambda: npy(numbers(5).astype(">u2")), numbers(5)),
    "npy, float": (lambda: npy(numbers(2, "float64") / 7), numbers(2, "float64") / 7),
    "npy, [H, W]": (lambda: npy(numbers(1)[:, :, 0]), numbers(1)),
    "npy, 8 bits": (lambda: npy(numbers(6, "uint8")), numbers(6, "uint8")),
    "png, 16 bits": (lambda: saved(Image.fromarray(numbers(1)[:, :, 0]), "png"), numbers(1)),
    "png, 16 bits as 3": (lambda: saved(Image.fromarray(numbers(1)[:, :, 0]), "png"), numbers(1).repeat(3, 2)),
    "png, RGBA": (lambda: png(Image.fromarray(numbers(4, "uint8"))), numbers(4, "uint8")),
    "png, LA": (lambda: png(Image.fromarray(numbers(2, "uint8"), "LA")), numbers(2, "uint8")),
    "tiff, 16 bits": (lambda: saved(Image.fromarray(numbers(1)[:, :, 0]), "tiff"), numbers(1)),
    "tiff, float": (lambda: saved(Image.fromarray(numbers(1, "float32")[:, :, 0]), "tiff"), numbers(1, "float32")),
    "tiff, a page a channel": (lambda: pages(numbers(5)), numbers(5)),
    "tiff, with overviews": (lambda: pages(numbers(5), overviews=True), numbers(5)),
    "tiff, one page with overviews": (lambda: pages(numbers(1), overviews=True), numbers(1)),
    "tiff, big-endian": (lambda: tiff(numbers(1)[:, :, 0], byteorder=">"), numbers(1)),
    "tiff, signed": (lambda: tiff(numbers(1, "int16")[:, :, 0] - 2000), numbers(1, "int16") - 2000),
    "tiff, chunky": (lambda: tiff(numbers(5), photometric="minisblack", planarconfig="contig"), numbers(5)),
    "tiff, packed": (
        lambda: tiff(numbers(5), photometric="minisblack", planarconfig="contig", compression="zlib"), numbers(5)),
    "tiff, planar": (
        lambda: tiff(np.moveaxis(numbers(5), 2, 0), photometric="minisblack", planarconfig="separate"), numbers(5)),
    "tiff, a page a channel, by tifffile": (
        lambda: tiff(numbers(5, "float64").transpose(2, 0, 1), photometric="minisblack", bigtiff=True), numbers(5, "float64")),
    "tiff, RGB of 16 bits": (lambda: tiff(numbers(3), photometric="rgb"), numbers(3)),
    "tiff, RGB and infrared": (lambda: tiff(numbers(4), photometric="rgb"), numbers(4)),
    "tiff, the same of 8 bits": (lambda: tiff(numbers(4, "uint8"), photometric="rgb"), numbers(4, "uint8")),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_the_numbers_are_those_of_the_file(name: str) -> None:
    make, expected = FILES[name]
    found = planes(make(), expected.shape[2])
    assert np.array_equal(np.stack(found, axis=2), expected)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("npy", (30, 20, "NPY", "5 x uint16")), ("npy, [H, W]", (30, 20, "NPY", "1 x uint16")),
        ("png, 16 bits", (30, 20, "PNG", "I;16")), ("tiff, chunky", (30, 20, "TIFF", "5 x uint16")),
        ("tiff, RGB of 16 bits", (30, 20, "TIFF", "RGB")),
    ],
)
def test_a_header_says_what_a_file_is(name: str, said: tuple[int, int, str, str]) -> None:
    assert header(FILES[name][0]()) == (*said, False)
    for broken in (b"", b"nothing", npy(numbers(5))[:-1]):
        with pytest.raises((ValueError, OSError)):
            header(broken)


@pytest.mark.slow
def test_bands_are_packed_and_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards hold the files as they are; the contact sheet shows the first three channels."""
    (tmp_path / "data").mkdir()
    for number in range(3):
        (tmp_path / "data" / f"{number}.npy").write_bytes(npy(numbers(5) + number))
    settings = ["data.channels=5", "data.window=[0, 4000]", "--processes", "1"]
    assert main(["data", "pack", str(tmp_path / "data"), *settings, "--out", str(tmp_path / "shards"), "--keep-order"]) == 0
    source = ShardSource([tmp_path / "shards" / "train-000000.tar"], None, pixels=Pixels(5, (0, 4000)))
    assert [source.raw(number).content for number in range(3)] == [npy(numbers(5) + number) for number in range(3)]
    capsys.readouterr()
    assert main(["data", "inspect", str(tmp_path / "data"), *settings, "--out", str(tmp_path / "sheets")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"format +NPY 100.0%\n +mode +5 x uint16 100.0%", said)
    sheet = Image.open(tmp_path / "sheets" / "train.png")
    shown = (255 * numbers(5, "float64")[:, :, :3] / 4000).astype(np.uint8)
    tile = ImageOps.contain(Image.fromarray(shown), (144, 144))
    left, top = 4, 4 + (144 - tile.height) // 2
    found = sheet.crop((left, top, left + tile.width, top + tile.height))
    assert np.abs(np.asarray(found).astype(int) - np.asarray(tile).astype(int)).max() <= 2  # float32 in between


def test_a_window_spreads_values_over_the_range_of_pixels() -> None:
    found = decoded(npy(numbers(5)), Pixels(5, (300, 3300)))
    assert isinstance(found, Bands)
    assert found.size == (30, 20)
    for channel, band in enumerate(found.each):
        assert band.mode == "F"
        for y, x in ((0, 0), (3, 17), (19, 29)):
            value = int(numbers(5)[y, x, channel])
            assert band.getpixel((x, y)) == pytest.approx(255 * (min(max(value, 300), 3300) - 300) / 3000, abs=1e-4)
    flat = np.concatenate([np.asarray(band).ravel() for band in found.each])
    assert (flat.min(), flat.max()) == (0, 255)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_eight_bit_images_become_rgb_or_grey_as_pillow_makes_them(mode: str) -> None:
    content = saved(picture(1).convert(mode), "tiff" if mode == "CMYK" else "png")
    image = Image.open(io.BytesIO(content))
    plain, grey = decoded(content), decoded(content, Pixels(1))
    assert isinstance(plain, Image.Image)
    assert (plain.mode, plain.tobytes()) == ("RGB", image.convert("RGB").tobytes())
    assert isinstance(grey, Bands)
    expected = image.convert("RGB").convert("L") if mode == "P" else image.convert("L")
    assert [band.tobytes() for band in grey.each] == [expected.tobytes()]
    array = np.asarray(plain)
    again = decoded(npy(array))
    assert isinstance(again, Image.Image)
    assert again.tobytes() == plain.tobytes()


def claiming(shape: tuple[int, ...], descr: str = "<u2") -> bytes:
    """A .npy file that says it is so large and holds 100 bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + bytes(100)


BROKEN: dict[str, tuple[Callable[[], bytes], Pixels, str]] = {
    "16 bits": (lambda: saved(Image.fromarray(numbers(1)[:, :, 0]), "png"), RGB, r"16 bits .* data\.window=.*data stats"),
    "RGB of 16 bits": (lambda: tiff(numbers(3), photometric="rgb"), RGB, r"16 bits .* data\.window="),
    "16 bits in 5": (lambda: npy(numbers(5)), Pixels(5), r"uint16 need data\.window=.*eva-mim data stats"),
    "no 4 of 5": (lambda: npy(numbers(5)), Pixels(4), r"\[20, 30, 5\] of uint16 is no image \[height, width, 4\]"),
    "channels first": (lambda: npy(np.moveaxis(numbers(5), 2, 0)), Pixels(5), r"seems to be \[channels, height, width\]"),
    "no 4 of RGB": (lambda: png(picture(0)), Pixels(4), r"a PNG of mode RGB does not give data\.channels=4"),
    "no 3 of 5 pages": (lambda: pages(numbers(5)), Pixels(3, (0, 9)), r"data\.channels=3"),
    "a PNG that Pillow cuts": (lambda: rgb16_png(), Pixels(3, (0, 9)), r"16 bits a colour, of which Pillow keeps 8"),
    "not a number": (lambda: npy(numbers(2, "float32") * np.nan), Pixels(2, (0, 1)), r"600 values are not finite"),
    "words": (lambda: npy(np.array([["a"]])), Pixels(1, (0, 1)), r"\[1, 1, 1\] of <U1 is no image"),
    "no pixels": (lambda: npy(numbers(5)[:0]), Pixels(5, (0, 1)), r"\[0, 30, 5\] of uint16 is no image"),
    "pickled": (lambda: npy(np.array([[{}]], dtype=object)), Pixels(1), r"are no array \[1, 1\] of object"),
    "a bomb": (lambda: claiming((2**20, 2**20, 5)), Pixels(5), r"100 bytes are no array \[1048576, 1048576, 5\] of uint16"),
    "cut": (lambda: npy(numbers(5))[:-1], Pixels(5), r"5999 bytes are no array"),
    "pages of RGB": (
        lambda: tiff(np.stack([numbers(5)[:, :, :3]] * 2), photometric="rgb"), Pixels(6, (0, 9)), r"2 pages with axes YXS"),
    "too large": (lambda: saved(Image.new("1", (9000, 9000)), "png"), Pixels(4), r"9000 x 9000 pixels of 4 channels"),
}  # fmt: skip


def rgb16_png() -> bytes:
    """Two pixels of 16-bit RGB, which Pillow cannot write."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(b"\0" + struct.pack(">6H", *range(0, 6000, 1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)) + chunk(b"IDAT", pixels) \
        + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_says_why(name: str) -> None:
    make, wanted, said = BROKEN[name]
    with pytest.raises(ValueError, match=said):
        decoded(make(), wanted)


def test_a_tiff_does_not_name_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata of an OME-TIFF say that its second channel lies in another file, which is there."""
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite(tmp_path / "secret.tif", numbers(2)[:, :, 1], metadata=None)
    planes_of = "".join(
        f'<TiffData IFD="0" FirstC="{channel}" PlaneCount="1"><UUID FileName="{file}">urn:uuid:{channel}</UUID></TiffData>'
        for channel, file in enumerate(("own.tif", str(tmp_path / "secret.tif")))
    )
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:0">'
        '<Image ID="Image:0">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="30" SizeY="20" SizeC="2" SizeZ="1" SizeT="1">'
        f"<Channel ID='Channel:0:0'/><Channel ID='Channel:0:1'/>{planes_of}</Pixels></Image></OME>"
    )
    content = tiff(numbers(2)[:, :, 0], description=xml, metadata=None, photometric="minisblack", bigtiff=True)
    with pytest.raises(ValueError, match=r"data\.channels=2"):
        decoded(content, Pixels(2, (0, 1)))


def test_every_cut_of_an_array_is_refused_without_a_crash() -> None:
    content = npy(numbers(2, size=(3, 4)))
    for end in range(len(content)):
        with pytest.raises((ValueError, OSError)):
            decoded(content[:end], Pixels(2, (0, 1)))


def test_without_tifffile_its_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"a TIFF of mode I;16 does not give data\.channels=4; .*pip install 'eva-mim\[tiff\]'"):
        decoded(pages(numbers(5)), Pixels(4, (0, 1)))


# ---- sources


def test_every_source_reads_bands(tmp_path: Path) -> None:
    """A folder, a list and a shard of the same arrays give the same pixels; photographs' folders do not see arrays."""
    root = tmp_path / "train"
    root.mkdir()
    contents = [npy(numbers(5) + number) for number in range(3)]
    for number, content in enumerate(contents):
        (root / f"{number}.npy").write_bytes(content)
    (root / "list.jsonl").write_text("".join(f'{{"image": "{number}.npy"}}\n' for number in range(3)))
    write_tar(root / "train-0.tar", [(f"{number}.npy", content) for number, content in enumerate(contents)])
    settings = {"data": {"root": str(root), "channels": 5, "window": [0, 4000]}, "student": {**tiny.VIT, **FIVE}}
    for source, opener, more in (
        ("folder", open_folder, {}), ("list", open_list, {"train": "list.jsonl"}), ("shards", open_shards, {}),
    ):
        tree = {**tiny.CLASSIFY, **settings, "data": settings["data"] | more | {"source": source}}  # type: ignore[dict-item]
        opened = opener(parse(ClassifyRecipe, tree, "r.yaml").data, "train")  # type: ignore[operator]
        assert len(opened) == 3
        for number in range(3):
            image = opened.read(number).image
            assert isinstance(image, Bands)
            expected = 255 * (numbers(5) + number).clip(0, 4000).astype(float) / 4000
            assert np.abs(np.stack([np.asarray(band) for band in image.each], 2) - expected).max() < 1e-4
    with pytest.raises(UserError, match=r"no images here \(.*\.npy count where data\.channels or data\.window is set"):
        FolderSource(root, None)


# ---- views


def eight_bit_twins(seed: int) -> tuple[Image.Image, Bands]:
    """One picture as RGB and as three bands."""
    image = picture(seed, (50, 38))
    return image, Bands(tuple(image.split()))


def test_a_view_of_bands_is_that_of_rgb_band_by_band() -> None:
    """Pillow resizes each channel of RGB for itself, so three bands give the same bytes; the same random numbers are drawn."""
    image, bands = eight_bit_twins(1)
    for view in (TrainView(ViewSettings(flip=0.5), [16, 24]), EvalView([16, 24], crop_pct=0.8)):
        for seed in range(6):
            one, other = view(image, random.Random(seed)), view(bands, random.Random(seed))
            assert all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))
            assert other[16].dtype == torch.uint8


def test_a_view_of_windowed_bands_is_not_rounded_and_stays_in_the_range() -> None:
    """Of stripes, on which the bicubic filter overshoots; against Pillow's filter on whole numbers, which cuts and rounds."""
    stripes = np.zeros((40, 40), np.uint8)
    stripes[:, ::8] = stripes[:, 1::8] = stripes[:, 2::8] = 255
    whole, real = Image.fromarray(stripes), Image.fromarray(stripes.astype(np.float32))
    overshoot = np.asarray(real.resize((48, 48), Image.Resampling.BICUBIC))
    assert overshoot.min() < -5
    assert overshoot.max() > 260
    view = EvalView([48])(Bands((real, whole.convert("F"))), random.Random(0))[48]
    assert (view.dtype, view.min(), view.max()) == (torch.float32, 0, 255)
    expected = np.asarray(whole.resize((48, 48), Image.Resampling.BICUBIC)).astype(np.float32)
    assert np.abs(view[0].numpy() - expected).max() <= 0.51
    assert (view != view.round()).any()


def test_erased_bands_are_noise_of_their_own_mean_and_std() -> None:
    """A rectangle of a flat image: normal noise around each band's mean, not rounded."""
    mean, std = (0.1, 0.4, 0.5, 0.6, 0.9), (0.01, 0.05, 0.02, 0.04, 0.02)
    flat = Bands(tuple(Image.new("F", (128, 128), 255 * (0.3 if m < 0.3 else 0.2)) for m in mean))
    view = TrainView(ViewSettings(erase=1.0, flip=0.0), [128], (mean, std))
    found = view(flat, random.Random(4))[128]
    erased = (found - torch.tensor([51.0 if m >= 0.3 else 76.5 for m in mean])[:, None, None]).abs().amin(0) > 1e-3
    assert 0.02 < erased.float().mean() < 0.34  # timm's law: 2 % to a third of the area
    for channel in range(5):
        noise: Tensor = found[channel][erased].double() / 255
        count = math.sqrt(len(noise))
        assert abs(noise.mean() - mean[channel]) < 5 * std[channel] / count
        assert abs(noise.std() / std[channel] - 1) < 5 / count


def test_normalising_takes_any_number_of_channels() -> None:
    images = torch.rand(2, 5, 4, 4, generator=torch.Generator().manual_seed(0)) * 255
    found = normalise(images, (0.1, 0.2, 0.3, 0.4, 0.5), (0.5, 0.4, 0.3, 0.2, 0.1))
    for c in range(5):
        assert torch.allclose(found[:, c], (images[:, c] / 255 - 0.1 * (c + 1)) / (0.1 * (5 - c)), atol=1e-5)


# ---- settings


@pytest.mark.parametrize(
    ("recipe", "base", "changes", "said"),
    [
        (ClassifyRecipe, tiny.CLASSIFY, {"data": HERE | {"channels": 5}},
         r"data\.channels=5 needs 5 values of student\.mean and student\.std, which are for 3 channels; `eva-mim data stats"),
        (ClassifyRecipe, tiny.CLASSIFY, {"student": tiny.VIT | FIVE}, r"data\.channels=3 needs 3 values"),
        (ClassifyRecipe, tiny.CLASSIFY, {"student": tiny.VIT | {"mean": [0.5] * 3}},
         r"student\.mean has 3 values and student\.std none"),
        (ClassifyRecipe, tiny.CLASSIFY, {"student": tiny.VIT | FIVE | {"mean": [124.0] * 5}}, r"less than or equal to 1"),
        (ClassifyRecipe, tiny.CLASSIFY, {"student": tiny.VIT | FIVE | {"std": [0.0] * 5}}, r"greater than 0"),
        (ClassifyRecipe, tiny.CLASSIFY, {"data": HERE | {"channels": 0}}, r"data\.channels: .*greater than or equal to 1"),
        (ClassifyRecipe, tiny.CLASSIFY, {"data": HERE | {"window": [9, 9]}}, r"data\.window=\[9\.0, 9\.0\] must rise"),
        (ClassifyRecipe, tiny.CLASSIFY, {"data": tiny.SCENES | {"channels": 1}}, r"data\.source is scenes"),
        (ClassifyRecipe, tiny.CLASSIFY,
         {"data": HERE | {"channels": 5, "held_out": HERE | {"train": None}}, "student": tiny.VIT | FIVE},
         r"data\.held_out\.channels=3 must be the 5 of data\.channels"),
        (ClassifyRecipe, tiny.CLASSIFY,
         {"data": {"mixture": [{"root": ".", "window": [0, 9]}, {"root": "."}]}}, r"either all parts have one, or none"),
        (ClassifyRecipe, tiny.CLASSIFY, {"data": {"mixture": [{"root": "."}], "channels": 5}}, r"set it in the parts"),
        (ClassifyRecipe, tiny.CLASSIFY, {"data": HERE | {"window": [0, 9]}, "view": {"randaugment": "rand-m9"}},
         r"view\.randaugment=rand-m9 is for 8-bit RGB images"),
        (MimRecipe, tiny.MIM,
         {"data": HERE | {"channels": 5}, "student": tiny.VIT | FIVE, "view": {"grayscale": 0.2}}, r"view\.grayscale=0\.2 is"),
        (MimRecipe, tiny.MIM, {"teacher": tiny.MIM["teacher"] | {"mean": [0.5]}}, r"mean: is for teacher\.kind=pixels"),
        (ClipRecipe, tiny.CLIP, {"data": HERE | {"channels": 5}}, r"data\.channels is for 5 channels: open_clip"),
        (ClipRecipe, tiny.CLIP, {"student": tiny.CLIP["student"] | FIVE}, r"student\.mean is for 5 channels: open_clip"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_each_other(recipe: Any, base: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(recipe, base | changes, "r.yaml")
