"""Records that are not read: `eva-mim data verify` lists them, training and evaluation honour the list (`data.quarantine`).

A listed record is replaced as a broken one would be, by the same sample; it is not counted, and its file is not opened.
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
"""About two million broken records: a larger file is no list of ours."""


class Quarantined(Exception):
    """A record that is not read, with the reason on the list."""


class Fault(NamedTuple):
    """A record that cannot be read."""

    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class Checked(NamedTuple):
    """Result of checking one source: its first `checked` of `records` were decoded, and these are broken, by position."""

    what: str
    records: int
    checked: int
    broken: dict[int, Fault]


class Quarantine:
    """Checked sources by fingerprint: a source that has changed since is not on the list."""

    def __init__(self, path: Path, sources: dict[str, Checked]):
        self.path, self.sources = path, sources

    def reasons(self, source: Source, where: str) -> dict[int, str]:
        """Position -> why it is not read. `where` the source lies is for messages. Raises UserError where the list is about other
        records."""
        known = self.sources.get(source.fingerprint)
        if known is None:
            raise UserError(f"data.quarantine: {self.path} is not about the {len(source)} records in {where} as they are now; "
                            f"make it anew: eva-mim data verify RECIPE --out {self.path}")
        say(f"  data.quarantine: {len(known.broken)} of {len(source)} records in {where} are not read"
            + ("" if known.checked == len(source) else f" ({known.checked} were checked)"))
        return {position: fault.reason for position, fault in known.broken.items()}

    def write(self) -> None:
        """Atomically."""
        sources = {
            name: one._asdict() | {"broken": {str(position): fault._asdict() for position, fault in one.broken.items()}}
            for name, one in self.sources.items()
        }
        write_json(self.path, {"format": FORMAT, "sources": sources})


def read_quarantine(path: Path) -> Quarantine:
    """Raises UserError for a file that is none."""
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
