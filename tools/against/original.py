"""The original EVA-01 pre-training on a CPU, in this process, from a folder that holds its code.

    python -m tools.against.original FOLDER STUDENT fp32|bf16 live|given [ARGUMENT of run_eva_pretraining.py ...]

Its own program runs, with its own data, masks, networks, loss, optimizer and log lines. Stand-ins take the place of what newer
libraries and this environment do not have, of CUDA's calls, and of the weights that it would download. `given`: a random tensor
takes the place of the teacher's features.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

GRID = 16
"""Patches along a side: 224 px / 14 px."""


class Student(NamedTuple):
    """Sizes of a student of 12 blocks, with heads of 64 and an MLP of 4 widths."""

    timm: str
    """timm's architecture of these sizes."""
    width: int
    heads: int


STUDENTS = {"ti": Student("vit_tiny_patch16_224", 192, 3), "b": Student("vit_base_patch16_224", 768, 12)}
FEATURES = 768
"""Width of CLIP L/14's shared space."""


def stand_in(precision: str) -> None:
    """Puts into place what the original asks for and a CPU or a newer library does not have."""
    import numpy as np
    import packaging.version
    import torch

    class Scaler(torch.amp.GradScaler):
        """Scales nothing, as bf16 and fp32 need it."""

        def __init__(self) -> None:
            super().__init__("cpu", enabled=False)

        def state_dict(self) -> dict[str, Any]:
            return {"scale": 1.0}

    modules: dict[str, dict[str, Any]] = {"torch._six": {"inf": float("inf")}, "tensorboardX": {"SummaryWriter": None}, "sh": {},
                                          "pkg_resources": {"packaging": packaging}}
    for name, content in modules.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    for module, optimizer in (("nadam", "Nadam"), ("radam", "RAdam")):  # imported, and not used
        vars(import_module(f"timm.optim.{module}"))[optimizer] = None
    vars(np).update(int=int)
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    vars(torch.cuda.amp).update(autocast=autocast, GradScaler=Scaler)
    vars(torch.cuda).update(synchronize=lambda: None)
    group = import_module("torch.distributed")
    group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)


def main() -> None:
    """Run the original program with the arguments of the command line."""
    folder, name, precision, targets, *arguments = sys.argv[1:]
    sys.path.insert(0, folder)
    stand_in(precision)
    program, networks, clip = (import_module(module) for module in ("run_eva_pretraining", "modeling_pretrain", "clip"))
    import torch

    def student(args: Any) -> Any:
        return networks.VisionTransformerForMaskedImageModeling(
            patch_size=14, embed_dim=STUDENTS[name].width, depth=12, num_heads=STUDENTS[name].heads, img_size=args.input_size,
            drop_path_rate=args.drop_path, predict_feature_dim=args.teacher_out_feat_dim,
            norm_layer=partial(networks.LayerNormWithForceFP32, eps=1e-6),
        )

    def teacher(*_: Any, **__: Any) -> Any:
        model = import_module("clip.model").CLIP(
            embed_dim=FEATURES, image_resolution=224, vision_layers=24, vision_width=1024, vision_patch_size=14,
            context_length=2, vocab_size=2, transformer_width=64, transformer_heads=1, transformer_layers=1,  # no text is read
        )
        return model.eval(), None

    class Given(torch.nn.Module):
        """In the teacher's place: features [B, N, C] drawn once."""

        def __init__(self, **_: Any) -> None:
            super().__init__()
            self.net = SimpleNamespace(visual=SimpleNamespace(output_dim=FEATURES))
            self.features = torch.randn(1, GRID**2, FEATURES)

        def infer_image(self, features: dict[str, Any]) -> torch.Tensor:
            return self.features.expand(len(features["image"][0]), -1, -1)

    vars(program).update({"get_model": student} | ({"CLIPWrapper": Given} if targets == "given" else {}))
    vars(clip).update(load=teacher)
    sys.argv = ["run_eva_pretraining.py", *arguments]
    program.main(*program.get_args())


if __name__ == "__main__":
    main()
