"""Faults of data sets, each driven with real files through the real loader: a counted skip, or one clear line; never a hang."""

from __future__ import annotations

import gzip
import io
import re
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from eva_mim.core.batches import Batch
from eva_mim.core.contracts import Source
from eva_mim.core.errors import UserError
from eva_mim.data import DataSettings
from eva_mim.data.loader import EvalLoader
from eva_mim.data.preparation import MaskedPreparation
from eva_mim.data.source_settings import ColumnSettings
from eva_mim.data.sources.lists import open_list
from eva_mim.data.views import EvalView
from tests.conftest import make_folder, make_shards, picture, png, write_tar
from tests.data.test_loader import loader, pairs, preparation
from tests.data.test_sources import folder, shards

BOTH = pytest.mark.parametrize("workers", [0, 2])


def images() -> MaskedPreparation:
    """Views without masks."""
    return MaskedPreparation(preparation().view, 7)


def batches(source: Source, workers: int, steps: int, disturb: Callable[[], object] = lambda: None) -> list[Batch]:
    """The batches of 4 of so many steps; `disturb` is called after the first step."""
    found: list[Batch] = []
    for number, step in enumerate(loader(source, images(), workers, batch=4).steps(0, steps)):
        found += step
        if not number:
            disturb()
    return found


def faults(found: list[Batch]) -> set[str]:
    return {fault for batch in found for fault in batch.broken}


def seen(found: list[Batch]) -> set[int]:
    return {index for batch in found for index in batch.index.tolist()}


# ---- the disk goes away


def listed(root: Path) -> Source:
    (root / "list.csv").write_text("image\n" + "".join(f"i/{number:05d}.png\n" for number in range(40)))
    source = open_list(DataSettings(source="list", root=root, train="list.csv"), "train")
    assert source is not None
    return source


@BOTH
@pytest.mark.parametrize("kind", ["folder", "list"])
def test_a_mount_that_vanishes_stops_the_run_and_is_named(tmp_path: Path, kind: str, workers: int) -> None:
    root = tmp_path / "mount"
    make_folder(root / "i", {"": 40})
    source = listed(root) if kind == "list" else folder(root)
    before = psutil.Process().children()
    with pytest.raises(UserError) as stopped:
        batches(source, workers, 1000, lambda: root.rename(tmp_path / "away"))
    assert psutil.Process().children() == before  # the error does not keep loader processes alive
    assert re.match(r"20 broken records in a row; the last: i/000\d\d\.png: FileNotFoundError: .*; "
                    rf"{root} does not exist: is its disk mounted\?$", str(stopped.value))


