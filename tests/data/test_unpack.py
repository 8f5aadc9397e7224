"""Compressed shards in the cache: their limit, who makes room, what a kill leaves."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eva_mim.core.errors import UserError
from eva_mim.data.sources.shards import ShardSource
from eva_mim.data.sources.tar_index import found
from eva_mim.data.sources.unpack import copy_of, hold, limit, make_room, unpack, unpacked_size
from tests.conftest import REPOSITORY, picture, png, write_tar

SIZE = 102_400
"""Of a shard here, unpacked: ten times 10240, the block that tarfile fills up."""


def shard(root: Path, name: str, seed: int = 0) -> Path:
    """Unpacks to `SIZE` bytes."""
    image = png(picture(seed))
    path = write_tar(root / f"{name}.tar.gz", [("a.png", image), ("pad.bin", os.urandom(SIZE - 10240 - len(image)))])
    assert len(gzip.decompress(path.read_bytes())) == SIZE
    return path


def allow(monkeypatch: pytest.MonkeyPatch, shards: float) -> None:
    monkeypatch.setenv("EVA_MIM_UNPACKED_GB", f"{SIZE * shards / 1e9:.9f}")


def copies(cache: Path) -> int:
    return len(list(cache.glob("*.tar")))


def open_shards(*paths: Path) -> ShardSource:
    source = ShardSource(paths, None)
    assert len(source) == 2 * len(paths)
    return source


def test_the_size_is_known_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    for content in (b"", b"a", bytes(1000), os.urandom(2000) + bytes(10**6)):
        path.write_bytes(gzip.compress(content))
        assert unpacked_size(found(path)) == max(len(content), path.stat().st_size)
    for told, packed, expected in (
        (5, 2**31, 2**32 + 5), (2**31, 2**31, 2**31), (0, 2**33, 2**33), (7, 9 * 2**30, 3 * 2**32 + 7),
        (2**32 - 1, 20, 20 * 100 + 2**20), (3, 1000, 1000),  # lies, and the last of several members
    ):
        path.unlink()
        with path.open("wb") as file:  # holes, and the last four bytes
            file.seek(packed - 4)
            file.write(told.to_bytes(4, "little"))
        assert unpacked_size(found(path)) == expected


def test_what_never_fits_is_refused_before_anything_is_unpacked(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, 2.5)
    paths = [shard(tmp_path, name) for name in "abc"]
    with pytest.raises(UserError, match=r"3 compressed shards take about 0\.000307 GB unpacked, more than the 0\.000256 GB of "
                                        r"EVA_MIM_UNPACKED_GB; set it higher, or unpack them yourself"):
        ShardSource(paths, None)
    assert copies(cache) == 0
    allow(monkeypatch, 3)
    open_shards(*paths)
    assert copies(cache) == 3


def test_a_disk_without_room_is_named(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path, "a")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"need about 0\.000102 GB more in .*, where 1e-06 GB are free; set EVA_MIM_CACHE"):
        ShardSource([path], None)
    assert copies(cache) == 0


def test_copies_used_longest_ago_make_room(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, 3)
    paths = {name: shard(tmp_path, name, number) for number, name in enumerate("abcd")}
    for name in "abc":
        open_shards(paths[name])  # and no longer used
        time.sleep(0.01)
    open_shards(paths["a"])
    open_shards(paths["d"])
    assert {name for name, path in paths.items() if copy_of(found(path)).exists()} == {"a", "c", "d"}
    again = open_shards(paths["b"])
    assert again.read(0).image.tobytes() == picture(1).tobytes()
    assert {name for name, path in paths.items() if copy_of(found(path)).exists()} == {"a", "d", "b"}


def test_what_this_run_uses_is_never_removed(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, 2)
    train, other, val = (shard(tmp_path, name, number) for number, name in enumerate(("train", "other", "val")))
    source = open_shards(train)
    open_shards(other)
    held_out = open_shards(val)  # in the place of `other`, though `train` was used longer ago
    assert [one.read(0).image.tobytes() for one in (source, held_out)] == [picture(0).tobytes(), picture(2).tobytes()]
    with pytest.raises(UserError, match=r"need about 0\.000102 GB more, and other runs use 0\.000205 GB of the 0\.000205 GB"):
        open_shards(other)
    del source
    open_shards(other)
    assert copies(cache) == 2


HOLDER = """
import sys, time
from pathlib import Path
from eva_mim.data.shards import ShardSource
source = ShardSource([Path(sys.argv[1])], None)
sys.stdout.write("open\\n")
sys.stdout.flush()
time.sleep(600)
"""


def test_what_another_process_uses_stays_until_it_is_dead(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, 1)
    one, two = shard(tmp_path, "one"), shard(tmp_path, "two")
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(one)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="other runs use"):
            ShardSource([two], None)
        assert copy_of(found(one)).exists()
    finally:
        other.kill()
        other.wait()
    assert list(cache.glob("*.use"))  # what a killed process leaves is in nobody's way
    source = open_shards(two)
    assert not copy_of(found(one)).exists()
    assert len(list(cache.glob("*.use"))) == 1
    assert source._held is not None


KILLED = """
import os, signal, sys
from pathlib import Path
from eva_mim.data import unpack
from eva_mim.data.tars import found
read, left = unpack._next, [3]
def reading(packed, shard):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(packed, shard)
unpack._next = reading
unpack.unpack(found(Path(sys.argv[1])))
"""


def test_a_kill_in_the_middle_leaves_nothing_that_is_believed(tmp_path: Path, cache: Path) -> None:
    path = write_tar(tmp_path / "x.tar.gz", [("a.png", png(picture(1))), ("pad.bin", os.urandom(5 * 2**20))])
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=REPOSITORY, check=False)
    assert done.returncode == -signal.SIGKILL
    (half,) = cache.glob("*.unpacking")
    assert half.stat().st_size >= 2**20
    assert copies(cache) == 0
    source = open_shards(path)
    assert source.read(0).image.tobytes() == picture(1).tobytes()
    assert copy_of(found(path)).read_bytes() == gzip.decompress(path.read_bytes())
    assert not half.exists()


def test_a_copy_in_the_making_is_left_to_its_maker(tmp_path: Path, cache: Path) -> None:
    """`make_room` removes what dead processes left, and no file that is being written."""
    from eva_mim.data.sources.unpack import _locked

    file, path = _locked(".unpacking")
    make_room([found(shard(tmp_path, "a"))])
    assert path.exists()
    file.close()
    make_room([found(shard(tmp_path, "a"))])
    assert not path.exists()


def test_holding_marks_a_copy_as_used_and_does_not_change_it(tmp_path: Path) -> None:
    one = found(shard(tmp_path, "one"))
    copy = Path(unpack(one).place)
    os.utime(copy, ns=(10**18, 10**18))
    before = copy.stat().st_mtime_ns
    held = hold([one])
    assert held is not None
    assert copy.stat().st_mtime_ns == before
    assert copy.stat().st_atime_ns > 17 * 10**17
    assert hold([found(write_tar(tmp_path / "y.tar", []))]) is None


@pytest.mark.parametrize("text", ["", "many", "0", "-3", "nan", "inf"])
def test_a_limit_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("EVA_MIM_UNPACKED_GB", text)
    with pytest.raises(UserError, match=f"EVA_MIM_UNPACKED_GB={text}: must be a number of gigabytes"):
        limit()
