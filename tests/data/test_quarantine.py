"""`eva-mim data verify`, and runs that honour its list: other records see nothing of it, and nothing is counted twice."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import psutil
import pytest

from eva_mim.cli import main
from eva_mim.commands.data.parallel import RecordPool, chunks
from eva_mim.commands.data.verify import decode
from eva_mim.core.errors import UserError
from eva_mim.data import DataSettings
from eva_mim.data.loader import EvalLoader
from eva_mim.data.quarantine import Checked, Fault, Quarantine, read_quarantine
from eva_mim.data.splits import Splits, open_splits
from tests.conftest import REPOSITORY, make_folder, picture, png
from tests.data.deadly import Deadly
from tests.data.test_loader import assert_equal_steps, loader, preparation
from tests.tiny import environment

IMAGES = 40
BROKEN = {3: "cut", 17: "text", 18: "empty", 30: "bomb"}


def damaged(root: Path) -> Path:
    """Forty PNGs in a flat folder, of which four are broken, each in another way."""
    make_folder(root, {"": IMAGES})
    files = sorted(root.iterdir())
    files[3].write_bytes(files[3].read_bytes()[:-60])
    files[17].write_text("not an image")
    files[18].write_bytes(b"")
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    files[30].write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + png(picture(0))[33:])
    for number, file in enumerate(files):
        file.with_suffix(".txt").write_text(f"picture {number}")
    return root


def verify(root: Path, path: Path, *more: str) -> int:
    return main(["data", "verify", str(root), "--out", str(path), "--processes", "2", *more])


def splits(root: Path, listed: Path | None, **more: object) -> Splits:
    return open_splits(DataSettings(source="folder", root=root, quarantine=listed, **more))  # type: ignore[arg-type]


def test_broken_files_are_found_and_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, path = damaged(tmp_path / "images"), tmp_path / "list.json"
    assert verify(root, path) == 0
    said = capsys.readouterr().out
    assert "40 images, 4 broken (10.000%)" in said
    assert said.endswith(f"train without them: data.quarantine={path}\n")
    (checked,) = read_quarantine(path).sources.values()
    assert (checked.records, checked.checked, set(checked.broken)) == (IMAGES, IMAGES, set(BROKEN))
    assert checked.broken[30].key == "00030.png"
    assert "DecompressionBombError" in checked.broken[30].reason
    assert "UnidentifiedImageError" in checked.broken[17].reason


def test_what_was_checked_is_not_decoded_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, path = damaged(tmp_path / "images"), tmp_path / "list.json"
    source = splits(root, None).train.source  # type: ignore[attr-defined]  # as verify opens it
    Quarantine(path, {source.fingerprint: Checked("train", IMAGES, 17, {5: Fault("00005.png", "by hand")})}).write()
    verify(root, path)
    assert set(read_quarantine(path).sources[source.fingerprint].broken) == {5, 17, 18, 30}  # 3 lies before the mark
    before = path.read_bytes()
    capsys.readouterr()
    verify(root, path)
    assert "checked before" in capsys.readouterr().err
    assert path.read_bytes() == before


AT_WORK = " of 8000"
TALKATIVE = """
import signal, sys
import eva_mim.core.log
from eva_mim.cli import main
eva_mim.core.log.SAY_EVERY = 0
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it
sys.exit(main())
"""


def started(tmp_path: Path, said: str) -> subprocess.Popen[bytes]:
    """`eva-mim data verify` on 8,000 drawings, with two processes of its own; it has said this."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {source: scenes, scenes: {train: 8000, val: 8}}\n")
    words = ["data", "verify", str(recipe), "--processes", "2", "--out", "list.json"]
    with (tmp_path / "said").open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", TALKATIVE, *words], env=environment() | {"PYTHONPATH": str(REPOSITORY)},
                                   cwd=tmp_path, start_new_session=True, stderr=file, stdout=subprocess.DEVNULL)
    late = time.monotonic() + 120
    while said not in (tmp_path / "said").read_text() or len(children(process)) < 3:  # one more tracks what is shared
        assert time.monotonic() < late
        assert process.poll() is None
        time.sleep(0.02)
    return process


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.slow
def test_processes_end_with_the_command(tmp_path: Path) -> None:
    process = started(tmp_path, AT_WORK)
    workers = children(process)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, 20)
    assert alive == []


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_checked(tmp_path: Path) -> None:
    process = started(tmp_path, AT_WORK)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(200) == 130
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said
    assert said.endswith("interrupted\n")
    (checked,) = read_quarantine(tmp_path / "list.json").sources.values()
    assert 0 < checked.checked < checked.records == 8000


@pytest.mark.slow
def test_ctrl_c_while_the_processes_start(tmp_path: Path) -> None:
    process = started(tmp_path, "")
    workers = children(process)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(200) == 130
    assert (tmp_path / "said").read_text().splitlines()[-1:] == ["interrupted"]
    assert "Traceback" not in (tmp_path / "said").read_text()
    _, alive = psutil.wait_procs(workers, 20)
    assert alive == []


