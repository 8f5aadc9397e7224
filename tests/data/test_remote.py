"""Shards by URL: from a real server over a socket, which counts, fails and hangs. Its fsspec driver stands here."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from eva_mim.core.contracts import Source
from eva_mim.core.errors import UserError
from eva_mim.core.settings import as_tree, parse
from eva_mim.data import DataSettings
from eva_mim.data.sources.remote import Reading, as_url, listed
from eva_mim.data.sources.shards import open_shards
from eva_mim.data.subset import Mixture, Subset
from tests.conftest import make_shards, picture, png, write_tar
from tests.data.test_faults import BOTH, batches, faults, seen
from tests.data.test_sources import content, shards


class Server(ThreadingHTTPServer):
    """Serves the files of a folder by ranges; `/` lists them. Misbehaves where it is told to."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests, self.bytes = Counter[str](), 0
        self.open, self.most = 0, 0
        """Requests under way now, and at most."""
        self.fail, self.hang, self.whole = 0, 0.0, False
        """So many further requests are answered with an error; every answer waits so many seconds; ranges are not understood."""

    def handle_error(self, *_: Any) -> None:
        """A client that did not wait is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.open += 1
        self.server.most = max(self.server.most, self.server.open)
        try:
            self.respond()
        finally:
            self.server.open -= 1

    def respond(self) -> None:
        name = self.path.lstrip("/")
        self.server.requests[name] += 1
        time.sleep(self.server.hang)
        if self.server.fail > 0:
            self.server.fail -= 1
            return self.send_error(503)
        if not name:
            found = [{"name": path.name, "size": path.stat().st_size, "ETag": str(path.stat().st_mtime_ns)}
                     for path in self.server.folder.iterdir()]
            return self.answer(200, json.dumps(found).encode())
        if not (self.server.folder / name).is_file():
            return self.send_error(404)
        whole = (self.server.folder / name).read_bytes()
        start, end = self.headers["Range"].removeprefix("bytes=").split("-")
        if self.server.whole:
            return self.answer(200, whole)
        return self.answer(206, whole[int(start) : int(end) + 1])

    def answer(self, code: int, body: bytes) -> None:
        self.server.bytes += len(body)
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


class RangeFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """range://HOST:PORT/NAME."""

    protocol = "range"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("range://").rstrip("/")

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        host = path.partition("/")[0]
        with urllib.request.urlopen(f"http://{host}/") as answer:
            rows = json.loads(answer.read())
        return [row | {"name": f"{host}/{row['name']}", "type": "file"} for row in rows]

    def cat_file(self, path: str, start: int = 0, end: int = 0, **_: Any) -> bytes:
        request = urllib.request.Request(f"http://{path}", headers={"Range": f"bytes={start}-{end - 1}"})
        try:
            with urllib.request.urlopen(request) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise FileNotFoundError(2, "No such file", path) from None
            raise


class ManyAtOnce(AsyncFileSystem):  # type: ignore[misc]
    """many://HOST:PORT/NAME: as drivers of object stores are, it asks for several ranges at once."""

    protocol = "many"
    ls = RangeFileSystem.ls

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("many://").rstrip("/")

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        return self.ls(path, detail)

    async def _info(self, path: str, **_: Any) -> Any:
        return next((row for row in self.ls(path) if row["name"] == path), {"name": path, "size": 0, "type": "directory"})

    async def _cat_file(self, path: str, start: int = 0, end: int = 0, **_: Any) -> bytes:
        with ThreadPoolExecutor(1) as one:
            return await asyncio.wrap_future(one.submit(RangeFileSystem.cat_file, self, path, start, end))


for driver in (RangeFileSystem, ManyAtOnce):
    fsspec.register_implementation(driver.protocol, driver, clobber=True)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("eva_mim.data.sources.remote.WAITS", (0.01, 0.02))
    (tmp_path / "served").mkdir()
    running = Server(tmp_path / "served")
    Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def url(server: Server, protocol: str = "range") -> str:
    return f"{protocol}://127.0.0.1:{server.server_port}"


def remote(server: Server, **more: Any) -> Source:
    settings = parse(DataSettings, {"source": "shards", "root": url(server)} | more, "recipe")
    source = open_shards(parse(DataSettings, as_tree(settings), "recipe"), "train")  # as from resolved.yaml
    assert source is not None
    return source


@BOTH
def test_shards_by_url_hold_what_they_hold_here(server: Server, tmp_path: Path, workers: int) -> None:
    make_shards(server.folder, "x-0.tar", count=7)
    make_shards(server.folder, "x-1.tar.gz", count=5, first=7)
    make_shards(server.folder, "y.tar", count=2)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    found = remote(server, train="x-*", classes=str(tmp_path / "classes.txt"))
    here = shards(server.folder, train="x-*", classes=str(tmp_path / "classes.txt"))
    assert content(found) == content(here)
    assert [found.key(index) for index in range(12)] == [here.key(index) for index in range(12)]
    assert found.fingerprint == here.fingerprint
    both = (batches(source, workers, 6) for source in (found, here))
    for one, other in zip(*both, strict=True):
        assert (one.views[16] == other.views[16]).all()


