"""The original code's checkpoints read by timm itself: a second opinion on our names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import beit, eva
from torch import Tensor, nn

from eva_mim.weights.names.eva import TRUNK, text_name
from eva_mim.weights.names.name_tables import TEXT, outside


def under_timms_names(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of the original code for a model of timm's, or of open_clip's around one, as timm's own loaders rename them.

    What only a masked model has is left out first, so that the norm stays where it is.
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