def test_a_record_that_kills_its_process_is_named() -> None:
    source = Deadly()
    with RecordPool(source, 2) as crew:
        told = list(crew.records(decode, chunks(0, len(source), 8)))
    seen, found = [record for record, _ in told], {record: fault for record, fault in told if fault is not None}
    assert seen == list(range(50))
    assert found == {7: Fault("number 7", "its decoder crashed"), 33: Fault("number 33", "its decoder crashed"),
                     20: Fault("number 20", "OSError: broken")}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_the_same_batches_with_the_list_and_counts_nothing(tmp_path: Path, workers: int) -> None:
    root, path = damaged(tmp_path / "images"), tmp_path / "list.json"
    verify(root, path)
    with_list, without = (splits(root, listed).train for listed in (path, None))
    straight = list(loader(without, preparation()).steps(0, 12))
    listed = list(loader(with_list, preparation(), workers=workers).steps(0, 12))
    broken = [fault for step in straight for batch in step for fault in batch.broken]
    expected = {f"{number:05d}.png" for number in BROKEN if number in trained(without)}
    assert {fault.partition(":")[0] for fault in broken} == expected
    assert [fault for step in listed for batch in step for fault in batch.broken] == []
    strip(straight)
    assert_equal_steps(straight, listed)


def trained(source: object) -> set[int]:
    """Positions in the folder of the training images."""
    return {int(source.key(index)[:5]) for index in range(len(source))}  # type: ignore[attr-defined,arg-type]


def strip(steps: list[list[object]]) -> None:
    """Leave out what was said of broken records."""
    for step in steps:
        for batch in step:
            object.__setattr__(batch, "broken", ())


def test_held_out_records_are_left_out_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, path = tmp_path / "data", tmp_path / "list.json"
    damaged(root / "val")
    make_folder(root / "train", {"": 2})
    verify(root, path)
    val = splits(root, path, train="train", val="val").val
    capsys.readouterr()
    seen = [index for batch in EvalLoader(val, preparation(training=False), 7, 0) for index in batch.index.tolist()]
    assert seen == [number for number in range(IMAGES) if number not in BROKEN]
    assert "broken" not in capsys.readouterr().err


def test_a_set_that_is_all_in_quarantine_is_one_clear_line(tmp_path: Path) -> None:
    root, path = tmp_path / "data", tmp_path / "list.json"
    for split in ("train", "val"):
        make_folder(root / split, {"": 3})
        for file in (root / split).iterdir():
            file.write_bytes(b"")
    verify(root, path)
    found = splits(root, path, train="train", val="val")
    with pytest.raises(UserError, match="none of 3 held-out images can be used; the first: in quarantine"):
        list(EvalLoader(found.val, preparation(training=False), 2, 0))
    with pytest.raises(UserError, match=r"20 broken records in a row; the last: 0000\d.png: UnidentifiedImageError"):
        list(loader(found.train, preparation(), batch=2, micro=2).steps(0, 1))


def test_a_list_of_other_data_is_refused(tmp_path: Path) -> None:
    root, path = damaged(tmp_path / "images"), tmp_path / "list.json"
    verify(root, path)
    (root / "new.png").write_bytes(png(picture(99)))
    with pytest.raises(UserError, match=r"is not about the 41 records in .*eva-mim data verify"):
        splits(root, path)


@pytest.mark.parametrize(("text", "wrong"), [
    ("", "Expecting value"),
    ("[]", 'no "format"'),
    ('{"format": "eva-mim quarantine 1"}', "sources"),
    ('{"format": "eva-mim quarantine 1", "sources": {"a": {"what": "t", "records": 2, "checked": 3, "broken": {}}}}',
     "positions"),
    ('{"format": "eva-mim quarantine 1", "sources": {"a": {"what": "t", "records": 2, "checked": 2, "broken": {"2": '
     '{"key": "k", "reason": "r"}}}}}', "positions beyond the 2 records"),
    ('{"format": "eva-mim quarantine 1", "sources": {"a": 3}}', "is no list"),
    ("[" * 100_000, "is no list"),
])
def test_a_broken_list_is_refused(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(UserError, match=wrong):
        read_quarantine(path)


def test_a_list_that_is_not_there_says_how_to_make_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="No such file or directory; make it with: eva-mim data verify RECIPE --out"):
        read_quarantine(tmp_path / "none.json")
    assert verify(damaged(tmp_path / "images"), tmp_path / "no" / "list.json") == 2
    assert "--out" in capsys.readouterr().err


def test_the_list_is_plain_json(tmp_path: Path) -> None:
    root, path = damaged(tmp_path / "images"), tmp_path / "list.json"
    verify(root, path)
    (source,) = json.loads(path.read_text())["sources"].values()
    assert sorted(source["broken"], key=int) == [str(number) for number in BROKEN]