def test_an_index_is_made_from_headers_and_a_record_read_at_once(server: Server) -> None:
    """Of 4.8 MB 20 headers are read, each with 64 kB; opening again asks for nothing but the list."""
    pixels = png(picture(1, (400, 400)))
    pictures = [pixels + bytes(600_000 - len(pixels)) for _ in range(8)]
    members = [(f"{n}.{suffix}", data) for n in range(8) for suffix, data in (("png", pictures[n]), ("txt", b"words"))]
    write_tar(server.folder / "x.tar", members)
    source = remote(server)
    assert server.bytes < 20 * 2**16
    before, server.bytes = server.requests["x.tar"], 0
    again = remote(server)
    assert server.requests["x.tar"] == before
    for index in range(8):
        assert again.read(index).captions == ("words",)
    assert server.requests["x.tar"] == before + 8
    assert server.bytes < 8 * 601_000 + 2000
    assert source.fingerprint == again.fingerprint


@BOTH
def test_a_batch_is_fetched_together(server: Server, workers: int) -> None:
    """With a driver that can do it: each record once, several at a time; one that is refused is asked for again."""
    make_shards(server.folder, "x.tar", count=24)
    source, here = remote(server, root=url(server, "many")), shards(server.folder)
    server.requests.clear()
    server.most, server.hang = 0, 0.05

    def disturb() -> None:
        server.fail = 1

    found, wanted = batches(source, workers, 6, disturb), batches(here, workers, 6)
    assert not faults(found)
    assert all((one.views[16] == other.views[16]).all() for one, other in zip(found, wanted, strict=True))
    assert server.fail == 0
    read = sum(len(batch.index) for batch in found)
    assert read < server.requests["x.tar"] <= read + 1 + 4 * 4 * max(1, workers)  # prefetched batches may never be used
    assert server.most >= 3


def test_parts_and_mixtures_expect_their_own(server: Server) -> None:
    """Positions of a choice, and of a part, are not those of the whole; what is in quarantine is not asked for."""
    make_shards(server.folder, "x.tar", count=6)
    make_shards(server.folder, "y.tar", count=6, first=6)
    parts = [remote(server, root=url(server, "many"), train=name) for name in ("x.tar", "y.tar")]
    chosen = Subset(parts[1], np.array([1, 3, 4]), None, quarantined={3: "broken"})
    both = Mixture([parts[0], chosen], [1, 1], [])
    server.requests.clear()
    both.prefetch([5, 6, 7, 8])
    assert server.requests == {"x.tar": 1, "y.tar": 2}
    assert [both.read(index).image.tobytes() for index in (5, 6, 8)] == [picture(seed).tobytes() for seed in (5, 7, 10)]
    assert server.requests == {"x.tar": 1, "y.tar": 2}


def test_a_compressed_shard_is_fetched_once(server: Server, cache: Path) -> None:
    make_shards(server.folder, "x.tar.gz", count=5)
    remote(server)
    before = server.requests["x.tar.gz"]
    assert [pixels for pixels, _, _ in content(remote(server))] == [picture(seed).tobytes() for seed in range(5)]
    assert server.requests["x.tar.gz"] == before
    assert len(list(cache.glob("*.tar"))) == 1


def test_a_file_that_changed_is_indexed_anew(server: Server) -> None:
    make_shards(server.folder, "x.tar", count=3)
    assert len(remote(server)) == 3
    make_shards(server.folder, "x.tar", count=3, first=20)
    assert [pixels for pixels, _, _ in content(remote(server))] == [picture(seed).tobytes() for seed in (20, 21, 22)]


@BOTH
def test_a_server_that_stumbles_is_asked_again(server: Server, workers: int) -> None:
    make_shards(server.folder, "x.tar", count=8)
    server.fail = 2
    source = remote(server)
    assert len(source) == 8

    def disturb() -> None:
        server.fail = 1

    found = batches(source, workers, 20, disturb)
    assert not faults(found)
    assert server.fail == 0


@BOTH
def test_a_server_that_fails_for_good_stops_the_run(server: Server, workers: int) -> None:
    make_shards(server.folder, "x.tar", count=8)
    source = remote(server)

    def disturb() -> None:
        server.fail = 10**9

    with pytest.raises(UserError, match=r"range://127.*/x\.tar: no answer in 3 attempts of up to 60 s; the last: HTTPE.*503"):
        batches(source, workers, 1000, disturb)
    with pytest.raises(UserError, match=r"range://127.*: no answer in 3 attempts"):
        remote(server)


