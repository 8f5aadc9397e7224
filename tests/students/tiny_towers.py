"""Image towers of a few blocks, registered with timm (open_clip builds towers by name alone), and CLIP students of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vitamin import VitCfg, VitConvCfg, _create_vitamin
from torch import Tensor

from eva_mim.students import ClipSettings
from eva_mim.students.clip import ClipStudent, as_open_clip

PIXELS = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "first_conv": None, "classifier": "head"}
NAMES = ("eva02_of_tests.none", "vit_of_tests.none", "vitamin_of_tests.none")
LARGER = {"vit_of_tests_48.none": {**PIXELS, "input_size": (3, 48, 48)}}
default_cfgs = generate_default_cfgs(dict.fromkeys(NAMES, PIXELS) | LARGER)


@register_model
def eva02_of_tests(pretrained: bool = False, **options: Any) -> Eva:
    """EVA02-CLIP-B's kind of blocks: rotary positions, split projections, gated MLP, norms inside; a grid of 4 x 4."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}
    kind = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "use_rot_pos_emb": True,
            "ref_feat_shape": (4, 4), "global_pool": "token"}  # fmt: skip
    return build_model_with_cfg(Eva, "eva02_of_tests", pretrained, **(size | kind | options))


@register_model
def vit_of_tests(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Plain, a grid of 4 x 4."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return build_model_with_cfg(VisionTransformer, "vit_of_tests", pretrained, **(size | options))


@register_model
def vit_of_tests_48(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """The same at 48 px: a grid of 6 x 6."""
    return vit_of_tests(pretrained, **({"img_size": 48} | options))


@register_model
def vitamin_of_tests(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """ViTamin's convolutional stem before two blocks; a grid of 2 x 2."""
    stem = VitCfg(embed_dim=(8, 8, 16), depths=(1, 1, 1), stem_width=8, head_type="1d",
                  conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6))
    size = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"}
    return _create_vitamin("vitamin_of_tests", pretrained, embed_cfg=stem, **(size | options))


def clip_settings(name: str = "vit_of_tests", **options: Any) -> ClipSettings:
    """A text tower of two blocks, width 8, 9 tokens; a shared space of 12."""
    text = {"width": 8, "layers": 2, "heads": 2, "context_length": 9}
    pool = "token" if name.startswith(("vit_of_tests", "eva02_of_tests")) else "avg"
    return ClipSettings(**{"name": name, "embed_dim": 12, "pool": pool, "text": text} | options)


def clip_folder(folder: Path, student: ClipStudent) -> str:
    """What open_clip needs of a finished clip stage."""
    folder.mkdir(parents=True)
    save_file({n: v.contiguous() for n, v in as_open_clip(student.model.state_dict()).items()},
              folder / "open_clip_model.safetensors")  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(student.open_clip_config()))
    return str(folder)


def pairs(seed: int, count: int = 3, length: int = 9) -> tuple[Tensor, Tensor]:
    """uint8 images of 32 px and captions of 2 to `length` tokens that end in the highest one."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.zeros(count, length, dtype=torch.long)
    for row in range(count):
        words = 2 + row % (length - 2)
        texts[row, :words] = torch.randint(1, 40000, (words,), generator=generator)
        texts[row, words] = 49407
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator), texts


def random_clip(folder: Path) -> Path:
    """A CLIP model of our smallest ViT with random weights, in a folder as a stage leaves it."""
    torch.manual_seed(3)
    text = {"width": 16, "layers": 2, "heads": 2, "context_length": 12}
    settings = ClipSettings.model_validate({"name": "vit_nano_patch4_32", "embed_dim": 16, "pool": "avg", "text": text})
    return Path(clip_folder(folder, ClipStudent(settings).eval()))
