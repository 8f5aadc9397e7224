"""`eva-mim data merge`: classes by name, and what may not be trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eva_mim.cli import main
from eva_mim.commands.data.index import every_split, read_data
from tests.conftest import picture, png


def files(root: Path, *names: str) -> Path:
    """Pictures by path; the number behind # says which one, and so what is the same file."""
    for name in names:
        path, _, number = name.partition("#")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(png(picture(int(number or 0))))
    return root


def test_sets_are_joined_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = files(tmp_path / "k400", "train/riding_a_bike/AAAAAAAAAAA_000010_000020.png#1", "train/riding_a_bike/b.png#2",
                "train/juggling/c.png#3", "val/riding_a_bike/v.png#4", "val/juggling/w.png#5")
    two = files(tmp_path / "k700", "train/Riding a bike/d.png#6", "train/Riding a bike/v.png#7",  # v is held out by its name
                "train/yoga/e.png#5",  # w is held out by its content
                "train/yoga/c.png#8",  # the name of a training file of the first
                "train/yoga/f.png#9", "val/yoga/AAAAAAAAAAA_000055_000065.png#10", "val/Riding a bike/x.png#11")
    out = tmp_path / "merged"
    assert main(["data", "merge", str(one), str(two), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    texts = {split: (out / f"{split}.jsonl").read_text() for split in ("train", "val")}
    lines = {split: [json.loads(line) for line in text.splitlines()] for split, text in texts.items()}
    assert [(Path(line["image"]).stem, line["label"]) for line in lines["train"]] == [
        ("c", "juggling"), ("b", "riding_a_bike"), ("d", "riding_a_bike"), ("f", "yoga")]
    assert len(lines["val"]) == 4
    assert (out / "classes.txt").read_text() == "juggling\nriding_a_bike\nyoga\n"
    rows = [line.split()[-6:] for line in said.splitlines()[1:3]]
    assert rows == [["2", "3", "2", "1", "0", "0"], ["2", "5", "2", "1", "1", "1"]]
    settings = said.split("train on them: ")[1].split()
    root = next(word.partition("=")[2] for word in settings if word.startswith("data.root"))
    sources = dict(every_split(read_data(root, settings)))
    assert sources["train"].classes == ("juggling", "riding_a_bike", "yoga")
    assert [sources["train"].read(index).label for index in range(4)] == [0, 1, 1, 2]
    assert len(sources["val"]) == 4
    assert main(["data", "merge", str(one), str(two), "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_what_cannot_be_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = files(tmp_path / "a", "train/x/1.png", "train/y/2.png", "val/x/3.png")
    flat = files(tmp_path / "flat", "1.png", "2.png")
    for words, text in (([str(one)], "joins two or more"), ([str(one), str(flat)], "joins files in class folders"),
                        ([str(one), str(tmp_path / "none")], "neither a folder nor a recipe")):
        assert main(["data", "merge", *words, "--out", str(tmp_path / "out")]) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
