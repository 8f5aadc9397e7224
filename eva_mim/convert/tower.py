"""A masked stage's trunk or adaptor as a vision tower of transformers.

Importing this file makes the tower known to transformers: `AutoModel.from_pretrained(FOLDER)` then opens what `eva-mim convert
--to hf --adaptors NAME` wrote, and LLaVA and its relatives build it from their `vision_config`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from eva_mim.weights.adaptors import BACKBONE, FeatureModel, HeadsFacts, Output, described


class TowerConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Sizes of a tower, and what its network is built from."""

    model_type = "eva_mim_tower"

    timm: dict[str, Any] | None = None
    """The stage's config.json, as timm reads it."""
    heads: dict[str, Any] | None = None
    """The stage's heads.json, of which only the adaptor's heads are built; None for a stage without."""
    adaptor: str = BACKBONE
    """Name of the teacher whose features the tower says; "backbone": the trunk's own."""
    hidden_size: int = 0
    """Width of the patches' features."""
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3


class Tower(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The features of one teacher, or of the trunk, as the only hidden state of a vision tower: one token for each patch. In
    LLaVA that is vision_feature_layer=-1 with vision_feature_select_strategy="full"."""

    config_class = TowerConfig
    base_model_prefix = "tower"
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: TowerConfig):
        super().__init__(config)
        self.features: FeatureModel = described(config.timm or {}, None if config.heads is None else HeadsFacts(**config.heads))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        # Weights come from the file. Tables that it does not have (rotary positions) are computed again, since transformers
        # builds a model without values.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # type: ignore[operator]

    def forward(self, pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        """Returns patches [B, N, C] and summary [B, C'] of normalised images [B, channels, H, W]."""
        name = self.config.adaptor
        found: Output = self.features.encode(pixel_values, [name] if name != BACKBONE else [])[name]
        return BaseModelOutputWithPooling(
            last_hidden_state=found.spatial, pooler_output=found.summary, hidden_states=(found.spatial,))


AutoConfig.register(TowerConfig.model_type, TowerConfig, exist_ok=True)
AutoModel.register(TowerConfig, Tower, exist_ok=True)
