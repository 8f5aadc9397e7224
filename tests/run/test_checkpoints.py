"""Checkpoints as files: whole or not at all, checked in every way in which they can be damaged."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eva_mim.core.contracts import StateGroup
from eva_mim.core.distributed import is_main, rank
from eva_mim.core.errors import UserError
from eva_mim.core.files import sha256
from eva_mim.core.run_folder import MANIFEST, RunFolder, is_complete, read_manifest
from eva_mim.run import checkpoints as snapshot
from eva_mim.run.stability import SkippedData
from eva_mim.weights.files.write import stream_safetensors
from tests import tiny
from tests.ranks import on_ranks

GENERATOR = torch.Generator().manual_seed(0)
MODULE = {"weight": torch.randn(4, 5, generator=GENERATOR), "count": torch.tensor(7), "bias": torch.randn(4, generator=GENERATOR)}
MOMENT = {"weight": torch.rand(4, 5, generator=GENERATOR), "bias": torch.rand(4, generator=GENERATOR)}


def fresh() -> tuple[dict[str, StateGroup], list[dict[str, Tensor]]]:
    """Parts over zeros, and the zeros."""
    held = [{name: torch.zeros_like(value) for name, value in tensors.items()} for tensors in (MODULE, MOMENT)]
    return dict(zip(("module", "exp_avg"), map(snapshot.kept_here, held), strict=True)), held


def write(out: Path, step: int, **keep: int) -> Path:
    """A checkpoint of the values above."""
    parts = {"module": snapshot.kept_here(MODULE), "exp_avg": snapshot.kept_here(MOMENT)}
    return tiny.save(out, step, parts, {"step": step}, **({"keep_last": 2} | keep))  # type: ignore[arg-type]


def rewrite(folder: Path, file: str, tensors: dict[str, Tensor]) -> None:
    """Other tensors in a file, and a manifest that agrees with it."""
    save_file(tensors, folder / file, metadata={"format": "pt"})
    manifest = read_manifest(folder)
    manifest["files"][file] = {"size": (folder / file).stat().st_size, "sha256": sha256(folder / file)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_what_is_put_back_is_what_was_saved(tmp_path: Path) -> None:
    """Values, facts, and norms against a plain sum."""
    folder = write(tmp_path, 3)
    parts, held = fresh()
    assert snapshot.load(folder, parts) == {"step": 3}
    for found, wanted in zip(held, (MODULE, MOMENT), strict=True):
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    norms = read_manifest(folder)["norms"]
    for name, tensors in (("module", MODULE), ("exp_avg", MOMENT)):
        assert norms[name] == pytest.approx(math.sqrt(sum(x * x for value in tensors.values() for x in value.flatten().tolist())))


class SlowDisk:
    """Flushing to it takes until it is told to end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.end, flush = threading.Event(), os.fsync
        monkeypatch.setattr(os, "fsync", lambda number: (self.end.wait(60), flush(number)))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written are the values of the moment of saving, however the tensors change afterwards; the next save waits."""
    disk, values = SlowDisk(monkeypatch), {name: value.clone() for name, value in MODULE.items()}
    parts = {"module": snapshot.kept_here(values), "exp_avg": snapshot.kept_here(MOMENT)}
    with closing(snapshot.Writer(tmp_path, keep_last=2)) as writer:
        writer.save(1, parts, {"step": 1})
        for value in values.values():
            value += 1
        assert RunFolder(tmp_path).latest() is None
        assert list((tmp_path / "checkpoints").glob("step-*")) == []
        threading.Timer(0.3, disk.end.set).start()
        began = time.monotonic()
        writer.save(2, parts, {"step": 2})
        assert time.monotonic() - began > 0.2
        assert is_complete(RunFolder(tmp_path).checkpoint(1))
        writer.finish()
    for step in (1, 2):
        fits, held = fresh()
        assert snapshot.load(RunFolder(tmp_path).checkpoint(step), fits) == {"step": step}
        assert all(torch.equal(held[0][name], value + (step - 1)) for name, value in MODULE.items())


def test_without_the_memory_for_a_copy_training_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written when `save` returns, from no thread, and told once."""
    monkeypatch.setattr(snapshot, "ROOM", 0.0)
    parts = {"module": snapshot.kept_here(MODULE), "exp_avg": snapshot.kept_here(MOMENT)}
    before, writer = threading.active_count(), snapshot.Writer(tmp_path, keep_last=2)
    for step in (1, 2):
        writer.save(step, parts, {"step": step})
        assert RunFolder(tmp_path).latest() == (step, RunFolder(tmp_path).checkpoint(step))
    assert threading.active_count() <= before  # a thread of another test may have ended
    assert capsys.readouterr().err.count("training is held while a checkpoint is written: a copy takes 200 bytes of memory") == 1
    fits, held = fresh()
    snapshot.load(RunFolder(tmp_path).checkpoint(2), fits)
    assert all(torch.equal(held[0][name], value) for name, value in MODULE.items())