@BOTH
def test_shards_that_vanish_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Those that are open can still be read; here every read opens another."""
    monkeypatch.setattr("eva_mim.data.sources.shards.MAX_OPEN", 1)
    root = tmp_path / "mount"
    for number in range(10):
        make_shards(root, f"{number}.tar", count=4, first=4 * number)
    with pytest.raises(UserError, match=rf"20 broken records .*; {root} does not exist: is its disk mounted"):
        batches(shards(root), workers, 1000, lambda: root.rename(tmp_path / "away"))


@BOTH
def test_held_out_images_that_vanish_stop_the_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    make_folder(tmp_path / "mount", {"a": 60})
    source = folder(tmp_path / "mount")
    shutil.rmtree(tmp_path / "mount")
    evaluation = EvalLoader(source, MaskedPreparation(EvalView([16]), 0, training=False), 4, workers)
    with pytest.raises(UserError, match=r"20 broken held-out images in a row; the last: a/00019\.png: FileNotFoundError"):
        list(evaluation)
    assert capsys.readouterr().err.count("left out") == 20


# ---- damaged shards

DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut in a member": lambda whole: whole[:700],
    "cut in a header": lambda whole: whole[: 3 * 512 + 100],
    "no tar": lambda whole: b"<html>404</html>" * 100,
    "zeros in the middle of a header": lambda whole: whole[:100] + bytes(30) + whole[130:],
}


def three(root: Path, damage: Callable[[bytes], bytes], suffix: str = ".tar") -> None:
    """Three shards of 8 records, of which the second is damaged."""
    for number in range(3):
        make_shards(root, f"{number}{suffix}", count=8, first=8 * number)
    (root / f"1{suffix}").write_bytes(damage((root / f"1{suffix}").read_bytes()))


@BOTH
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_tar_is_refused_by_name_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, workers: int
) -> None:
    three(tmp_path, DAMAGED[kind])
    with pytest.raises(UserError, match=r"1\.tar: not a readable tar: .+\n1 of 3 shards cannot be used; .*data\.bad_shards=skip"):
        shards(tmp_path)
    for _ in range(2):  # the second time from the index, and it is said again
        capsys.readouterr()
        source = shards(tmp_path, bad_shards="skip")
        assert "data.bad_shards: 1 of 3 shards in" in capsys.readouterr().err
    assert [source.key(index) for index in (0, 7, 8, 15)] == ["0.tar/00000", "0.tar/00007", "2.tar/00016", "2.tar/00023"]
    assert len(source) == 16
    found = batches(source, workers, 4)
    assert seen(found) == set(range(16))
    assert not faults(found)


def test_a_mended_shard_is_taken_again(tmp_path: Path) -> None:
    three(tmp_path, DAMAGED["empty"])
    before = shards(tmp_path, bad_shards="skip")
    make_shards(tmp_path, "1.tar", count=8, first=8)
    after = shards(tmp_path, bad_shards="skip")
    assert (len(before), len(after)) == (16, 24)
    assert before.fingerprint != after.fingerprint
    assert after.fingerprint == shards(tmp_path).fingerprint


def test_when_all_shards_are_bad_none_is_skipped(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"7 of 7 shards cannot be used") as stopped:
        shards(tmp_path, bad_shards="skip")
    assert str(stopped.value).count("not a readable tar: empty file") == 5  # not a line for each of a thousand


@BOTH
def test_a_tar_without_records_is_named_and_the_others_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    three(tmp_path, lambda whole: bytes(10240))  # `tar cf x.tar -T /dev/null`
    source = shards(tmp_path)
    assert "1 of 3 shards hold no records: 1.tar" in capsys.readouterr().err
    assert len(source) == 16
    assert seen(batches(source, workers, 4)) == set(range(16))


@pytest.mark.parametrize("kind", ["cut", "bomb", "no gzip", "bad tar inside"])
def test_a_damaged_gzip_is_refused_by_name_or_left_out(tmp_path: Path, cache: Path, kind: str) -> None:
    damage: dict[str, Callable[[bytes], bytes]] = {
        "cut": lambda whole: whole[:-100],
        "bomb": lambda whole: gzip.compress(bytes(32 * 2**20)),
        "no gzip": lambda whole: b"\0" * 1000,
        "bad tar inside": lambda whole: gzip.compress(gzip.decompress(whole)[:700]),
    }
    three(tmp_path, damage[kind], ".tar.gz")
    with pytest.raises(UserError, match=r"1\.tar\.gz: (not a readable|unpacks to an absurd).*\n1 of 3 shards cannot be used"):
        shards(tmp_path)
    source = shards(tmp_path, bad_shards="skip")
    assert [source.read(index).image.tobytes() for index in (7, 8)] == [picture(7).tobytes(), picture(16).tobytes()]
    assert not list(cache.glob("*.unpacking"))


@BOTH
@pytest.mark.parametrize("change", ["cut", "rewritten", "replaced"])
def test_a_shard_that_changes_in_mid_run_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, workers: int
) -> None:
    """Its offsets are those of the old file: going on would train on whatever lies there now."""
    monkeypatch.setattr("eva_mim.data.sources.shards.MAX_OPEN", 1)  # or one that is replaced would stay open as it was
    for number in range(3):
        make_shards(tmp_path, f"{number}.tar", count=8, first=8 * number)

    def disturb() -> None:
        path = tmp_path / "1.tar"
        whole = path.read_bytes()
        if change == "replaced":
            make_shards(tmp_path / "new", "1.tar", count=9, first=50).replace(path)
        else:
            path.write_bytes(whole[:3000] if change == "cut" else bytes(len(whole)))

    with pytest.raises(UserError, match=r"/1\.tar: has changed since this run opened it; start the run again"):
        batches(shards(tmp_path), workers, 1000, disturb)


# ---- bad members and records


def bomb() -> bytes:
    """A PNG that says it has 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


BROKEN = {
    "bomb": (bomb(), "DecompressionBombError"), "text": (b"<html>", "UnidentifiedImageError"),
    "empty": (b"", "UnidentifiedImageError"),
    "cut": (png(picture(1))[:200], "OSError"),
}


