"""Batches do not depend on workers, ranks, accumulation or interruptions, and broken records are replaced by name."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from eva_mim.core.batches import B, Batch, MaskedBatch
from eva_mim.core.contracts import Source
from eva_mim.core.errors import UserError
from eva_mim.data import DataSettings
from eva_mim.data.loader import EvalLoader, TrainLoader
from eva_mim.data.masking import BlockMask
from eva_mim.data.preparation import ImageTextPreparation, MaskedPreparation, Preparation
from eva_mim.data.sampler import GlobalOrder, Place
from eva_mim.data.source_settings import SceneSettings
from eva_mim.data.sources.folder import open_folder
from eva_mim.data.sources.scenes import SceneSource
from eva_mim.data.view_settings import MaskSettings, ViewSettings
from eva_mim.data.views import EvalView, TrainView
from tests.conftest import make_folder
from tests.ranks import Launched, script

SIZES = [16, 24]


def tokenize(texts: list[str]) -> torch.Tensor:
    """[B, 60] code points, padded with zeros."""
    return torch.tensor([[ord(letter) for letter in text.ljust(60, "\0")[:60]] for text in texts])


def preparation(seed: int = 7, training: bool = True, **view: object) -> MaskedPreparation:
    """Views of two sizes and 4 x 4 masks."""
    views = TrainView(ViewSettings(**view), SIZES) if training else EvalView(SIZES)  # type: ignore[arg-type]
    return MaskedPreparation(views, seed, BlockMask((4, 4), MaskSettings()), training=training)


def pairs(seed: int = 7) -> ImageTextPreparation:
    """Training views with captions."""
    return ImageTextPreparation(TrainView(ViewSettings(), [16]), seed, tokenize, ("a {}.", "one {} here", "the {}"))


def scenes(count: int = 26) -> SceneSource:
    return SceneSource(SceneSettings(size=16, train=count, val=count), "train")


def folder(root: Path) -> Source:
    source = open_folder(DataSettings(source="folder", root=root), "train")
    assert source is not None
    return source


def loader(source: Source, made: Preparation[B], workers: int = 0, batch: int = 8, micro: int = 4) -> TrainLoader[B]:
    return TrainLoader(source, made, GlobalOrder(len(source), seed=3, global_batch=batch, micro_batch=micro), workers)


def equal(one: Batch, other: Batch) -> bool:
    """Every field is the same, bit for bit."""

    def same(a: object, b: object) -> bool:
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b

    return type(one) is type(other) and all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))


def assert_equal_steps(one: Iterable[list[Batch]], other: Iterable[list[Batch]]) -> int:
    """The same steps, micro-batch by micro-batch; returns how many micro-batches."""
    count = 0
    for step, again in zip(one, other, strict=True):
        assert len(step) == len(again)
        assert all(equal(a, b) for a, b in zip(step, again, strict=True))
        count += len(step)
    return count


# ---- order


def test_every_epoch_is_another_permutation() -> None:
    order = GlobalOrder(24, seed=1, global_batch=6, micro_batch=3)
    epochs = [[place for step in range(4 * e, 4 * e + 4) for place in order.global_step(step)] for e in range(3)]
    for epoch, places in enumerate(epochs):
        assert {place.epoch for place in places} == {epoch}
        assert sorted(place.index for place in places) == list(range(24))
    orders = {tuple(place.index for place in places) for places in epochs}
    assert len(orders) == 3
    assert tuple(range(24)) not in orders
    other = GlobalOrder(24, seed=2, global_batch=6, micro_batch=3)
    assert other.global_step(0) != order.global_step(0)


def test_an_incomplete_last_batch_is_left_out() -> None:
    order = GlobalOrder(26, seed=1, global_batch=8, micro_batch=8)
    assert order.steps_per_epoch == 3
    seen = [place.index for step in range(3) for place in order.global_step(step)]
    assert len(set(seen)) == 24
    assert {place.epoch for place in order.global_step(3)} == {1}


@pytest.mark.parametrize(("world", "micro"), [(1, 12), (1, 3), (2, 6), (2, 2), (3, 4), (3, 1)])
def test_ranks_and_accumulation_cut_the_same_global_step(world: int, micro: int) -> None:
    reference = GlobalOrder(40, seed=5, global_batch=12, micro_batch=12)
    rebuilt: list[list[Place | None]] = [[None] * 12 for _ in range(5)]
    for rank in range(world):
        order = GlobalOrder(40, seed=5, global_batch=12, micro_batch=micro, rank=rank, world=world)
        cut = list(order.micro_steps(0, 5))
        assert len(cut) == 5 * order.micro_batches
        for number, places in enumerate(cut):
            step, part = divmod(number, order.micro_batches)
            start = (part * world + rank) * micro
            assert rebuilt[step][start : start + micro] == [None] * micro  # nobody else has these rows
            rebuilt[step][start : start + micro] = places
    assert rebuilt == [reference.global_step(step) for step in range(5)]


def test_batches_that_do_not_divide_or_fit_are_refused() -> None:
    with pytest.raises(UserError, match="not a multiple"):
        GlobalOrder(100, seed=0, global_batch=12, micro_batch=5)
    with pytest.raises(UserError, match="not a multiple"):
        GlobalOrder(100, seed=0, global_batch=12, micro_batch=6, world=4)
    with pytest.raises(UserError, match="more than the 10 training images"):
        GlobalOrder(10, seed=0, global_batch=12, micro_batch=12)


# ---- training batches


def test_workers_change_nothing() -> None:
    made = preparation(randaugment="rand-m5-mstd0.5")
    expected = list(loader(scenes(), made).steps(0, 5))  # 3 steps an epoch: over an epoch's end
    for workers in (1, 2):
        assert assert_equal_steps(expected, loader(scenes(), made, workers).steps(0, 5)) == 10


def test_a_later_start_gives_the_later_batches() -> None:
    expected = list(loader(scenes(), preparation()).steps(0, 7))
    for first in (1, 4):
        assert_equal_steps(expected[first:], loader(scenes(), preparation(), workers=1).steps(first, 7))


def test_ranks_see_the_rows_that_one_process_sees() -> None:
    source, made = scenes(), preparation()
    alone = [step[0] for step in loader(source, made, batch=8, micro=8).steps(0, 2)]
    for rank in range(2):
        order = GlobalOrder(len(source), seed=3, global_batch=8, micro_batch=2, rank=rank, world=2)
        for whole, cut in zip(alone, TrainLoader(source, made, order, 0).steps(0, 2), strict=True):
            for part, batch in enumerate(cut):
                rows = slice((part * 2 + rank) * 2, (part * 2 + rank) * 2 + 2)
                assert torch.equal(batch.index, whole.index[rows])
                assert torch.equal(batch.views[16], whole.views[16][rows])
                assert batch.masked is not None
                assert whole.masked is not None
                assert torch.equal(batch.masked, whole.masked[rows])


def test_a_batch_holds_what_its_indices_say() -> None:
    """Labels and texts belong to the pictures, masks to their flat indices."""
    source = scenes()
    for step in loader(source, pairs()).steps(0, 3):
        for told in step:
            assert told.labels is not None
            samples = [source.read(int(index)) for index in told.index]
            assert told.labels.tolist() == [sample.label for sample in samples]
            assert torch.equal(told.texts, tokenize([sample.captions[0] for sample in samples]))
    for step in loader(source, preparation()).steps(0, 3):
        for batch in step:
            assert batch.labels is not None
            assert batch.labels.tolist() == [source.read(int(index)).label for index in batch.index]
            assert batch.masked is not None
            assert batch.target_index is not None
            flat = [i * 16 + j for i in range(4) for j in range(16) if batch.masked[i, j]]
            assert batch.target_index.tolist() == flat


def test_views_and_masks_change_from_epoch_to_epoch_and_with_the_seed() -> None:
    def drawn(seed: int) -> dict[int, list[tuple[bytes, bytes]]]:
        """Index -> (pixels, mask) in each epoch."""
        rows: dict[int, list[tuple[bytes, bytes]]] = {}
        for (batch,) in loader(scenes(8), preparation(seed), batch=8, micro=8).steps(0, 2):
            assert batch.masked is not None
            for index, image, mask in zip(batch.index.tolist(), batch.views[16], batch.masked, strict=True):
                rows.setdefault(index, []).append((image.numpy().tobytes(), mask.numpy().tobytes()))
        return rows

    one, other = drawn(1), drawn(2)
    assert sorted(one) == list(range(8))
    for index, (first, second) in one.items():
        assert first[0] != second[0]
        assert first[0] != other[index][0][0]
    assert len({mask for rows in one.values() for _, mask in rows}) > 8


def test_classes_give_captions_where_there_are_none(tmp_path: Path) -> None:
    source = folder(make_folder(tmp_path, {"ant": 4, "bee": 4}))
    possible = {tokenize([text.replace("{}", name)])[0].numpy().tobytes(): name
                for name in ("ant", "bee") for text in ("a {}.", "one {} here", "the {}")}
    seen = set()
    for (batch,) in loader(source, pairs(), micro=8).steps(0, 4):
        assert batch.labels is not None
        for text, label in zip(batch.texts, batch.labels, strict=True):
            assert possible[text.numpy().tobytes()] == ("ant", "bee")[int(label)]
            seen.add(text.numpy().tobytes())
    assert len(seen) == 6


def test_a_picture_without_caption_and_class_cannot_train_clip(tmp_path: Path) -> None:
    steps = loader(folder(make_folder(tmp_path, {"": 8})), pairs()).steps(0, 1)
    with pytest.raises(UserError, match=r"20 broken records in a row; .*0000\d\.png: ValueError: no caption .* no class name"):
        next(steps)


# ---- broken records


def break_files(root: Path, *numbers: int) -> None:
    for number in numbers:
        (root / "a" / f"{number:05d}.png").write_bytes(b"broken")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_replaced_and_named_and_changes_no_other(tmp_path: Path, workers: int) -> None:
    source = folder(make_folder(tmp_path, {"a": 16, "b": 8}))
    whole = [batch for step in loader(source, preparation()).steps(0, 6) for batch in step]
    break_files(tmp_path, 3, 11)
    mended = [batch for step in loader(source, preparation(), workers).steps(0, 6) for batch in step]
    replaced = []
    for before, after in zip(whole, mended, strict=True):
        broken_rows = [row for row, index in enumerate(before.index.tolist()) if index in (3, 11)]
        named = {fault.partition(": cannot")[0] for fault in after.broken}
        assert named >= {f"a/{before.index[row]:05d}.png: UnidentifiedImageError" for row in broken_rows}
        assert bool(named) == bool(broken_rows)
        for row, (old, new) in enumerate(zip(before.index.tolist(), after.index.tolist(), strict=True)):
            if row in broken_rows:
                assert new not in (3, 11)
                assert after.labels is not None
                assert after.labels[row] == source.read(new).label
                replaced.append(new)
                continue
            assert new == old
            for size in SIZES:
                assert torch.equal(before.views[size][row], after.views[size][row]), (size, row)
            for field in ("masked", "labels"):
                assert torch.equal(getattr(before, field)[row], getattr(after, field)[row]), (field, row)
    assert len(replaced) == 4  # two epochs of two
    assert len(set(replaced)) > 1


STOPPED = r"20 broken records in a row; the last: a/0000\d\.png: UnidentifiedImageError"


def test_a_wholly_broken_dataset_stops_with_the_last_reason(tmp_path: Path) -> None:
    source = folder(make_folder(tmp_path, {"a": 8}))
    break_files(tmp_path, *range(8))
    with pytest.raises(UserError, match=f"^{STOPPED}"):
        next(loader(source, preparation()).steps(0, 1))


def test_a_process_ends_with_the_reason_that_a_worker_gave(tmp_path: Path) -> None:
    """In a process of its own: a worker that outlives its error would keep this one from ending."""
    make_folder(tmp_path, {"a": 8})
    break_files(tmp_path, *range(8))
    code = (
        "from pathlib import Path\n"
        "from tests.data.test_loader import folder, loader, preparation\n"
        "from eva_mim.core.errors import UserError\n"
        "try:\n"
        f"    next(loader(folder(Path({str(tmp_path)!r})), preparation(), 1).steps(0, 1))\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = Launched(script, code, log=tmp_path / "said")
    try:
        assert done.wait(200) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(done.pid, signal.SIGKILL)
    said = (tmp_path / "said").read_text()
    assert re.search(f"^{STOPPED}", said, re.MULTILINE), said


# ---- held-out batches


def held_out(source: Source, limit: int | None = None, workers: int = 0, batch: int = 4) -> list[MaskedBatch]:
    return list(EvalLoader(source, preparation(training=False), batch, workers, limit))


def indices(batches: list[MaskedBatch]) -> list[int]:
    return [int(index) for batch in batches for index in batch.index]


@pytest.mark.parametrize("count", [2, 9, 12])
def test_two_ranks_cover_every_held_out_sample_once(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    alone = held_out(scenes(count))
    assert indices(alone) == list(range(count))
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(held_out(scenes(count)))
    assert sorted(indices(parts[0]) + indices(parts[1])) == list(range(count))
    by_index = {int(i): image for batch in alone for i, image in zip(batch.index, batch.views[16], strict=True)}
    for batch in parts[0] + parts[1]:
        for index, image in zip(batch.index, batch.views[16], strict=True):
            assert torch.equal(image, by_index[int(index)])


def test_held_out_views_and_masks_are_the_same_every_time() -> None:
    first = held_out(scenes(10))
    for workers in (0, 1):
        again = held_out(scenes(10), workers=workers)
        assert all(equal(one, other) for one, other in zip(first, again, strict=True))
    masks = torch.cat([batch.masked for batch in first if batch.masked is not None])
    assert len(masks.unique(dim=0)) > 5


def test_broken_held_out_records_are_left_out_and_named(tmp_path: Path) -> None:
    source = folder(make_folder(tmp_path, {"a": 10}))
    break_files(tmp_path, 2, 4, 6)
    batches = held_out(source)
    assert indices(batches) == [0, 1, 3, 5, 7, 8, 9]
    named = [fault.split(":")[0] for batch in batches for fault in batch.broken]
    assert named == [f"a/{number:05d}.png" for number in (2, 4, 6)]
    break_files(tmp_path, 5, 7)  # now the second batch of four is wholly broken
    assert indices(held_out(source)) == [0, 1, 3, 8, 9]


def test_a_limit_spreads_over_the_data() -> None:
    for count, limit in ((26, 5), (26, 26), (26, 100), (9, 8), (10, 1)):
        expected = sorted({round(float(x)) for x in np.linspace(0, count - 1, min(count, limit))})
        assert indices(held_out(scenes(count), limit)) == expected
        assert len(expected) == min(count, limit)
