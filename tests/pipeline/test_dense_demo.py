"""The chain from masked features to segmentation and videos, as a person would start it."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.tiny import environment, python


@pytest.mark.long
def test_the_dense_demo(tmp_path: Path) -> None:
    line = python("eva_mim.cli", "pipeline", "configs/pipelines/dense_demo.yaml", "--out", tmp_path / "out")
    done = subprocess.run(line, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    records = {name: json.loads((tmp_path / "out" / name / "lineage.json").read_text()) for name in ("mim", "segment", "video")}
    for name in ("segment", "video"):
        assert records[name]["parents"]["init_from"]["sha256"] == records["mim"]["weights_sha256"]
        assert not set(records[name]["seeded"]["new"]) - {"time_embed", "head.weight", "head.bias"}
    with (tmp_path / "out" / "segment" / "segmentation.csv").open() as file:
        pixels = [int(row["pixels"]) for row in csv.DictReader(file)]
    nothing_but_ground = 100 * pixels[0] / sum(pixels) / len(pixels)
    assert records["segment"]["metrics"]["miou"] > nothing_but_ground + 5
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| segment | segment | mim |" in summary
    assert "| video | video | mim |" in summary
