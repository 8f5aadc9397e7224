"""Stored features: made once, by whoever comes first, on the disk before their index, and read without copies."""

from __future__ import annotations

import os
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eva_mim.core.contracts import Features
from eva_mim.core.errors import UserError
from eva_mim.core.lock import locked
from eva_mim.core.settings import parse
from eva_mim.data import DataSettings
from eva_mim.data.preparation import MaskedPreparation
from eva_mim.data.splits import open_splits
from eva_mim.data.store import files
from eva_mim.data.store.files import FeatureStore, NetworkFacts, SplitFacts, StoreFacts
from eva_mim.data.store.rows import Rows, Stacked
from eva_mim.data.store.write import Pair, store_of, write
from eva_mim.data.views import EvalView
from tests.conftest import make_folder

HOW: dict[str, Any] = {"batch": 2, "workers": 0, "device": torch.device("cpu"), "autocast": nullcontext}


class Colours:
    """A network whose summary is an image's mean colour."""

    image_size = 8

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, images: Tensor) -> Features:
        self.asked += len(images)
        summary = images.float().mean((2, 3))
        return Features(summary, summary.new_empty(len(summary), 0, 0), (0, 0))


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[StoreFacts, dict[str, Pair], list[Tensor]]:
    """Facts of a store of nine images in files of four rows, of which the image 4 is broken; the others' mean colours."""
    monkeypatch.setattr(files, "SUMMARIES", 4)
    make_folder(tmp_path / "images" / "val", {"a": 1, "b": 1}, (8, 8))
    root = make_folder(tmp_path / "images" / "train", {"a": 5, "b": 4}, (8, 8))
    (root / "a" / "00004.png").write_bytes(b"no image")
    source = open_splits(parse(DataSettings, {"root": str(root.parent), "train": "train", "val": "val"}, "data")).train
    view = EvalView([8], 1.0)
    colours = [view(source.read(index).image, None)[8].float().mean((1, 2)) for index in range(9) if index != 4]  # type: ignore[arg-type]
    facts = StoreFacts(networks={"n": NetworkFacts(patches=0, width=0, summary=3, network={"sha256": "a"})}, inputs={},
                       splits={"train": SplitFacts(images=9)}, labels=True)
    return facts, {"train": Pair(source, MaskedPreparation(view, 0, training=False))}, colours


def test_features_are_made_once_and_lie_in_the_sources_order(
    tmp_path: Path, parts: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, pairs, colours = parts
    network = Colours()
    rows = Rows.of(store_of(tmp_path / "s", facts, pairs, {"n": network}, **HOW), "train", "n")
    assert network.asked == 8
    assert capsys.readouterr().err.count("broken image left out: a/00004.png") == 1
    assert rows.places.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert rows.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    torch.testing.assert_close(rows.features[:], torch.stack(colours), atol=1e-3, rtol=0)
    order = torch.tensor([7, 0, 3, 3, 4])
    assert torch.equal(rows.features[order], rows.features[:][order])
    assert torch.equal(rows.features.share(1, 3)[:], rows.features[:][1::3])
    rows.features._parts[0].zero_()  # reaches no file
    again = Rows.of(store_of(tmp_path / "s", facts, pairs, {"n": network}, **HOW), "train", "n")
    assert network.asked == 8
    torch.testing.assert_close(again.features[:], torch.stack(colours), atol=1e-3, rtol=0)


def test_rows_of_parts_are_those_of_the_whole() -> None:
    whole, chosen = torch.randn(23, 3), torch.tensor([0, 5, 6, 7, 13, 14, 22])
    stacked = Stacked(whole.split(7), chosen)
    assert torch.equal(stacked[:], whole[chosen])
    assert torch.equal(stacked[torch.tensor([6, 0, 0, 4])], whole[chosen[[6, 0, 0, 4]]])


def test_what_a_killed_process_left_is_kept(tmp_path: Path, parts: Any) -> None:
    """Whole files; the rest is made by the next one."""
    facts, pairs, colours = parts

    class Killed(Colours):
        def __call__(self, images: Tensor) -> Features:
            if self.asked >= 4:
                raise KeyboardInterrupt
            return super().__call__(images)

    with pytest.raises(KeyboardInterrupt):
        store_of(tmp_path / "s", facts, pairs, {"n": Killed()}, **HOW)
    with pytest.raises(UserError, match="is not finished"):
        FeatureStore(tmp_path / "s")
    network = Colours()
    rows = Rows.of(store_of(tmp_path / "s", facts, pairs, {"n": network}, **HOW), "train", "n")
    assert network.asked == 4  # images 5 to 8
    torch.testing.assert_close(rows.features[:], torch.stack(colours), atol=1e-3, rtol=0)


def test_a_second_process_waits_for_the_first(tmp_path: Path, parts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    facts, pairs, _ = parts
    second = Colours()
    waiting = threading.Thread(target=lambda: store_of(tmp_path / "s", facts, pairs, {"n": second}, wait=True, **HOW))
    with locked(tmp_path / "s"):
        waiting.start()
        while "is being made by process" not in capsys.readouterr().err:
            time.sleep(0.05)
        (tmp_path / "s" / "store.json").write_text(facts.model_dump_json())
        write(tmp_path / "s", facts, pairs, {"n": Colours()}, **HOW)
        assert waiting.is_alive()
    waiting.join()
    assert second.asked == 0


def test_another_machine_that_does_not_see_the_folder(tmp_path: Path, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, pairs, _ = parts
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="which rank 0 made, is not seen by rank 1: choose a folder that all machines share"):
        write(tmp_path / "s", facts, pairs, {"n": Colours()}, **HOW)
    assert not (tmp_path / "s").exists()


def test_images_that_none_can_read(tmp_path: Path, parts: Any) -> None:
    facts, pairs, _ = parts
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of 9 images can be used"):
        store_of(tmp_path / "s", facts, pairs, {"n": Colours()}, **HOW)


def test_features_are_on_the_disk_before_their_index(tmp_path: Path, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file, and their folder: a power cut leaves no store with holes that a later run would believe."""
    facts, pairs, _ = parts
    done: list[str] = []
    fsync = os.fsync

    def noting(number: int) -> None:
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{number}"), tmp_path / "s"))
        fsync(number)

    monkeypatch.setattr(os, "fsync", noting)
    store_of(tmp_path / "s", facts, pairs, {"n": Colours()}, **HOW)
    folder = "train/view-0000"
    made = [f"{folder}/.{number:06d}.safetensors.tmp" for number in range(3)]
    assert done.index(".index.json.tmp") > max(done.index(name) for name in [*made, folder, "."])
