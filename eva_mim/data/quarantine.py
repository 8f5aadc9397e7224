"""Quarantine: records that training and evaluation do not read (`data.quarantine`), listed by `eva-mim data verify`.

In training a listed record is replaced by the same sample as a broken one; in evaluation it is left out. It is not counted
as broken, and its file is not opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eva_mim.core.contracts import Source
from eva_mim.core.errors import UserError
from eva_mim.core.files import write_json
from eva_mim.core.log import say

FORMAT = "eva-mim quarantine 1"
MAX_BYTES = 2**28
"""Maximum size of the file, which is enough for about two million broken records."""


class Quarantined(Exception):
    """Raised in place of reading a listed record; the message is the listed reason."""


class Fault(NamedTuple):
    """Key of a record that cannot be read, and the reason."""

    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class Checked(NamedTuple):
    """Result of checking one source: the first `checked` of its `records` were decoded; `broken` holds the faults by position."""

    what: str
    records: int
    checked: int
    broken: dict[int, Fault]


class Quarantine:
    """Checked sources by fingerprint; a source that has changed since its check has another fingerprint."""

    def __init__(self, path: Path, sources: dict[str, Checked]):
        self.path, self.sources = path, sources

    def reasons(self, source: Source, where: str) -> dict[int, str]:
        """Returns {position: reason} of the records of a source that are not read. `where` is the source's location, for
        messages. Raises UserError if the source was not checked, or has changed since."""
        known = self.sources.get(source.fingerprint)
        if known is None:
            raise UserError(f"data.quarantine: {self.path} is not about the {len(source)} records in {where} as they are now; "
                            f"make it anew: eva-mim data verify RECIPE --out {self.path}")
        say(f"  data.quarantine: {len(known.broken)} of {len(source)} records in {where} are not read"
            + ("" if known.checked == len(source) else f" ({known.checked} were checked)"))
        return {position: fault.reason for position, fault in known.broken.items()}

    def write(self) -> None:
        """Writes the list to its file, atomically."""
        sources = {
            name: one._asdict() | {"broken": {str(position): fault._asdict() for position, fault in one.broken.items()}}
            for name, one in self.sources.items()
        }
        write_json(self.path, {"format": FORMAT, "sources": sources})


def read_quarantine(path: Path) -> Quarantine:
    """Reads a quarantine file. Raises UserError for a missing file, or one of another format."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes are too many")
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise ValueError(f'no "format": "{FORMAT}"')
        return Quarantine(path, {name: _checked(one) for name, one in dict(tree["sources"]).items()})
    except OSError as error:
        how = f"make it with: eva-mim data verify RECIPE --out {path}"
        raise UserError(f"data.quarantine: {path}: {error.strerror}; {how}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"data.quarantine: {path} is no list of eva-mim data verify: {error}") from None


def _checked(one: Mapping[str, Any]) -> Checked:
    records, checked = int(one["records"]), int(one["checked"])
    broken = {int(place): Fault(str(fault["key"]), str(fault["reason"])) for place, fault in dict(one["broken"]).items()}
    if not 0 <= checked <= records or not all(0 <= place < records for place in broken):
        raise ValueError(f"positions beyond the {records} records of {one['what']}")
    return Checked(str(one["what"]), records, checked, broken)