@BOTH
@pytest.mark.parametrize("home", ["folder", "shard"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_picture_is_replaced_counted_and_named(tmp_path: Path, home: str, kind: str, workers: int) -> None:
    content, error = BROKEN[kind]
    members = [(f"{number:05d}.png", content if number == 5 else png(picture(number))) for number in range(8)]
    if home == "shard":
        source = shards(write_tar(tmp_path / "x.tar", members).parent)
    else:
        for name, image in members:
            (tmp_path / name).write_bytes(image)
        source = folder(tmp_path)
    found = batches(source, workers, 4)  # two epochs
    assert seen(found) == set(range(8)) - {5}
    named = {": ".join(fault.split(": ")[:2]) for fault in faults(found)}
    assert named == {f"{'x.tar/00005' if home == 'shard' else '00005.png'}: {error}"}
    assert sum(len(batch.broken) for batch in found) >= 2  # once an epoch, and again when it is drawn as a replacement


@BOTH
def test_a_record_without_picture_is_replaced_and_named(tmp_path: Path, workers: int) -> None:
    members = [(f"{number}.{'txt' if number == 2 else 'png'}", png(picture(number))) for number in range(8)]
    found = batches(shards(write_tar(tmp_path / "x.tar", members).parent), workers, 2)
    assert faults(found) == {"x.tar/2: ValueError: no image member"}
    assert seen(found) == set(range(8)) - {2}


@BOTH
def test_a_missing_caption_is_replaced_and_named(tmp_path: Path, workers: int) -> None:
    members = [(name, content) for number in range(8) for name, content in
               ((f"{number}.png", png(picture(number))), (f"{number}.txt", b"words")) if name != "3.txt"]
    source = shards(write_tar(tmp_path / "x.tar", members).parent)
    found = [batch for step in loader(source, pairs(), workers).steps(0, 2) for batch in step]
    assert {fault.partition(" (")[0] for fault in faults(found)} == {"x.tar/3: ValueError: no caption"}
    assert seen(found) == set(range(8)) - {3}


@BOTH
def test_keys_that_stand_twice_are_counted_and_the_last_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    members = [(f"{number % 4}.png", png(picture(number))) for number in range(8)]
    source = shards(write_tar(tmp_path / "x.tar", members).parent)
    assert "4 members have the name of another one in their shard; the last one counts" in capsys.readouterr().err
    assert len(source) == 4
    assert [source.read(index).image.tobytes() for index in range(4)] == [picture(number).tobytes() for number in range(4, 8)]
    assert seen(batches(source, workers, 1)) == set(range(4))


@BOTH
def test_names_and_links_that_leave_the_shard_lead_nowhere(tmp_path: Path, workers: int) -> None:
    """Members may be called anything: they are read by their place. Links, also hard ones, and sparse members are no records."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(picture(99)))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, name in enumerate(["../out.png", f"{tmp_path}/abs.png", "a/../../b.png", "plain.png"]):
            info, content = tarfile.TarInfo(name), png(picture(number))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for kind, name in ((tarfile.SYMTYPE, "sym.png"), (tarfile.LNKTYPE, "hard.png"), (tarfile.LNKTYPE, "own.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "plain.png" if name == "own.png" else str(secret)
            archive.addfile(info)
        info = tarfile.TarInfo("holes.png")
        info.type, info.size = tarfile.GNUTYPE_SPARSE, len(content)
        archive.addfile(info, io.BytesIO(content))
    root = tmp_path / "shards"
    root.mkdir()
    (root / "x.tar").write_bytes(buffer.getvalue())
    before = set(tmp_path.rglob("*"))
    source = shards(root)
    assert [source.read(index).image.tobytes() for index in range(len(source))] == [picture(n).tobytes() for n in range(4)]
    assert seen(batches(source, workers, 2)) == set(range(4))
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("path", ["../secret.png", "i/../../secret.png", "/etc/secret.png"])
def test_a_list_row_that_leaves_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    root = make_folder(tmp_path / "root" / "i", {"": 2}).parent
    (tmp_path / "secret.png").write_bytes(png(picture(9)))
    (root / "list.csv").write_text(f"image\ni/00000.png\n{path}\n")
    with pytest.raises(UserError, match=rf"list\.csv:3: {path} is outside data\.root={root}"):
        open_list(DataSettings(source="list", root=root, train="list.csv", columns=ColumnSettings()), "train")


def test_a_member_beyond_the_end_of_its_shard_is_no_record(tmp_path: Path) -> None:
    """A header that says 8 GiB, and one that says a negative size (which old readers follow back for ever)."""
    for size in (b"\x80" + (2**33).to_bytes(11, "big"), b"\xff" * 11 + b"\0", b"77777777777\0"):
        info = tarfile.TarInfo("a.png")
        block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
        block[124:136] = size
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
        (tmp_path / "x.tar").write_bytes(bytes(block) + bytes(2048))
        with pytest.raises(UserError, match=r"x\.tar: not a readable tar: "):
            shards(tmp_path)
