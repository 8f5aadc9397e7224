"""What every stage's recipe has. Light to import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eva_mim.config import Settings
from eva_mim.data import DataSettings
from eva_mim.engine import RunSettings
from eva_mim.optim import OptimSettings

RUNTIME = {
    "run": ["log_every", "checkpoint_every", "keep_last", "max_rewinds", "device"],
    "data": ["workers", "expected"],
}
"""Settings that no result depends on: a run may be resumed with other values."""


class Recipe(Settings):
    """Settings of one stage. Order of starting: the run's own last checkpoint, else `init_from`, else scratch."""

    init_from: str | None = None
    """Folder of an earlier stage, or a timm-named .safetensors file: the trunk starts from its weights."""
    data: DataSettings
    run: RunSettings
    optim: OptimSettings

    def parents(self) -> dict[str, Path]:
        """Setting -> file or folder that this stage's result depends on."""
        return {} if self.init_from is None else {"init_from": Path(self.init_from)}

    def identity_tree(self) -> dict[str, Any]:
        """The settings that a result depends on; parents stand for their content elsewhere, so their paths are left out."""
        tree = self.model_dump(mode="json", exclude={section: set(names) for section, names in RUNTIME.items()})
        for setting in self.parents():
            *sections, leaf = setting.split(".")
            inner = tree
            for section in sections:
                inner = inner[section]
            inner[leaf] = "(parent)"
        return tree