def test_memory_is_that_of_the_machine_or_of_the_control_group(tmp_path: Path) -> None:
    """Cached files can be given back."""
    told = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    assert snapshot.available_memory(tmp_path) == pytest.approx(told, rel=0.1)
    own = tmp_path / Path("/proc/self/cgroup").read_text().split("0::/")[1].split("\n")[0]
    own.mkdir(parents=True, exist_ok=True)
    for name, text in {"memory.max": "5000000", "memory.current": "3000000",
                       "memory.stat": "anon 1\nactive_file 400000\ninactive_file 600000\n"}.items():
        (own / name).write_text(text)
    assert snapshot.available_memory(tmp_path) == 3_000_000


def test_the_newest_and_every_so_many_steps_are_kept(tmp_path: Path) -> None:
    for step in range(1, 12):
        write(tmp_path, step, keep_every=4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step-{n:08d}" for n in (4, 8, 10, 11)]


def test_a_byte_that_has_changed_sends_the_run_to_the_checkpoint_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The size is right, the hash is not. What is ahead of the next checkpoint is removed, not what is before it."""
    folders = [write(tmp_path, step) for step in (4, 8)]
    for folder, file in zip(reversed(folders), ("exp_avg.safetensors", "module.safetensors"), strict=True):
        content = bytearray((folder / file).read_bytes())
        content[-1] ^= 1
        (folder / file).write_bytes(content)
        assert is_complete(folder)
        if folder is folders[1]:
            assert snapshot.newest(tmp_path) == (4, folders[0])
            assert f"{folder}: {file} is not as it was written" in capsys.readouterr().err
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        snapshot.newest(tmp_path)
    write(tmp_path, 6, keep_last=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("bias"), "bias: missing"),
        (lambda tensors: tensors.update(other=torch.ones(1)), "other: unknown"),
        (lambda tensors: tensors.update(weight=torch.ones(5, 4)), r"weight: \('float32', \(5, 4\)\) instead of .*\(4, 5\)\)"),
        (lambda tensors: tensors.update(weight=tensors["weight"].double()), r"weight: \('float64', \(4, 5\)\) instead of"),
        (lambda tensors: tensors["bias"].zero_(), "what was loaded has the norm"),
    ],
)
@pytest.mark.parametrize("file", ["module.safetensors", "exp_avg.safetensors"])
def test_a_part_of_a_load_is_refused(
    tmp_path: Path, file: str, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    """Whatever the hashes say: names, types, shapes and norms are compared."""
    folder = write(tmp_path, 1)
    tensors = load_file(folder / file)
    change(tensors)
    rewrite(folder, file, tensors)
    assert snapshot.newest(tmp_path) == (1, folder)
    with pytest.raises(UserError, match=message):
        snapshot.load(folder, fresh()[0])


def test_what_does_not_arrive_is_noticed(tmp_path: Path) -> None:
    """The files are right, but an engine does not take a tensor."""
    folder = write(tmp_path, 1)
    parts, _ = fresh()
    put = parts["exp_avg"].put
    parts["exp_avg"] = parts["exp_avg"]._replace(put=lambda name, value: put(name, value) if name != "bias" else None)
    with pytest.raises(UserError, match=r"exp_avg\.safetensors: what was loaded has the norm"):
        snapshot.load(folder, parts)


def test_another_optimizer_s_checkpoint_is_refused(tmp_path: Path) -> None:
    parts, _ = fresh()
    with pytest.raises(UserError, match="holds exp_avg, module, but this run keeps exp_avg, exp_avg_sq, module"):
        snapshot.load(write(tmp_path, 1), parts | {"exp_avg_sq": parts["exp_avg"]})


def mounted(place: Path, options: str) -> bool:
    """A file system in memory; False without the right to mount one."""
    place.mkdir(exist_ok=True)
    line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    return shutil.which("mount") is not None and subprocess.run(line, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of 256 KiB, or of the size that the test gives."""
    place = tmp_path / "disk"
    if not mounted(place, f"size={getattr(request, 'param', '256k')}"):
        pytest.skip("mounting a tmpfs takes rights that this process does not have")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_keeps_the_checkpoint_before(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is written, or in the middle of a file when others fill the disk."""
    values = {"a": torch.ones(20_000)}  # 80 kB
    parts = {"module": snapshot.kept_here(values), "exp_avg": snapshot.kept_here(values)}
    tiny.save(small_disk, 1, parts, {}, keep_last=9)
    message = r"(?s)step 2 was not saved: it needs 160,000 bytes, but \d+,\d+ are free in .*the checkpoint of step 1 is complete"
    with pytest.raises(UserError, match=message):
        tiny.save(small_disk, 2, parts, {}, keep_last=9)

    def slow(path: Path, kinds: Any, content: Any) -> None:
        (small_disk / "filler").write_bytes(bytes(60_000))  # somebody else is faster
        stream_safetensors(path, kinds, content)

    monkeypatch.setattr(snapshot, "stream_safetensors", slow)
    small = {"module": parts["module"]}
    with pytest.raises(UserError, match=r"(?s)step 2 was not saved: .*needs 80,\d+ bytes, but .* are free.*step 1 is complete"):
        tiny.save(small_disk, 2, small, {}, keep_last=9)
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-00000001"]
    assert RunFolder(small_disk).latest() == (1, RunFolder(small_disk).checkpoint(1))
    (small_disk / "filler").unlink()
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="step 2 was not saved"):
        tiny.save(small_disk, 2, {"module": parts["module"]}, {}, keep_last=9)
    writer = snapshot.Writer(small_disk, keep_last=9)
    writer.save(2, {"module": parts["module"]}, {})
    writer.close()
    assert writer.failed()
    with pytest.raises(UserError, match="step 2 was not saved"):  # before it copies anything
        writer.save(3, {"module": parts["module"]._replace(read=lambda name: pytest.fail("was read"))}, {})
    assert not writer.failed()
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-00000001"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file, then their folder, then the new name."""
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noting(number: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append(f"rename {Path(new).name}"), rename(old, new)))
    write(tmp_path, 1)
    files = [".module.safetensors.tmp", ".exp_avg.safetensors.tmp", ".manifest.json.tmp"]
    assert done == [*files, "tmp-step-00000001", "rename step-00000001", "checkpoints"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("small_disk", ["14m"], indirect=True)
def test_a_run_on_a_full_disk_stops_and_goes_on_when_there_is_room(small_disk: Path, tmp_path: Path, processes: int) -> None:
    """Room for two checkpoints of 5.7 MB: the third is not written, which every rank tells. With more room the same command ends
    as it should."""
    recipe = tiny.write_recipe(tmp_path, tiny.MIM)
    settings = ["run.checkpoint_every=1", "run.keep_last=9", *(["run.engine=deepspeed"] if processes > 1 else [])]
    tiny.run("mim", recipe, tmp_path / "straight", *settings, processes=processes)
    # torchrun has a code of its own for a failed rank
    stopped = tiny.run("mim", recipe, small_disk / "run", *settings, processes=processes, code=2)
    for number in range(processes):
        assert f"error: {'rank 0: ' if number else ''}step 3 was not saved: it needs 5," in stopped.stderr
    assert stopped.stderr.count("the checkpoint of step 2 is complete; the same command goes on from there") == processes
    names = sorted(path.name for path in (small_disk / "run" / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002"]
    assert mounted(small_disk, "remount,size=80m")
    assert "going on from step 2" in tiny.run("mim", recipe, small_disk / "run", *settings, processes=processes).stderr
    assert tiny.losses(small_disk / "run") == tiny.losses(tmp_path / "straight")
    found, wanted = (load_file(out / "model.safetensors") for out in (small_disk / "run", tmp_path / "straight"))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def seen_by_one_host(out: Path) -> tuple[Any, ...]:
    """On a rank: what it goes on with. The host of rank 1 sees the tensors, but no new file beside them yet."""

    def unseen(*_: Any) -> None:
        raise FileNotFoundError

    parts, held = fresh()
    detours = SkippedData(out if rank() == 0 else out / "stale", is_main())
    with patch.object(snapshot, "read_manifest", unseen) if rank() else nullcontext():
        found = snapshot.newest(out)
        assert found is not None
        facts = snapshot.load(found[1], parts)
    detours.load()
    return found[0], facts, detours.rewinds, detours.left_out, held[0]["weight"].tolist()


@pytest.mark.slow
def test_rank_0_reads_and_tells(tmp_path: Path) -> None:
    """Hosts may see the files of a network disk late, and ranks that went on from other places would train apart."""
    write(tmp_path, 3)
    SkippedData(tmp_path, main=True).add(1, 2)
    wanted = 3, {"step": 3}, 1, [(1, 2)], MODULE["weight"].tolist()
    assert on_ranks(2, seen_by_one_host, tmp_path) == [wanted, wanted]
