"""Captions of images: from the text of a record, from its JSON, or from one file with a line for each image."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eva_mim.config import UserError, few
from eva_mim.data import SourceSettings
from eva_mim.files import sha256
from eva_mim.log import say


def record_captions(text: bytes | None, described: bytes | None, lines: bool) -> tuple[str, ...]:
    """Captions in KEY.json (`described`), else in KEY.txt: all of it, or one a line. Raises ValueError for broken files."""
    found = _described(json.loads(described)) if described is not None else ()
    if found or text is None:
        return found
    whole = text.decode()
    return tuple(line.strip() for line in whole.splitlines() if line.strip()) or ("",) if lines else (whole.strip(),)


def _described(value: Any) -> tuple[str, ...]:
    """The texts under "captions" or "caption"; none where neither says anything. Raises ValueError for other things there."""
    if not isinstance(value, dict):
        raise ValueError('expected {"captions": [...]} or {"caption": ...}')
    return as_captions(value["captions"] if value.get("captions") is not None else value.get("caption"))


def as_captions(value: Any) -> tuple[str, ...]:
    """One text or a list of texts, stripped; nothing for None. Raises ValueError for anything else."""
    texts = [] if value is None else [value] if isinstance(value, str) else list(value) if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a caption must be a text, found {type(next(t for t in texts if not isinstance(t, str))).__name__}")
    return tuple(text.strip() for text in texts)


class CaptionFile:
    """Captions by record number, read from their lines when they are asked for: only the places of the lines are held."""

    def __init__(self, path: Path, setting: str, keys: Sequence[str], records: str):
        """`keys` of all records, in their order; `records` says whose. Raises UserError for broken lines, and unless every record
        has a line of its own. Lines that belong to no record are counted and named."""
        self.path, self.fingerprint = path, sha256(path)
        places = _index(path)
        if repeated := [key for key, count in Counter(keys).items() if count > 1]:
            raise UserError(f"{setting}: {len(repeated)} keys stand for several {records}, such as {repeated[0]}; "
                            "captions by key cannot tell them apart")
        if missing := [key for key in keys if key not in places]:
            raise UserError(f"{setting}: {path} has no captions for {len(missing)} of the {len(keys)} {records}: {few(missing)}")
        self._places = np.array([places[key] for key in keys], dtype=np.int64)
        if strangers := sorted(places.keys() - set(keys)):
            say(f"  {path}: {len(strangers)} of {len(places)} keys are none of the {len(keys)} {records}: {few(strangers)}")

    def __getitem__(self, record: int) -> tuple[str, ...]:
        with self.path.open("rb") as lines:
            lines.seek(int(self._places[record]))
            return _described(json.loads(lines.readline()))


def _index(path: Path) -> dict[str, int]:
    """Where the line of each key starts. Every mistake of the file is found here."""
    places: dict[str, int] = {}
    start = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                key = _key(line, f"{path}:{number}")
                if key in places:
                    raise UserError(f"{path}:{number}: key {key} stands on an earlier line as well; give all its captions in one")
                places[key] = start
            start += len(line)
    return places


def _key(line: bytes, where: str) -> str:
    try:
        value = json.loads(line)
        texts = _described(value)
        key = value["key"]
    except KeyError:
        raise UserError(f'{where}: no "key"') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a line of captions: {error}") from None
    if not isinstance(key, str):
        raise UserError(f"{where}: the key must be a text, not {key!r}")
    if not texts or "" in texts:
        raise UserError(f"{where}: {'an empty caption' if texts else 'no captions'} for key {key}")
    return key


def open_captions(
    settings: SourceSettings, split: str, keys: Callable[[], Sequence[str]], records: str
) -> CaptionFile | None:
    """The caption file of a split; None where the settings name none, and then nobody asks for the `keys`. Raises UserError."""
    setting = "data.val_captions" if split == "val" and settings.val_captions else "data.captions"
    name = settings.val_captions if setting == "data.val_captions" else settings.captions
    if name is None:
        return None
    path = settings.own_root / name
    if not path.is_file():
        raise UserError(f"{setting}: {path} does not exist")
    return CaptionFile(path, setting, keys(), records)
