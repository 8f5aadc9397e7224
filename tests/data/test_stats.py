"""`eva-mim data stats` against numpy on the files themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from PIL import Image

from eva_mim.commands.data import main
from eva_mim.commands.data.stats import Seen, look, proposed, sample_of, stats
from eva_mim.core.errors import UserError
from eva_mim.data.sources.folder import FolderSource
from tests.conftest import make_folder, picture

Array = npt.NDArray[Any]


def by_hand(arrays: list[Array], low: float, high: float) -> tuple[Array, Array, Array]:
    """Mean, standard deviation and standard error of the mean, by channel; each image counts the same."""
    scaled = [np.clip((array.astype(np.float64) - low) / (high - low), 0, 1) for array in arrays]
    means = np.array([one.mean(axis=(0, 1)) for one in scaled])
    squares = np.array([(one**2).mean(axis=(0, 1)) for one in scaled])
    return means.mean(0), np.sqrt(squares.mean(0) - means.mean(0) ** 2), means.std(0, ddof=1) / len(arrays) ** 0.5


def printed(text: str) -> tuple[dict[str, Any], list[list[float]]]:
    """The settings, and the rows of the table."""
    table, _, settings = text.partition("\n\n")
    rows = table.partition("std\n")[2].splitlines()
    return yaml.safe_load(settings), [[float(number) for number in row.split()[1:]] for row in rows]


@pytest.mark.slow
def test_photographs_of_any_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RGB of 8 bits: no window. A broken file is left out and named."""
    make_folder(tmp_path / "a", {"": 6}, size=(40, 32))
    make_folder(tmp_path / "b", {"": 5}, size=(13, 70))
    (tmp_path / "a" / "broken.png").write_bytes(b"nothing")
    arrays = [np.asarray(Image.open(path)) for path in tmp_path.rglob("*.png") if path.name != "broken.png"]
    others = make_folder(tmp_path.with_name(f"{tmp_path.name}-held-out"), {"": 2})
    held_out = ["data.val_share=0", f"data.held_out={{root: {others}}}"]
    assert main(["stats", str(tmp_path), *held_out, "--processes", "2"]) == 0
    text = capsys.readouterr().out
    settings, rows = printed(text)
    mean, std, error = by_hand(arrays, 0, 255)
    assert settings == {"student": {"mean": pytest.approx(mean, abs=5e-5), "std": pytest.approx(std, abs=5e-5)}}
    assert np.abs(np.array(rows) - np.stack([mean, error, std], 1)).max() < 6e-5
    assert text.startswith("11 training images of 3 channels")
    assert "1 more could not be read; the first: a/broken.png: ValueError: Pillow cannot read it" in text


@pytest.mark.slow
def test_a_window_is_proposed_and_the_figures_are_those_behind_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """5 channels of 16 bits in two parts, of which one comes three times as often. The lines are what a recipe takes."""
    rng, arrays = np.random.default_rng(0), []
    for part, (count, shift) in enumerate([(9, 0), (3, 4000)]):
        (tmp_path / str(part)).mkdir()
        for number in range(count):
            array = (rng.gamma(3, 300, (20 + number, 24, 5)) + shift + 100 * np.arange(5)).astype(np.uint16)
            np.save(tmp_path / str(part) / f"{number}.npy", array)
            arrays.append(array)
    (tmp_path / "held_out").mkdir()
    np.save(tmp_path / "held_out" / "0.npy", arrays[0])
    parts = [{"root": str(tmp_path / str(part)), "channels": 5, "weight": weight} for part, weight in ((0, 3), (1, 1))]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"mixture": [parts[0] | {"val_share": 0.0}, parts[1]], "held_out": {
        "root": str(tmp_path / "held_out"), "channels": 5}}}))
    stats(str(recipe), [], images=100, processes=1)
    settings, rows = printed(capsys.readouterr().out)
    low, high = np.percentile(np.concatenate([array.ravel() for array in arrays]), (0.1, 99.9))
    assert settings["data"] == {"channels": 5, "window": [pytest.approx(low, abs=5), pytest.approx(high, abs=5)]}
    mean, std, error = by_hand(arrays, *settings["data"]["window"])
    assert np.abs(np.array(rows) - np.stack([mean, error, std], 1)).max() < 6e-5
    assert settings["student"] == {"mean": pytest.approx(mean, abs=5e-5), "std": pytest.approx(std, abs=5e-5)}


@pytest.mark.slow
def test_a_window_that_is_given_stays_and_what_it_cuts_off_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ramp = np.arange(1000, dtype=np.uint16).reshape(25, 40)
    for number in range(3):
        Image.fromarray(ramp).save(tmp_path / f"{number}.png")
    stats(str(tmp_path), ["data.channels=1", "data.window=[99, 950]"], images=2, processes=1)
    text = capsys.readouterr().out
    assert text.startswith("2 training images of 1 channels")
    assert "of the values, 10.00% are black at the lower end of the window, 5.00% white at the upper" in text
    settings, _ = printed(text)
    mean, std, _ = by_hand([ramp[:, :, None]] * 2, 99, 950)
    assert settings["data"] == {"channels": 1, "window": [99, 950]}
    assert settings["student"] == {"mean": pytest.approx(mean, abs=5e-5), "std": pytest.approx(std, abs=5e-5)}


@pytest.mark.slow
def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / f"{number}.png")
    assert main(["stats", str(tmp_path), "data.channels=5"]) == 2
    assert "none of 2 training images can be read; the first: " in (said := capsys.readouterr().err)
    assert "a PNG of mode L does not give data.channels=5" in said
    assert main(["stats", str(tmp_path), "data.channels=1"]) == 2
    assert "all values of channel 0 are the same" in capsys.readouterr().err


def test_a_few_values_of_a_large_image_stand_for_all(tmp_path: Path) -> None:
    picture(0, (300, 200)).save(tmp_path / "0.png")
    seen = look(FolderSource(tmp_path, None), 0, 1000)
    assert isinstance(seen, Seen)
    assert len(seen.values) == 1000
    every = np.asarray(Image.open(tmp_path / "0.png")).astype(np.float64)
    assert abs(seen.values.mean() - every.mean()) < 5 * every.std() / 1000**0.5
    assert seen.mean == pytest.approx(every.mean(axis=(0, 1)))


def test_proposed_windows() -> None:
    assert proposed(np.arange(1001, dtype=np.float32)) == (1, 999)
    assert proposed(np.arange(1001, dtype=np.float32) / 8) == (pytest.approx(0.125), pytest.approx(124.875))
    with pytest.raises(UserError, match="nearly all values are 7"):
        proposed(np.full(50, 7, np.float32))


def test_the_sample_is_without_replacement(tmp_path: Path) -> None:
    source = FolderSource(make_folder(tmp_path, {"": 20}), None)
    sample = sample_of(source, 12)
    keys = [sample.key(place) for place in range(len(sample))]
    assert (len(keys), len(set(keys)), keys) == (12, 12, sorted(keys))
