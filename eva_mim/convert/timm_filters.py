"""timm's own renaming of the original code's checkpoints: a check of our names that is independent of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import beit, eva
from torch import Tensor, nn

from eva_mim.weights.names.eva import TRUNK, text_name
from eva_mim.weights.names.name_tables import TEXT, outside


def under_timms_names(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames weights of the original code by timm's own loaders, for a model of timm, or of open_clip with a timm trunk.

    Tensors that only a masked model has are removed first, so that timm leaves the norm at its place.
    """
    tower: Any = getattr(model, "visual", None)
    trunk = model if tower is None else tower.trunk
    masked = {name for name in weights if outside(name, ours=False)} if "mask_token" in weights else set()
    given = {name: value for name, value in weights.items() if name not in masked and name != "decoder_pos_embed"}
    filters = {eva.Eva: eva.checkpoint_filter_fn, beit.Beit: beit.checkpoint_filter_fn}
    rename = filters.get(type(trunk))
    made: dict[str, Tensor] = dict(given) if rename is None else rename(given, trunk)
    if tower is None:
        return made
    texts = {text_name(name): value for name, value in weights.items() if TEXT.fullmatch(name)}
    return {f"{TRUNK}{name}": value for name, value in made.items()} | texts