@BOTH
def test_a_server_that_hangs_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr("eva_mim.data.sources.remote.TIMEOUT", 0.4)
    make_shards(server.folder, "x.tar", count=8)
    source = remote(server)

    def disturb() -> None:
        server.hang = 30.0

    began = time.monotonic()
    with pytest.raises(UserError, match=r"no answer in 3 attempts of up to 0\.4 s; the last: TimeoutError"):
        batches(source, workers, 1000, disturb)
    assert time.monotonic() - began < 20  # 3 x 0.4 s, and not 30


def test_a_server_without_ranges_is_refused(server: Server) -> None:
    """It answers with the whole file, of which the beginning would be taken for the middle."""
    make_shards(server.folder, "x.tar", count=40)
    server.whole = True
    with pytest.raises(UserError, match=r"x\.tar: .* \d+ bytes where 66048 were asked for: it knows no ranges"):
        remote(server)


def test_empty_members_are_not_asked_for(server: Server) -> None:
    write_tar(server.folder / "x.tar", [("a.txt", b""), ("b.png", png(picture(1))), ("b.txt", b"")])
    source = remote(server)
    with pytest.raises(ValueError, match="no image member"):
        source.read(0)
    assert source.read(1).captions == ("",)


def test_a_file_that_is_gone_is_a_broken_record(server: Server) -> None:
    make_shards(server.folder, "x.tar", count=8)
    make_shards(server.folder, "y.tar", count=8, first=8)
    source = remote(server)
    (server.folder / "y.tar").unlink()
    found = batches(source, 0, 4)
    assert seen(found) <= set(range(8))
    assert all(fault.startswith("y.tar/000") and "FileNotFoundError" in fault for fault in faults(found))
    assert faults(found)


def test_what_cannot_be_is_said_in_one_line(server: Server) -> None:
    with pytest.raises(UserError, match=r"data\.train: no shard matches range://127\.0\.0\.1:\d+/\*\.tar\*"):
        remote(server)
    make_shards(server.folder, "x.tar")
    for setting in ("classes", "captions", "class_names"):
        with pytest.raises(UserError, match=rf"data\.{setting}: words\.txt must be the absolute path of a file here"):
            remote(server, **{setting: "words.txt"})
    with pytest.raises(UserError, match=r"data\.train: /x\.tar must be a pattern below"):
        remote(server, train="/x.tar")
    with pytest.raises(UserError, match=r"file:///nowhere: cannot be listed: FileNotFoundError"):
        listed("file:///nowhere", "*.tar")
    with pytest.raises(UserError, match=r"nowhere://x: Protocol not known: nowhere"):
        listed("nowhere://x", "*.tar")
    fsspec.register_implementation("lacking", "a_driver_that_is_not_here.FileSystem", clobber=True, errtxt="please install it")
    with pytest.raises(UserError, match=r"lacking://x: no driver for such URLs is installed: please install it"):
        listed("lacking://x", "*.tar")
    (server.folder / "x.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"range://.*/x\.tar: not a readable tar: .*\n1 of 1 shards cannot be used"):
        remote(server)


def test_fsspecs_own_systems(tmp_path: Path) -> None:
    """Local files by URL, and its store in memory."""
    path = make_shards(tmp_path, "x.tar", count=3)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/x.tar", path.read_bytes())
    for root in (f"file://{tmp_path}", "memory://bucket"):
        source = open_shards(DataSettings(source="shards", root=Path(root), train="x*.tar"), "train")
        assert source is not None
        assert [pixels for pixels, _, _ in content(source)] == [picture(seed).tobytes() for seed in range(3)]


@pytest.mark.parametrize(
    ("written", "expected"),
    [("s3://bucket/a/b", "s3://bucket/a/b"), ("https://host:80/x", "https://host:80/x"), ("file:///data/x", "file:///data/x"),
     ("memory://x", "memory://x"), ("/data/x", None), ("data/x", None), ("../x:y/z", None), ("C:/data", None), ("s3", None)],
)
def test_a_url_comes_back_from_a_path(written: str, expected: str | None) -> None:
    assert as_url(PurePosixPath(written)) == expected


def test_reading_seeks_like_a_file(server: Server, tmp_path: Path) -> None:
    whole = bytes(range(256)) * 40
    (server.folder / "x").write_bytes(whole)
    with Reading(f"{url(server)}/x", len(whole), 100) as far, (server.folder / "x").open("rb") as near:
        for offset, whence, count in ((5, 0, 7), (-3, 1, 4), (-10, 2, 100), (0, 2, 5), (9000, 0, -1)):
            assert far.seek(offset, whence) == near.seek(offset, whence)
            assert far.read(count) == near.read(count)
            assert far.tell() == near.tell()
