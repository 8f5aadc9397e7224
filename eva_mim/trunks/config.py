"""The `config.json` in a folder of weights that timm opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from eva_mim.trunks.small import known_to_timm

RESIZING = {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
"""How held-out images are brought to size, as our stages and open_clip do it, under timm's names."""


def timm_config(
    name: str,
    trunk: nn.Module,
    arguments: Mapping[str, Any],
    *,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: int = 0,
    labels: Sequence[str] | None = None,
    resizing: Mapping[str, Any] = RESIZING,
) -> dict[str, Any]:
    """Returns the `config.json` with which `timm.create_model("local-dir:FOLDER", pretrained=True)` builds and opens a trunk.

    `arguments` are the keywords of `timm.create_model` besides `num_classes`; `trunk` is the model that they build (the meta
    device suffices); `image_size` is (height, width) in pixels; `mean` and `std` have one value per channel; `labels` are the
    names of the classes, in the order of the head's rows; `resizing` are those of the values of RESIZING that differ.
    """
    name, arguments = known_to_timm(name, arguments)
    pretrained: Any = trunk.pretrained_cfg
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": num_classes,
        "num_features": trunk.num_features,
        "model_args": dict(arguments),
        "pretrained_cfg": {
            "input_size": [len(mean), *image_size],
            "num_classes": num_classes,
            "mean": list(mean),
            "std": list(std),
            **RESIZING,
            **resizing,
            # Older versions of timm initialise the layer `first_conv` anew if its kernel has other channels than RGB.
            "first_conv": pretrained.get("first_conv") if len(mean) == 3 else None,
            "classifier": pretrained.get("classifier"),
            "pool_size": pretrained.get("pool_size"),
        },
    }
    return config | ({"label_names": list(labels)} if labels else {})
