"""The folder of a run: readers of what a run left, also of what a kill has cut short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eva_mim.core.errors import UserError
from eva_mim.core.run_folder import MANIFEST, RunFolder


def checkpoint(run: RunFolder, step: int, size: int = 3) -> Path:
    folder = run.checkpoint(step)
    folder.mkdir(parents=True)
    (folder / "module.safetensors").write_bytes(b"abc")
    (folder / MANIFEST).write_text(json.dumps({"files": {"module.safetensors": {"size": size}}}))
    return folder


def test_an_empty_folder_holds_no_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "none")
    assert (run.record(), run.complete(), run.latest(), run.log_lines(), run.seconds_at_work()) == ({}, [], None, [], 0.0)


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    folders = [checkpoint(run, step) for step in (8, 12)]
    checkpoint(run, 20, size=4)
    assert run.latest() == (12, folders[1])
    assert [step for step, _ in run.complete()] == [12, 8]


def test_time_at_work_leaves_out_what_passed_before_a_start(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    rows = [("start", 0), ("train", 5), ("start", 100), ("train", 102)]
    lines = [json.dumps({"kind": kind, "time": time}) for kind, time in rows]
    run.metrics.write_text("\n".join(lines) + '\n{"kind": "tra')
    assert run.log_lines() == lines
    assert run.seconds_at_work() == 7


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    RunFolder(tmp_path).lineage.write_text("{")
    with pytest.raises(UserError, match=r"lineage\.json is damaged"):
        RunFolder(tmp_path).record()
