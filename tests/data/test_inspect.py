"""What `eva-mim data inspect` and `eva-mim bench data` say, against counts made another way."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from pydantic import ValidationError

from eva_mim.cli import main
from eva_mim.commands.data import speed
from eva_mim.commands.data.inspect import COLUMNS, spread
from eva_mim.core.timing import Stopwatch
from eva_mim.data import DataSettings
from eva_mim.data.sources.folder import open_folder
from eva_mim.evaluate.sheet import LINE, TILE
from tests.conftest import make_folder, make_shards, picture, png, write_tar


def table(text: str, row: str) -> list[float]:
    """The numbers of a row."""
    (line,) = re.findall(rf"^  {row} +(.*)$", text, re.MULTILINE)
    return [float(value) for value in line.split()]


def test_splits_of_a_bare_folder_are_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `data pack` writes them, and as folders are called; what is not clear is asked about."""
    for number, name in enumerate(("train-0.tar", "train-1.tar", "val-0.tar")):
        make_shards(tmp_path / "shards", name, count=3 + number)
    make_folder(tmp_path / "folders", {"train/a": 4, "test/a": 2})
    for folder, counts in (("shards", (7, 5)), ("folders", (4, 2))):
        assert main(["data", "index", str(tmp_path / folder)]) == 0
        said = capsys.readouterr().out
        assert [int(line.split()[1]) for line in said.splitlines()] == list(counts), said
    make_shards(tmp_path / "shards", "more-0.tar")
    assert main(["data", "index", str(tmp_path / "shards")]) == 2
    assert "has val-0.tar beside other shards" in capsys.readouterr().err


def test_sizes_formats_and_classes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_folder(tmp_path / "data", {"ant": 1, "bee": 40, "cow": 9}, (48, 30))
    for number in range(30):
        buffer = io.BytesIO()
        picture(number, (20 + number, 64)).convert("L").save(buffer, "jpeg")
        (root / "cow" / f"more-{number}.jpg").write_bytes(buffer.getvalue())
    (root / "empty").mkdir()
    (root / "bee" / "bad.png").write_bytes(b"?")
    assert main(["data", "inspect", str(root), "--processes", "1"]) == 0
    said = capsys.readouterr().out
    files = sorted(root.rglob("*.[pj][np]g"))
    opened = [Image.open(path) for path in files if path.name != "bad.png"]
    sizes = [path.stat().st_size for path in files if path.name != "bad.png"]
    for row, values in {"width": [one.width for one in opened], "height": [one.height for one in opened],
                        "short side": [min(one.size) for one in opened], "bytes": sizes}.items():
        assert table(said, row) == [float(f"{value:.0f}") for value in np.percentile(values, (0, 5, 50, 95, 100))]
    assert "train: 81 images\n" in said
    assert "looked at 81, 1 unreadable" in said
    assert "bee/bad.png: UnidentifiedImageError" in said
    assert "PNG 62.5%  JPEG 37.5%" in said
    assert "RGB 62.5%  L 37.5%" in said
    assert "4 classes, 1 empty; the others have 1 to 41 images, median 39" in said
    bars = re.findall(r"^    (\w+) +(\d+) ?(#*)$", said, re.MULTILINE)
    assert [(name, int(count), len(bar)) for name, count, bar in bars] == [
        ("bee", 41, 40), ("cow", 39, round(40 * 39 / 41)), ("ant", 1, 1), ("empty", 0, 0)]


def test_captions_are_counted_in_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = []
    for number, captions in enumerate((["one two three"], ["a", "b c"], [])):
        members += [(f"{number}.png", png(picture(number))), (f"{number}.cls", b"0")]
        if captions:
            members.append((f"{number}.json", ('{"captions": ["' + '", "'.join(captions) + '"]}').encode()))
    write_tar(tmp_path / "train-0.tar", members)
    main(["data", "inspect", str(tmp_path), "--processes", "1"])
    assert "captions     0 to 2 an image, 2.0 words each; 33.3% of the images have none" in capsys.readouterr().out


def test_so_many_are_looked_at_spread_over_the_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(5):
        make_shards(tmp_path, f"train-{number}.tar", count=64, first=64 * number)
    main(["data", "inspect", str(tmp_path), "--images", "128", "--processes", "1"])
    assert "looked at 128, 0 unreadable" in capsys.readouterr().out
    assert spread(5, 2) == [0, 4]
    assert spread(5, 5) == [0, 1, 2, 3, 4]


