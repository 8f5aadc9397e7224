"""Names by which folders and shards of held-out images are recognised."""

from __future__ import annotations

import re
from collections.abc import Iterable

HELD_OUT = re.compile(r"(val|valid|validation|test|testing|dev|eval)([-_.\d].*)?", re.IGNORECASE)
"""Names that folders and shards of held-out images have."""


def looks_held_out(names: Iterable[str]) -> list[str]:
    """Returns the names that folders or shards of held-out images have; none if all have such a name."""
    every = list(names)
    found = [name for name in every if HELD_OUT.fullmatch(name)]
    return found if len(found) < len(every) else []
