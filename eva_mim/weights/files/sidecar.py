"""Configuration files beside a checkpoint. Values are plain, their types are checked, and every file and key may be missing."""

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
"""Names of weight files that own the folder in which they lie."""
MAX_BATCH = 250
"""Largest number of images in one forward pass of an evaluation."""
INSIDE_A_RUN = ("step-", "checkpoints", "ema")
"""Names of folders inside a run, whose lineage.json lies above them."""


@dataclass(frozen=True)
class Description:
    """The content of the files beside a checkpoint; a missing file is an empty dict."""

    config: dict[str, Any] = field(default_factory=dict)
    """config.json of timm (and of our stages), or of transformers."""
    open_clip: dict[str, Any] = field(default_factory=dict)
    """open_clip_config.json."""
    preprocessor: dict[str, Any] = field(default_factory=dict)
    """preprocessor_config.json of transformers."""
    record: dict[str, Any] = field(default_factory=dict)
    """lineage.json of one of our stages."""

    @property
    def architecture(self) -> str | None:
        """timm's name of the architecture."""
        return text(self.config, "architecture")

    @property
    def transformers(self) -> dict[str, Any] | None:
        """The configuration of a model of transformers; None if config.json is timm's or missing."""
        return self.config if text(self.config, "model_type") and self.architecture is None else None

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of patches in a stage's position table."""
        rows, columns = number(self.record, "grid", 0), number(self.record, "grid", 1)
        return (int(rows), int(columns)) if rows and columns else None


def describe(path: Path) -> Description:
    """Returns the configuration files of a checkpoint's folder, or of the folder around its file. Raises UserError for damaged
    JSON."""
    if path.is_file() and path.name not in STANDARD:
        return Description()  # in a folder of several files, the configurations may belong to another one
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
    """Returns the value at a path of keys and indices, or None if the path ends early."""
    for name in names:
        if isinstance(tree, dict):
            tree = tree.get(name)
        elif isinstance(tree, list) and isinstance(name, int) and name < len(tree):
            tree = tree[name]
        else:
            return None
    return tree


def text(tree: Any, *names: str | int) -> str | None:
    """Returns the text at a path, at most 200 characters; None if the value is no text."""
    value = at(tree, *names)
    return value[:200] if isinstance(value, str) else None


def number(tree: Any, *names: str | int) -> float | None:
    """Returns the number at a path; None if the value is no number."""
    value = at(tree, *names)
    return value if type(value) in (int, float) and abs(value) < 1e18 else None


def batch_of(found: Description) -> int:
    """Returns the number of images per forward pass in a run of ours; 64 for other checkpoints."""
    places = (("computed", "micro_batch"), ("settings", "run", "micro_batch"), ("settings", "run", "global_batch"))
    batch = next((size for place in places if (size := number(found.record, *place))), None)
    return min(MAX_BATCH, int(batch or 64))


def _read(path: Path) -> dict[str, Any]:
    tree = read_json(path, MAX_DESCRIPTION) if path.is_file() else {}
    return tree if isinstance(tree, dict) else {}