def test_a_contact_sheet_shows_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_folder(tmp_path / "data", {"ant": 6, "bee": 7}, (TILE, TILE))
    (root / "bee" / "00003.png").write_bytes(b"?")
    main(["data", "inspect", str(root), "--out", str(tmp_path / "sheets"), "--processes", "1"])
    assert f"contact sheet: {tmp_path / 'sheets' / 'train.png'}" in capsys.readouterr().out
    sheet = Image.open(tmp_path / "sheets" / "train.png")
    for number in range(13):
        left, top = 4 + number % COLUMNS * (TILE + 4), 4 + number // COLUMNS * (TILE + LINE + 4)
        tile = sheet.crop((left, top, left + TILE, top + TILE))
        expected = picture(number, (TILE, TILE)) if number != 9 else Image.new("RGB", (TILE, TILE), "white")
        assert tile.tobytes() == expected.tobytes()
        label = np.asarray(sheet.crop((left, top + TILE, left + TILE, top + TILE + LINE)).convert("L"))
        assert label.min() < 100  # something is written there


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_phases_add_up_to_the_whole(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "folder":
        make_folder(tmp_path, {"": 70}, (64, 48))
    else:
        make_shards(tmp_path, count=70)
    line = ["bench", "data", str(tmp_path), "--size", "32", "--patch", "8", "--workers", "0", "--seconds", "0.3",
            "data.val_share=0.1", "view.randaugment=rand-m5"]
    assert main(line) == 0
    said = capsys.readouterr().out
    phases = ["read", "decode", "crop and resize", "augment", "to tensor", "mask", "collate", "other"]
    spent = {phase: table(said, phase)[0] for phase in phases}
    assert sum(spent.values()) == pytest.approx(table(said, "all CPU time")[0], abs=0.005)
    assert min(spent.values()) > 0
    done = int(re.findall(r"63 images; (\d+) of them in one process", said)[0])  # type: ignore[arg-type]
    assert done % 63 == 0  # whole batches: the set is smaller than one of 64
    rate = float(re.findall(r"^ +0 +([\d.]+) ", said, re.MULTILINE)[0])
    assert f"a GPU that takes 1,000 images/s needs {1000 / rate:.1f} such workers" in said


def test_phases_are_milliseconds_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 images in a second of the wall clock, of which the processor worked half."""

    class Watch(Stopwatch):
        def take(self) -> dict[str, float]:
            return {"all": 0.5, "decode": 0.25, "mask": 0.05}

    monkeypatch.setattr(speed, "Stopwatch", Watch)
    monkeypatch.setattr(speed, "_timed", lambda images, seconds, begin: (20, 1.0))
    assert main(["bench", "data", str(make_folder(tmp_path, {"": 4})), "--size", "32", "--patch", "8", "--workers", "0"]) == 0
    said = capsys.readouterr().out
    wanted = {"decode": 12.5, "mask": 2.5, "other": 10.0, "all CPU time": 25.0, "waiting": 25.0}
    assert {name: table(said, name) for name in wanted} == {name: [value] for name, value in wanted.items()}
    assert "a GPU that takes 1,000 images/s needs 50.0 such workers" in said


def test_a_grid_that_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "data", str(tmp_path), "--size", "30", "--patch", "8"]) == 2
    assert "--size 30 is not a multiple of --patch 8" in capsys.readouterr().err


def test_what_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for what, said in ((str(tmp_path / "photos"), "neither a folder nor a recipe"), ("configs/mim/scene.yaml", "did you mean")):
        assert main(["data", "inspect", what]) == 2
        assert said in capsys.readouterr().err


def test_files_beside_shards_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The class list that `data pack` writes, and captions by key: the only file, or one a split."""
    for number, name in enumerate(("train-0.tar", "val-0.tar")):
        make_shards(tmp_path, name, count=6, first=10 * number, captions=False)

    def captions(name: str, first: int, each: int) -> None:
        lines = [json.dumps({"key": f"{first + number:05d}", "captions": ["a b"] * each}) for number in range(6)]
        (tmp_path / name).write_text("\n".join(lines))

    def said() -> str:
        assert main(["data", "inspect", str(tmp_path), "--processes", "1"]) == 0
        return "".join(capsys.readouterr())

    assert said().count("labels that no class list names: set data.classes to use them") == 2
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    captions("pairs_train.jsonl", 0, 5)
    captions("pairs_test.jsonl", 10, 2)
    (tmp_path / "other.jsonl").write_text('{"image": 1}\n')
    found = said()
    assert "set data.classes" not in found
    assert found.count("3 classes, 0 empty") == 2
    assert "captions     5 to 5 an image, 2.0 words each; 0.0% of the images have none" in found
    assert "captions     2 to 2 an image, 2.0 words each; 0.0% of the images have none" in found
    captions("more_train.jsonl", 0, 1)
    assert "captions in more_train.jsonl, pairs_test.jsonl, pairs_train.jsonl are not used; choose with data.captions" in said()


# ---- EXIF


def turned(path: Path, tag: int) -> Image.Image:
    """Writes a photograph as a phone stores it; returns its pixels as they are stored."""
    image = picture(3, (48, 32))
    exif = Image.Exif()
    exif[0x0112] = tag
    image.save(path, exif=exif, quality=95)
    return Image.open(path).convert("RGB")


def test_photographs_are_turned_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As stored by default, as timm and open_clip read them; with data.exif as Pillow's own function turns them."""
    stored = {tag: turned(tmp_path / f"{tag}.jpg", tag) for tag in range(1, 9)}
    (tmp_path / "plain.png").write_bytes(png(picture(0)))
    for exif in (False, True):
        settings = DataSettings.model_validate({"root": tmp_path, "exif": exif})
        source = open_folder(settings, "train")
        assert source is not None
        for place, tag in enumerate(range(1, 9)):
            expected = ImageOps.exif_transpose(Image.open(tmp_path / f"{tag}.jpg")).convert("RGB") if exif else stored[tag]
            image = source.read(place).image
            assert image.tobytes() == expected.tobytes()
            assert image.size == ((32, 48) if exif and tag > 4 else (48, 32))
        assert source.read(8).image.tobytes() == picture(0).tobytes()
    main(["data", "inspect", str(tmp_path), "--processes", "1"])
    assert "EXIF         77.8% are to be turned; they are read as stored, unless data.exif=true" in capsys.readouterr().out
    with pytest.raises(ValidationError, match=r"data\.exif=true is for 8-bit RGB photographs"):
        DataSettings.model_validate({"root": tmp_path, "exif": True, "channels": 1})
