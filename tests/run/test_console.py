"""What a run says fits into 80 columns, and is never silent for long."""

from __future__ import annotations

import os
import pty
import re
import select
import time
from pathlib import Path

import pytest

from eva_mim.core.report import KeyReport
from eva_mim.run import console
from eva_mim.run.console import StepBar, folded, step_line, wrapped
from tests.ranks import Launched, ends
from tests.tiny import CLASSIFY, RUN, write_recipe

LARGE = {"loss": 12.34567, "lr": 1.2345e-3, "grad_norm": 123.4567, "skipped": 0.0, "images_per_s": 123456.7}


def test_a_log_line_fits_into_80_columns() -> None:
    usual = LARGE | {"loss": 0.5, "grad_norm": 1.0, "images_per_s": 51.234}
    found = step_line(5, 100, usual, {"data": 0.25, "decode": 0.5, "student": 0.25}, 61)
    assert found == "  step   5/100 loss 0.5000 lr 1.2e-03 |g| 1 51.23 img/s data 75% left 1m01s"
    found = step_line(5, 100, usual, {"data": 0.04, "student": 0.96}, 61)
    assert found == "  step   5/100  loss 0.5000  lr 1.2e-03  |g| 1  51.23 img/s  left 1m01s"
    quick = step_line(123456, 500000, LARGE | {"images_per_s": 12345.6}, {"student": 0.9, "read": 0.004}, 359999)
    assert quick == "  step 123456/500000 loss 12.3457 lr 1.2e-03 |g| 123 1.235e+04 img/s left 99h59m"
    assert len(step_line(12345, 50000, usual | {"images_per_s": 1234.0}, {"data": 0.06}, 3700)) <= 80
    assert "skipped 3" in step_line(1, 2, LARGE | {"skipped": 3.0}, {}, 1)
    assert "scale 65536" in step_line(1, 2, LARGE | {"loss_scale": 65536.0}, {}, 1)


def test_figures_are_wrapped_and_stay_beside_their_names() -> None:
    figures = {f"figure_of_length_{number}": number / 7 for number in range(9)}
    lines = wrapped("held out, epoch 12.5, bf16:", figures, "(1m 5s)").splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("  held out, epoch 12.5, bf16: figure_of_length_0 0")
    assert all(line.startswith("    ") for line in lines[1:])
    assert lines[-1].endswith("(1m 5s)")
    assert re.findall(r"(figure\S+) (\d[.\d]*)", "\n".join(lines)) == [(name, f"{value:.4g}") for name, value in figures.items()]


def test_a_report_of_a_parent_is_folded_between_words() -> None:
    """Names and paths stay whole, also those that are longer than a line; empty lists leave no gap."""
    path = "/data/" + "long" * 30
    ignored = ["head.bias", "head.weight", "a", "b"]
    report = KeyReport([f"w{number}" for number in range(54)], [], ["visual.head.proj.weight"], ignored)
    text = folded(f"seeded from {path}: {report}")
    assert text.split() == f"seeded from {path}: 54 tensors loaded, 0 resized, 1 new (visual.head.proj.weight), 4 ignored "\
                           "(head.bias, head.weight, a, ...)".split()
    assert [len(line) for line in text.splitlines() if path not in line] == [13, 76, 36]


def test_a_slow_run_is_heard_of_by_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """After 5 s, and then every 30 s in which nothing else was said."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with StepBar(1000, 10) as bar:
        said = []
        for step in range(11, 111):
            now[0] += 1.0
            if step == 60:
                bar.told(LARGE)
            bar.advance(step)
            said += [step] * capsys.readouterr().err.count("\n")
    assert said == [15, 45, 90]  # 5 s after the start, 30 s later, and 30 s after the line of step 60


def classify_in(folder: str, words: list[str]) -> None:
    """`eva-mim classify WORDS`, in a folder."""
    os.chdir(folder)
    ends("finetune.classify", words)


@pytest.mark.slow
def test_a_terminal_shows_a_bar(tmp_path: Path) -> None:
    """Of 80 columns: every line fits, the bar goes with the run, and what it leaves are the plain lines."""
    run = RUN | {"epochs": 12, "log_every": 20}
    write_recipe(tmp_path, CLASSIFY | {"run": run})
    words = ["recipe.yaml", "--out", "runs/photographs"]
    main, side = pty.openpty()
    seen = b""
    process = Launched(classify_in, str(tmp_path), words, log=os.ttyname(side), COLUMNS="80", LINES="24", TERM="xterm")
    while process.poll() is None and not select.select([main], [], [], 0.1)[0]:
        pass  # it has opened the terminal before this side is closed
    os.close(side)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        try:
            seen += os.read(main, 4096)
        except OSError:  # the other side is closed
            break
    assert process.wait(10) == 0, seen.decode()
    text = seen.decode()
    assert re.search(r"step +\d+/48 .*img/s", text)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    rows = [row.rpartition("\r")[2] if not row.endswith("\r") else row.rstrip("\r") for row in plain.split("\n")]
    assert max(len(row.split("\r")[-1]) for row in rows) <= 80, [row for row in rows if len(row) > 80]
    assert "━" in text  # the bar itself
    assert "step 20/48" in plain
