"""What a masked stage's student says in the words of its teachers, with torch, timm and safetensors alone.

    python heads_in_plain_torch.py RUN IMAGE [TEACHER]

RUN is the folder of a finished masked stage: `config.json` and `model.safetensors` are timm's, `heads.json` says what the heads
in `head.safetensors` are made of. Normalisers are folded into the heads: their outputs are in the teachers' own spaces.
"""

import json
import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from torchvision.transforms.functional import to_tensor


def norm(x, weights, name):
    """A layer norm."""
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def linear(x, weights, name):
    """A linear layer."""
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def attention(x, weights, name, heads=16):
    """A transformer block of an attention head."""
    rows = norm(x, weights, f"{name}.norm1")
    parts = linear(rows, weights, f"{name}.attn.qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
    x = x + weights[f"{name}.ls1.gamma"] * linear(mixed, weights, f"{name}.attn.proj")
    hidden = F.gelu(linear(norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1"))
    return x + weights[f"{name}.ls2.gamma"] * linear(hidden, weights, f"{name}.mlp.fc2")


def head(x, weights, name, kind, blocks):
    """A head on rows [..., D]; `attention` is for all tokens of an image."""
    if kind == "linear":
        return linear(x, weights, name)
    if kind == "mlp":
        return linear(F.gelu(norm(linear(x, weights, f"{name}.0"), weights, f"{name}.1")), weights, f"{name}.3")
    x = linear(x, weights, f"{name}.first")
    for number in range(blocks):
        block = f"{name}.blocks.{number}"
        x = x + linear(F.gelu(norm(x, weights, f"{block}.0")), weights, f"{block}.2")
    return linear(F.gelu(norm(x, weights, f"{name}.last.0")), weights, f"{name}.last.2")


@torch.no_grad()
def features(folder, images, teacher):
    """Returns summary [B, C'] (None without one) and patches [B, N, C] (None without) of [B, 3, H, W] images from 0 to 1."""
    folder = Path(folder)
    trunk = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    weights, made = load_file(folder / "head.safetensors"), json.loads((folder / "heads.json").read_text())
    facts, prefix = made["teachers"][teacher], trunk.num_prefix_tokens
    kind, blocks, fine = (facts["head"][name] for name in ("kind", "blocks", "upsample"))
    name = "head" if made["single"] else f"head.{teacher}"
    mean, std = (torch.tensor(trunk.pretrained_cfg[part]).view(-1, 1, 1) for part in ("mean", "std"))
    tokens = trunk.forward_features((images - mean) / std)
    summary = patches = None
    if facts["summary"]:
        place = facts["class_token"]
        read = tokens[:, prefix:].mean(1) if place < 0 else tokens[:, place]
        summary = head(read, weights, f"summary_{name}", "mlp_v2" if kind == "attention" else kind, blocks)
    if facts["spatial"]:
        if kind == "attention":
            for number in range(2):
                tokens = attention(tokens, weights, f"{name}.mixing.{number}")
            name = f"{name}.rows"
        patches = head(tokens[:, prefix:], weights, name, kind, blocks)
        if fine > 1:  # each patch says fine x fine cells: they are put in their places
            rows, columns = trunk.patch_embed.grid_size
            cells = patches.unflatten(1, (rows, columns)).unflatten(-1, (fine, fine, -1))
            patches = cells.transpose(2, 3).flatten(1, 4)
    return summary, patches


def zeroshot(folder, images, teacher):
    """Returns cosines [B, K] with the classes of the run, for a CLIP teacher that `evaluate.zeroshot` named."""
    summary, _ = features(folder, images, teacher)
    return F.normalize(summary, dim=-1) @ load_file(Path(folder) / "zeroshot.safetensors")[teacher].T


if __name__ == "__main__":
    run, image, *chosen = sys.argv[1:]
    known = json.loads((Path(run) / "heads.json").read_text())["teachers"]
    side = json.loads((Path(run) / "config.json").read_text())["pretrained_cfg"]["input_size"][-1]
    picture = to_tensor(Image.open(image).convert("RGB").resize((side, side), Image.Resampling.BICUBIC))[None]
    for one in chosen or known:
        said = features(run, picture, one)
        shapes = [None if part is None else tuple(part.shape) for part in said]
        sys.stdout.write(f"{one} summary {shapes[0]} patches {shapes[1]}\n")
