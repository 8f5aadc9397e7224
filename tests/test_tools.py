"""The measuring tools run: tiny, and through their own main."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_index_memory_measures_a_small_folder(tmp_path: Path) -> None:
    """Two ranks with a worker each; whether the figures keep to the bound is not asked here."""
    tiny = ["--millions", "0.01", "--classes", "5", "--workers", "1", "--ranks", "2", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tools.index_memory", *tiny], cwd=REPOSITORY, capture_output=True, text=True, check=False,
        timeout=300,
    )
    assert re.fullmatch(r"10000 images, file of 0 MB: opened in \d+\.\d\d s; -?\d+\.\d{3} GB for 2 ranks x \(1 \+ 1 workers\), "
                        r"with an epoch's order\n", done.stdout), done.stderr
    assert not list(tmp_path.iterdir())
