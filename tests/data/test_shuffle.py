"""Shuffling shards pool by pool: exact epochs, few open files, reads in sequence; the same batches whoever reads them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eva_mim.core.contracts import Blocks
from eva_mim.core.settings import parse
from eva_mim.data import DataSettings
from eva_mim.data.loader import TrainLoader
from eva_mim.data.sampler import GlobalOrder, MixedOrder, MixedPart, permuted
from eva_mim.data.sources import shards as shards_module
from eva_mim.data.sources.shards import ShardSource, open_shards
from eva_mim.data.sources.tar_index import Shard
from eva_mim.data.splits import open_splits
from eva_mim.data.subset import Complement, Mixture, Subset
from tests.conftest import make_shards, picture, png, write_tar
from tests.data.test_faults import batches, images, seen
from tests.data.test_loader import assert_equal_steps
from tests.tiny import CLASSIFY, RUN, losses, run, write_recipe
from tools.shuffle_cost import cost


def blocks(*sizes: int, pooled: int) -> Blocks:
    return Blocks(np.cumsum(sizes), pooled)


def drawn(cut: Blocks, seed: int = 0) -> list[int]:
    return permuted(int(cut.ends[-1]), np.random.default_rng(seed), cut).tolist()


def block_of(index: int, cut: Blocks) -> int:
    """By counting."""
    return next(number for number, end in enumerate(cut.ends) if index < end)


def test_every_record_comes_once_and_every_block_in_one_pool() -> None:
    generator = np.random.default_rng(3)
    for seed in range(60):
        cut = blocks(*generator.integers(1, 9, generator.integers(1, 30)).tolist(), pooled=int(generator.integers(1, 8)))
        order = drawn(cut, seed)
        assert sorted(order) == list(range(int(cut.ends[-1])))
        owners, pools = [block_of(index, cut) for index in order], list[set[int]]()
        while owners:  # a pool is over when all records of all its blocks have come
            pool, left = set[int](), Counter[int]()
            while True:
                owner = owners.pop(0)
                if owner not in pool:
                    pool.add(owner)
                    left[owner] = sum(block_of(index, cut) == owner for index in order)
                left[owner] -= 1
                if not +left:
                    break
            pools.append(pool)
        assert sum(map(len, pools)) == len(cut.ends)
        assert max(map(len, pools)) <= cut.pooled


def test_all_orders_of_a_pool_are_as_likely() -> None:
    """Of 6 records in two blocks that are pooled: 720 orders; of four single ones, pooled by two: 4!/(2!2!) pools x 2 x 2."""
    counts = Counter(tuple(drawn(blocks(2, 1, pooled=2), seed)) for seed in range(6000))
    assert len(counts) == 6
    assert all(880 < count < 1120 for count in counts.values())  # 1000 expected, standard deviation 29
    counts = Counter(tuple(drawn(blocks(1, 1, 1, 1, pooled=2), seed)) for seed in range(12000))
    assert len(counts) == 24
    assert all(400 < count < 600 for count in counts.values())  # 500 expected, standard deviation 22


def test_the_last_pool_is_not_a_small_one() -> None:
    """65 blocks in pools of at most 64 are 33 and 32, not 64 and 1, which would be of one shard."""
    cut = blocks(*[10] * 65, pooled=64)
    order = drawn(cut)
    assert len({index // 10 for index in order[:330]}) == 33
    assert len({index // 10 for index in order[330:]}) == 32


def test_an_order_is_a_function_of_seed_and_epoch() -> None:
    cut = blocks(*[7] * 12, pooled=3)

    def epoch(number: int, seed: int = 1) -> list[int]:
        order = GlobalOrder(84, seed=seed, global_batch=12, micro_batch=12, blocks=cut)
        return [place.index for step in range(7 * number, 7 * number + 7) for place in order.global_step(step)]

    assert epoch(5) == epoch(5)
    assert len({tuple(epoch(number, seed)) for number in range(4) for seed in range(3)}) == 12
    assert sorted(epoch(3)) == list(range(84))


def test_a_mixture_shuffles_each_part_in_its_own_way() -> None:
    cut = blocks(*[5] * 8, pooled=2)
    order = MixedOrder([MixedPart(40, 1.0, cut), MixedPart(40, 1.0)], seed=1, global_batch=8, micro_batch=8)
    stream = [place for step in range(10) for place in order.global_step(step)]
    first, second = ([place.index - low for place in stream if low <= place.index < low + 40] for low in (0, 40))
    assert sorted(first) == sorted(second) == list(range(40))
    assert all(len({block_of(index, cut) for index in first[start : start + 10]}) == 2 for start in range(0, 40, 10))
    assert max(len({block_of(index, cut) for index in second[start : start + 10]}) for start in range(0, 40, 10)) > 3


# ---- blocks of shards, and of what is left of them


class Blocked:
    """A source that has nothing but blocks."""

    classes = None
    fingerprint = "blocked"

    def __init__(self, cut: Blocks):
        self.blocks: Blocks | None = cut

    def __len__(self) -> int:
        return int(self.blocks.ends[-1]) if self.blocks else 0

    def key(self, index: int) -> str:
        return str(index)

    read: Any = None


def test_a_selection_keeps_its_records_in_their_blocks() -> None:
    generator = np.random.default_rng(5)
    for _ in range(100):
        cut = blocks(*generator.integers(1, 6, 12).tolist(), pooled=3)
        total = int(cut.ends[-1])
        left_out = np.sort(generator.permutation(total)[: generator.integers(0, total)])
        count = int(generator.integers(1, total - len(left_out) + 1))
        for chosen in (Complement(count, left_out), np.setdiff1d(np.arange(total), left_out)[:count]):
            found = Subset(Blocked(cut), chosen).blocks
            owners = [block_of(int(chosen[place]), cut) for place in range(count)]
            expected = [place for place in range(1, count) if owners[place] != owners[place - 1]] + [count]
            assert found is not None
            assert (found.ends.tolist(), found.pooled) == (expected, 3)


def opened(root: Path, shuffle_gb: float) -> ShardSource:
    source = open_shards(DataSettings(source="shards", root=root, shuffle_gb=shuffle_gb), "train")
    assert source is not None
    return source


def test_blocks_lie_in_shards_and_pools_have_the_bytes_of_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "BLOCKS", 4)
    for number, count in enumerate((40, 3, 17)):
        write_tar(tmp_path / f"{number}.tar", [(f"{i:03d}.png", bytes(700)) for i in range(count)])  # 1536 bytes a record
    whole = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert opened(tmp_path, whole / 1e9).blocks is None
    cut = opened(tmp_path, 40e3 / 1e9).blocks  # 10 kB a block: 6.5 records
    assert cut is not None
    assert cut.pooled == 5  # less than 10 kB each, as they end with their shards
    assert 35e3 < cut.pooled * whole / len(cut.ends) < 45e3
    assert {40, 43, 60} <= set(cut.ends.tolist())
    sizes = np.diff(cut.ends, prepend=0)
    assert sizes.sum() == 60
    assert sizes.max() * 1536 <= 11_000


def test_many_small_shards_make_larger_pools_and_not_too_many_open_files() -> None:
    def pooled(shards: int, size: int) -> tuple[int, int]:
        cut = shards_module.cut_shards([size] * shards, [1000 * (shard + 1) for shard in range(shards)], 8e9)
        assert cut is not None
        return len(cut.ends), cut.pooled

    assert pooled(100, 10**9) == (800, 64)  # 8 blocks of 125 MB in each shard
    assert pooled(1000, 10**8) == (1000, 80)  # whole shards
    assert pooled(2000, 5 * 10**7) == (2000, 160)
    assert pooled(20_000, 10**6) == (20_000, 256)  # and not 8,000


def test_small_data_keep_their_order_of_before(tmp_path: Path) -> None:
    """One permutation, as every figure so far was made with."""
    make_shards(tmp_path, "a.tar", count=30)
    train, _ = open_splits(DataSettings(source="shards", root=tmp_path, val_share=0.2))
    assert train.blocks is None
    assert permuted(24, np.random.default_rng(7), train.blocks).tolist() == np.random.default_rng(7).permutation(24).tolist()


def test_a_mixture_keeps_the_blocks_of_its_parts(tmp_path: Path) -> None:
    make_shards(tmp_path / "a", "a.tar", count=20)
    make_shards(tmp_path / "b", "b.tar", count=12)
    size = (tmp_path / "a" / "a.tar").stat().st_size
    parts: list[dict[str, Any]] = [{"source": "shards", "root": tmp_path / "a", "shuffle_gb": 4 * size / 1e9, "val_share": 0.25},
             {"source": "shards", "root": tmp_path / "b"}]
    train, _ = open_splits(parse(DataSettings, {"mixture": parts}, "recipe"))
    assert isinstance(train, Mixture)
    assert train.parts[1] == MixedPart(12, 1.0, None)
    cut = train.parts[0].blocks
    assert cut is None  # a pool would hold all of it
    parts[0]["shuffle_gb"] = size / 1e9 / 2
    train, _ = open_splits(parse(DataSettings, {"mixture": parts}, "recipe"))
    assert isinstance(train, Mixture)
    cut = train.parts[0].blocks
    assert cut is not None
    assert cut.ends[-1] == 15
    order = MixedOrder(train.parts, seed=0, global_batch=12, micro_batch=12)
    places = {place.index for step in range(2) for place in order.global_step(step)}
    assert len(places) == 24  # 12 turns of each part, no image twice


# ---- real shards through the real loader


@pytest.fixture
def twelve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardSource:
    """12 shards of 6 records, of which 3 are pooled."""
    monkeypatch.setattr(shards_module, "BLOCKS", 3)
    monkeypatch.setattr(shards_module, "MAX_OPEN", 6)
    for number in range(12):
        make_shards(tmp_path, f"{number:02d}.tar", count=6, first=6 * number)
    size = max(path.stat().st_size for path in tmp_path.glob("*.tar"))
    source = opened(tmp_path, 3.001 * size / 1e9)
    assert source.blocks is not None
    assert source.blocks.ends.tolist() == list(range(6, 73, 6))
    return source


def loaded(source: ShardSource, workers: int = 0, **cut: int) -> TrainLoader:
    order = GlobalOrder(len(source), **{"seed": 3, "global_batch": 6, "micro_batch": 3} | cut, blocks=source.blocks)
    return TrainLoader(source, images(), order, workers)


def test_workers_and_a_later_start_change_nothing(twelve: ShardSource) -> None:
    expected = list(loaded(twelve).steps(0, 20))  # 12 steps an epoch
    for workers in (1, 3):
        assert assert_equal_steps(expected, loaded(twelve, workers).steps(0, 20)) == 40
    for first in (1, 5, 13):
        assert_equal_steps(expected[first:], loaded(twelve, 2).steps(first, 20))


@pytest.mark.parametrize(("world", "shards"), [(2, 12), (3, 1)])
def test_ranks_and_workers_read_every_record_once_also_from_fewer_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, shards: int
) -> None:
    """3 ranks with 2 readers each, and one shard: every reader has its part of it."""
    monkeypatch.setattr(shards_module, "BLOCKS", 2)
    for number in range(shards):
        make_shards(tmp_path, f"{number:02d}.tar", count=36 // shards, first=36 // shards * number)
    source = opened(tmp_path, 3e-6)
    assert source.blocks is not None
    found = Counter[int]()
    for rank in range(world):
        for (batch,) in loaded(source, 2, micro_batch=6 // world, rank=rank, world=world).steps(0, 6):
            found.update(batch.index.tolist())
    assert found == dict.fromkeys(range(36), 1)


def test_a_process_opens_a_shard_once_a_pool(twelve: ShardSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """And asks once for all of it, from its first picture to its last."""
    ahead, opens, advise, opener = list[tuple[int, int]](), list[str](), os.posix_fadvise, Shard.open

    def counted_open(shard: Shard) -> Any:
        opens.append(shard.name)
        return opener(shard)

    def counted_advise(file: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        ahead.append((start, length))
        advise(file, start, length, advice)

    monkeypatch.setattr(Shard, "open", counted_open)
    monkeypatch.setattr(os, "posix_fadvise", counted_advise)
    epoch = list(loaded(twelve).steps(0, 12))
    assert seen([batch for step in epoch for batch in step]) == set(range(72))
    assert Counter(opens) == {f"{number:02d}.tar": 1 for number in range(12)}
    assert len(ahead) == 12
    image = len(png(picture(5)))  # of the first shard: picture 5 ends it
    first, last = (int(twelve.index["image"][record]) * 512 for record in (0, 5))
    assert (first, last + image - first) in ahead
    assert len(twelve._open) <= 6


def test_damaged_and_empty_shards_have_no_blocks(tmp_path: Path) -> None:
    for number in range(4):
        make_shards(tmp_path, f"{number}.tar", count=6, first=6 * number)
    (tmp_path / "1.tar").write_bytes(bytes(10240))
    (tmp_path / "3.tar").write_bytes(b"damaged")
    settings = DataSettings(source="shards", root=tmp_path, shuffle_gb=1e-6, bad_shards="skip")
    source = open_shards(settings, "train")
    assert source is not None
    assert source.blocks is not None
    assert source.blocks.ends[-1] == 12
    assert (np.diff(source.blocks.ends, prepend=0) > 0).all()
    assert seen(batches(source, 0, 3)) == set(range(12))


# ---- what it costs


def test_pools_save_opens_and_seeks() -> None:
    """Of 1,600 shards of 500 records of 100 kB (80 GB); the figures of the tool."""
    pools, whole = cost(1600, 500, 100_000, 8e9, steps=64), cost(1600, 500, 100_000, float("inf"), steps=64)
    assert whole.opened > 600  # of 1,000: with 512 open of 1,600, two in three are not
    assert 740 < whole.shards < 770  # 1600 (1 - (1 - 1/1600)^1024) = 756
    assert pools.opened < 25
    assert pools.seeks < 25
    assert pools.sought < whole.sought / 40
    assert 155 < pools.shards <= 160


@pytest.mark.slow
def test_a_run_on_shards_of_all_kinds_is_the_same_on_two_processes(tmp_path: Path) -> None:
    """Plain, compressed, empty and damaged shards in small pools: from the command to its losses."""
    root = tmp_path / "data"
    for number in range(6):
        make_shards(root, f"{number}.tar{'.gz' if number % 2 else ''}", count=16, first=16 * number)
    write_tar(root / "6.tar", [])
    (root / "7.tar").write_bytes(b"damaged")
    (root / "classes.txt").write_text("a\nb\nc\n")
    data = {"source": "shards", "root": str(root), "classes": "classes.txt", "val_share": 0.25, "shuffle_gb": 1e-4,
            "bad_shards": "skip"}
    recipe = write_recipe(tmp_path, CLASSIFY | {"data": data | {"workers": 2}, "run": RUN | {"global_batch": 12, "epochs": 1}})
    alone = run("classify", recipe, tmp_path / "one")
    assert "data.bad_shards: 1 of 8 shards in" in alone.stderr
    assert "1 of 8 shards hold no records: 6.tar" in alone.stderr
    expected = losses(tmp_path / "one")
    assert len(expected) == 6
    run("classify", recipe, tmp_path / "two", "run.engine=deepspeed", "data.workers=1", processes=2)
    assert losses(tmp_path / "two") == pytest.approx(expected, abs=1e-5)  # sums over ranks are rounded in another order
    refused = run("classify", recipe, tmp_path / "three", "data.bad_shards=refuse", "run.engine=deepspeed", processes=2, code=2)
    assert "7.tar: not a readable tar: " in refused.stderr
    assert "1 of 8 shards cannot be used; mend or remove them, or set data.bad_shards=skip" in refused.stderr
