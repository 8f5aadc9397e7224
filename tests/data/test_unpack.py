"""Compressed shards in the cache: their limit, several processes at once, what a kill leaves."""

from __future__ import annotations

import gzip
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eva_mim.core.errors import UserError
from eva_mim.data.sources.shards import ShardSource
from eva_mim.data.sources.tar_index import found
from eva_mim.data.sources.unpack import copy_of, limit, unpacked_size
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


def test_what_does_not_fit_is_refused_before_anything_is_unpacked(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, 2.5)
    paths = [shard(tmp_path, name, number) for number, name in enumerate("abc")]
    with pytest.raises(UserError, match=r"3 compressed shards take about 0\.000307 GB unpacked in .*, whose copies take 0 GB of "
                                        r"the 0\.000256 GB of EVA_MIM_UNPACKED_GB; set it higher, or remove the \.tar files"):
        ShardSource(paths, None)
    assert copies(cache) == 0
    open_shards(*paths[:2])
    with pytest.raises(UserError, match=r"1 compressed shards take about 0\.000102 GB .* take 0\.000205 GB of the 0\.000256 GB"):
        ShardSource(paths, None)
    assert copies(cache) == 2
    copy_of(found(paths[0])).unlink()  # as the user may do
    assert open_shards(paths[2]).read(0).image.tobytes() == picture(2).tobytes()
    allow(monkeypatch, 0.5)  # what is there is read whatever the limit
    open_shards(*paths[1:])


def test_a_disk_without_room_is_named(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path, "a")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"take about 0\.000102 GB unpacked in .*, where 1e-06 GB are free; remove the "):
        ShardSource([path], None)
    assert copies(cache) == 0


LITTLE_DISK = """
import resource, sys
from pathlib import Path
from eva_mim.core.errors import UserError
from eva_mim.data.sources.tar_index import found
from eva_mim.data.sources.unpack import unpack
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    unpack(found(Path(sys.argv[1])))
except UserError as error:
    sys.exit(str(error))
"""


def test_a_disk_that_fills_up_meanwhile_is_named_and_nothing_is_left(tmp_path: Path, cache: Path) -> None:
    """As others write to it, too: here a limit of the process makes the write fail."""
    path = shard(tmp_path, "a")
    done = subprocess.run([sys.executable, "-c", LITTLE_DISK, str(path)], cwd=REPOSITORY, check=False, capture_output=True)
    assert done.returncode == 1
    assert re.fullmatch(rf"{path}: cannot be unpacked into {cache} \(.* GB free\): File too large; make room there, or set "
                        r"EVA_MIM_CACHE to another folder\n", done.stderr.decode())
    assert copies(cache) == 0
    assert not list(cache.glob("*.unpacking"))


SLOWLY = """
import sys, time
from pathlib import Path
from eva_mim.data.sources import unpack
from eva_mim.data.sources.tar_index import found
read, shard = unpack._next, found(Path(sys.argv[1]))
def reading(packed, shard):
    time.sleep(0.05)
    return read(packed, shard)
unpack._next = reading
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.readline()
sys.stdout.write(repr(unpack.unpack(shard)))
"""


def test_processes_that_unpack_the_same_shard_at_once_get_one_copy(tmp_path: Path, cache: Path) -> None:
    path = write_tar(tmp_path / "x.tar.gz", [("a.png", png(picture(1))), ("pad.bin", os.urandom(5 * 2**20))])
    start = [sys.executable, "-c", SLOWLY, str(path)]
    makers = [subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) for _ in range(3)]
    for maker in makers:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "ready\n"
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.write("\n")
        maker.stdin.flush()
    made = [maker.communicate(timeout=60)[0] for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0, 0]
    assert made == [repr(found(copy_of(found(path))))] * 3  # none replaced the copy that another one has opened
    assert copy_of(found(path)).read_bytes() == gzip.decompress(path.read_bytes())
    assert not list(cache.glob("*.unpacking"))


KILLED = """
import os, signal, sys
from pathlib import Path
from eva_mim.data.sources import unpack
from eva_mim.data.sources.tar_index import found
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


@pytest.mark.parametrize("text", ["", "many", "0", "-3", "nan", "inf"])
def test_a_limit_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("EVA_MIM_UNPACKED_GB", text)
    with pytest.raises(UserError, match=f"EVA_MIM_UNPACKED_GB={text}: must be a number of gigabytes"):
        limit()
