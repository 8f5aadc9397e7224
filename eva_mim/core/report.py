"""What became of every tensor of a hand-over or a conversion."""

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
    """Key -> why it is resized, new or ignored, where a conversion says so."""

    def __str__(self) -> str:
        return (
            f"{len(self.loaded)} tensors loaded, {len(self.resized)} resized {_few(self.resized)}, "
            f"{len(self.new)} new {_few(self.new)}, {len(self.ignored)} ignored {_few(self.ignored)}"
        )

    def note(self, into: list[str], name: str, reason: str) -> None:
        """Put a name on one of the lists, with its reason."""
        into.append(name)
        self.reasons[name] = reason

    def plus(self, later: KeyReport) -> KeyReport:
        """This and what a later step did; `loaded` is the later step's to say."""
        return KeyReport(
            later.loaded, self.resized + later.resized, self.new + later.new, self.ignored + later.ignored,
            self.reasons | later.reasons,
        )

    def beside(self, other: KeyReport) -> KeyReport:
        """This and another part of the same model."""
        return replace(self.plus(other), loaded=self.loaded + other.loaded)

    def as_dict(self) -> dict[str, Any]:
        """For the lineage record; reasons only where there are any."""
        return {name: value for name, value in asdict(self).items() if name != "reasons" or value}


def _few(names: list[str]) -> str:
    return f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
