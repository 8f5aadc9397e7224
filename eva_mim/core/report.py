"""Report of the tensors of a hand-over or a conversion: loaded, resized, new or ignored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass
class KeyReport:
    """Every key of a hand-over or a conversion, in one of four lists."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    """Reason by key why it is resized, new or ignored; for conversions."""

    def __str__(self) -> str:
        others = [("resized", self.resized), ("new", self.new), ("ignored", self.ignored)]
        return ", ".join([f"{len(self.loaded)} tensors loaded", *(f"{len(names)} {what}{_few(names)}" for what, names in others)])

    def note(self, into: list[str], name: str, reason: str) -> None:
        """Appends a name to one of the lists, and records its reason."""
        into.append(name)
        self.reasons[name] = reason

    def plus(self, later: KeyReport) -> KeyReport:
        """Returns the report of this step followed by a later one: `loaded` of the later step, all other lists joined."""
        return KeyReport(
            later.loaded, self.resized + later.resized, self.new + later.new, self.ignored + later.ignored,
            self.reasons | later.reasons,
        )

    def beside(self, other: KeyReport) -> KeyReport:
        """Returns the report of this part of a model together with another part: all lists are joined."""
        return replace(self.plus(other), loaded=self.loaded + other.loaded)

    def as_dict(self) -> dict[str, Any]:
        """Returns the lists by name, for the lineage record; `reasons` only if there are any."""
        return {name: value for name, value in asdict(self).items() if name != "reasons" or value}


def _few(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
