"""Any checkpoint under our names, as conversions and hand-overs take it."""

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
from eva_mim.weights.names.wrappers import unwrapped


@dataclass(frozen=True)
class NamedCheckpoint:
    """A renamed checkpoint; its tensors stay in their file until their values are used (`lazy.materialise`)."""

    checkpoint: Checkpoint
    description: Description
    """Content of the configuration files beside the checkpoint."""
    scheme: str
    """Naming scheme of the file: "eva", "timm", "open_clip", "openai", "stage" or "transformers"."""
    weights: dict[str, Tensor]
    """A trunk under timm's names, or a whole CLIP model under open_clip's."""
    outside: dict[str, Tensor]
    """Tensors of a masked model outside its trunk, as in the `head.safetensors` of our stages."""
    report: KeyReport
    family: Family | None
    """Family of `weights`; None for an architecture that names and shapes do not determine, such as a convolutional one."""
    unknown: str | None = None
    """Reason for `family` None."""
    rope: Rope | None = None
    grid: Grid | None = None
    """Patch grid of the source, from its tables or its lineage record; None if unknown."""

    @property
    def tower(self) -> bool:
        """True for the image tower of a CLIP file, alone."""
        return all(name.startswith("visual.") for name in self.checkpoint)

    def trunk(self) -> Converted:
        """Returns the image tower's timm model. Raises UserError if there is none."""
        return trunk_of(self.weights, self.family)


def trunk_of(weights: dict[str, Tensor], family: Family | None) -> Converted:
    """Returns the timm model inside a CLIP model, or a bare trunk as it is. Raises UserError if there is none."""
    if family is None or not family.prefix:
        return Converted(weights, KeyReport(loaded=list(weights)))
    return visual_trunk(weights, family) if family.prefix == TRUNK else openai_to_timm(weights, family)


def read_source(path: str | Path, container: str | None = None) -> NamedCheckpoint:
    """Opens a checkpoint of any format (see `open_checkpoint`) under our names; reads headers and small tables alone.

    Unknown names are taken for timm's names of an architecture that the caller must name. Raises UserError for a checkpoint that
    cannot be opened, and for an original one that timm cannot represent.
    """
    opened = open_checkpoint(path, container)
    if len(opened) > MAX_NAMES:
        raise UserError(f"{path}: {len(opened):,} tensors; a model has at most {MAX_NAMES:,}")
    found = describe(opened.path)
    weights, family, unknown = deferred(opened), None, None
    beside: list[str] = []
    if found.transformers is not None:
        scheme, done = "transformers", from_transformers(weights, found.transformers)
    else:
        weights, prefix, beside = unwrapped(weights)
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
    for name in beside:
        done.report.note(done.report.ignored, name, f"beside the model below {prefix}")
    outside = done.outside or _head_beside(opened.path)
    return NamedCheckpoint(
        opened, found, scheme, done.weights, outside, done.report, family, unknown, done.rope, done.grid or found.grid
    )


def _scheme(family: Family | None) -> str:
    """Returns the naming scheme of a file; names that are both ours and another scheme's count as ours."""
    schemes = family.schemes if family else ("timm",)
    return next((ours for ours in ("timm", "open_clip") if ours in schemes and "openai" not in schemes), schemes[0])


def _head_beside(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of the `head.safetensors` beside the trunk of a masked stage at `path`; empty if there is none."""
    head = path.with_name(HEAD)
    if path.name != WEIGHTS or not head.is_file():
        return {}
    found = deferred(open_checkpoint(head))
    return found if "mask_token" in found and all(is_outside(name, ours=True) for name in found) else {}
