"""eva-mim: frozen vision teachers into students by masked feature prediction. Importing it does nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from eva_mim.weights.adaptors import FeatureModel

__version__ = "0.1.0"


def load(folder: str | Path) -> FeatureModel:
    """Returns the network in the folder of any finished stage, for images in [0, 1]; see `weights.adaptors.FeatureModel`. Raises
    UserError for a folder without one."""
    from eva_mim.weights.adaptors import load as opened

    return opened(folder)
