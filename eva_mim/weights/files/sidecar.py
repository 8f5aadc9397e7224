"""What the files beside a checkpoint say about it. Plain values only; types are checked, and nothing is believed to be there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eva_mim.core.run_folder import CLIP_CONFIG, HEAD, LINEAGE, TIMM_CONFIG
from eva_mim.weights.files.formats import read_json
from eva_mim.weights.files.read import FOLDER_FILES, MODULE_FILE

MAX_DESCRIPTION = 10_000_000
"""Bytes of a config.json or lineage.json; one with the names of 21,841 classes has 1,000,000."""
STANDARD = (*FOLDER_FILES, MODULE_FILE, HEAD)
"""Names of weight files that a folder is made for."""
MAX_BATCH = 250
"""Images in one forward pass of an evaluation, at most."""
INSIDE_A_RUN = ("step-", "checkpoints", "ema")
"""Folders of a run: its record lies above them."""


@dataclass(frozen=True)
class Description:
    """Content of the files, by what they are for; empty where there is none."""

    config: dict[str, Any] = field(default_factory=dict)
    """config.json: timm's (and our stages'), or transformers'."""
    open_clip: dict[str, Any] = field(default_factory=dict)
    """open_clip_config.json."""
    preprocessor: dict[str, Any] = field(default_factory=dict)
    """preprocessor_config.json of transformers."""
    record: dict[str, Any] = field(default_factory=dict)
    """lineage.json of one of our stages."""

    @property
    def architecture(self) -> str | None:
        """timm's name."""
        return text(self.config, "architecture")

    @property
    def transformers(self) -> dict[str, Any] | None:
        """The configuration of a model of transformers."""
        return self.config if text(self.config, "model_type") and self.architecture is None else None

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of a stage's position table."""
        rows, columns = number(self.record, "grid", 0), number(self.record, "grid", 1)
        return (int(rows), int(columns)) if rows and columns else None


def describe(path: Path) -> Description:
    """Of a checkpoint's folder, or of the folder that its file lies in. Raises UserError for damaged JSON."""
    if path.is_file() and path.name not in STANDARD:
        return Description()  # a file among others: what lies beside it may belong to another
    home = path if path.is_dir() else path.parent
    run = home
    while run.name.startswith(INSIDE_A_RUN) and run != run.parent:
        run = run.parent
    return Description(
        config=_read(home / TIMM_CONFIG) or _read(run / TIMM_CONFIG),
        open_clip=_read(home / CLIP_CONFIG),
        preprocessor=_read(home / "preprocessor_config.json"),
        record=_read(run / LINEAGE),
    )


def at(tree: Any, *names: str | int) -> Any:
    """What stands at a path of keys and indices; None where it breaks off."""
    for name in names:
        if isinstance(tree, dict):
            tree = tree.get(name)
        elif isinstance(tree, list) and isinstance(name, int) and name < len(tree):
            tree = tree[name]
        else:
            return None
    return tree


def text(tree: Any, *names: str | int) -> str | None:
    """A text at a path, at most 200 characters."""
    value = at(tree, *names)
    return value[:200] if isinstance(value, str) else None


def number(tree: Any, *names: str | int) -> float | None:
    """A number at a path."""
    value = at(tree, *names)
    return value if type(value) in (int, float) and abs(value) < 1e18 else None


def precision_of(found: Description) -> str:
    """In which a run of ours computed; fp32 for anything else."""
    return text(found.record, "settings", "run", "precision") or "fp32"


def batch_of(found: Description) -> int:
    """Images that went through a network of ours at once; 64 for anything else."""
    places = (("computed", "micro_batch"), ("settings", "run", "micro_batch"), ("settings", "run", "global_batch"))
    batch = next((size for place in places if (size := number(found.record, *place))), None)
    return min(MAX_BATCH, int(batch or 64))


def _read(path: Path) -> dict[str, Any]:
    tree = read_json(path, MAX_DESCRIPTION) if path.is_file() else {}
    return tree if isinstance(tree, dict) else {}
