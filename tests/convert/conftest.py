"""Conversions that several tests look at, and where hostile checkpoints are tried."""

from __future__ import annotations

import functools
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from eva_mim.core.files import sha256
from tests.convert.golden_files import CLIPS, clip_config, converted, golden, known_to_open_clip, written


@dataclass(frozen=True)
class Conversion:
    """A golden checkpoint in a format: the record, and the file or folder. Nobody writes into it."""

    record: dict[str, Any]
    path: Path


Convert = Callable[[str, str], Conversion]
"""The conversion of a golden checkpoint, by its name and the format."""


@pytest.fixture(scope="session")
def conversion(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Convert]:
    """Each (name, format) is converted once. open_clip knows the CLIP fixtures' architectures meanwhile, by `golden-NAME`."""
    folder = tmp_path_factory.mktemp("conversions")
    configs = {f"golden-{name}": clip_config(golden(shared, name)) for name in CLIPS}
    made: list[Conversion] = []

    @functools.cache
    def convert(name: str, to: str) -> Conversion:
        source = written(golden(shared, name), folder)
        with known_to_open_clip(folder, **configs):
            made.append(Conversion(*converted(source, to, folder, name)))
        return made[-1]

    yield convert
    for done in made:
        assert {name: sha256(folder / name) for name in done.record["files"]} == done.record["files"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """All that a run could touch: source and result, the working folder, HOME, the temporary folder. No network."""
    attempts: list[Any] = []

    connect = socket.socket.connect

    def refuse(*given: Any, **_: Any) -> None:
        if isinstance(given[0], socket.socket) and given[0].family == socket.AF_UNIX:  # the tests' own processes
            return connect(*given)
        if threading.current_thread().name != "fsspecIO":  # where a reader that another test gave up may still try
            attempts.append(given)
        raise OSError("no network")

    for name in ("source", "out", "here", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    torch.manual_seed(0)
    yield tmp_path
    assert attempts == []
