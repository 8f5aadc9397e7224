"""Any checkpoint under our names: what a conversion and a hand-over start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.core.report import KeyReport
from eva_mim.core.run_folder import HEAD, WEIGHTS
from eva_mim.weights.files.lazy import deferred
from eva_mim.weights.files.read import Checkpoint, open_checkpoint
from eva_mim.weights.files.sidecar import Description, describe
from eva_mim.weights.names.buffers import Rope
from eva_mim.weights.names.eva import TRUNK, Converted, from_eva, from_stage, visual_trunk
from eva_mim.weights.names.families import Family, detect
from eva_mim.weights.names.huggingface import from_transformers
from eva_mim.weights.names.layout import MAX_NAMES
from eva_mim.weights.names.name_tables import outside as is_outside
from eva_mim.weights.names.openai import from_openai, openai_to_timm


@dataclass(frozen=True)
class NamedCheckpoint:
    """A checkpoint, renamed but not read: its tensors are read when they are wanted (`deferred.real`)."""

    checkpoint: Checkpoint
    description: Description
    """What the files beside it say."""
    scheme: str
    """Whose names the file has: "eva", "timm", "open_clip", "openai", "stage" or "transformers"."""
    weights: dict[str, Tensor]
    """A trunk under timm's names, or a whole CLIP model under open_clip's."""
    outside: dict[str, Tensor]
    """What only a masked model has, as in the `head.safetensors` of our stages."""
    report: KeyReport
    family: Family | None
    """Of `weights`; None for an architecture that names and shapes do not tell, such as a convolutional one."""
    unknown: str | None = None
    """Why there is no family."""
    rope: Rope | None = None
    grid: Grid | None = None
    """Of the source, where its tables or its record tell."""

    @property
    def tower(self) -> bool:
        """It is the image tower of a CLIP file, alone."""
        return all(name.startswith("visual.") for name in self.checkpoint)

    def trunk(self) -> Converted:
        """The image tower's timm model. Raises UserError where there is none."""
        return trunk_of(self.weights, self.family)


def trunk_of(weights: dict[str, Tensor], family: Family | None) -> Converted:
    """The timm model inside a CLIP model, or the trunk as it is. Raises UserError where there is none."""
    if family is None or not family.prefix:
        return Converted(weights, KeyReport(loaded=list(weights)))
    return visual_trunk(weights, family) if family.prefix == TRUNK else openai_to_timm(weights, family)


def read_source(path: str | Path, container: str | None = None) -> NamedCheckpoint:
    """Open a checkpoint of any kind (see `open_checkpoint`) under our names; headers and small tables are read.

    Names that are not understood count as timm's of an architecture that is to be named. Raises UserError for what cannot be
    opened, and for an original checkpoint that timm cannot represent.
    """
    opened = open_checkpoint(path, container)
    if len(opened) > MAX_NAMES:
        raise UserError(f"{path}: {len(opened):,} tensors; a model has at most {MAX_NAMES:,}")
    found = describe(opened.path)
    weights, family, unknown = deferred(opened), None, None
    if found.transformers is not None:
        scheme, done = "transformers", from_transformers(weights, found.transformers)
    else:
        try:
            family = detect(weights)
        except UserError as error:
            unknown = str(error)
        scheme = _scheme(family)
        by_scheme: dict[str, Callable[[Mapping[str, Tensor], Family | None], Converted]] = {
            "eva": from_eva, "openai": from_openai, "stage": from_stage
        }
        plain = Converted(weights, KeyReport(loaded=list(weights)))
        done = by_scheme[scheme](weights, family) if scheme in by_scheme else plain
    if unknown is None and done.weights is not weights:
        family = detect(done.weights)
    outside = done.outside or _head_beside(opened.path)
    return NamedCheckpoint(
        opened, found, scheme, done.weights, outside, done.report, family, unknown, done.rope, done.grid or found.grid
    )


def _scheme(family: Family | None) -> str:
    """Where names are both ours and another's, they are ours."""
    schemes = family.schemes if family else ("timm",)
    return next((ours for ours in ("timm", "open_clip") if ours in schemes and "openai" not in schemes), schemes[0])


def _head_beside(path: Path) -> dict[str, Tensor]:
    """The `head.safetensors` of a masked stage, whose trunk is at `path`."""
    head = path.with_name(HEAD)
    if path.name != WEIGHTS or not head.is_file():
        return {}
    found = deferred(open_checkpoint(head))
    return found if "mask_token" in found and all(is_outside(name, ours=True) for name in found) else {}
