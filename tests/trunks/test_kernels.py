"""Another choice of kernels computes the same."""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import nn

import eva_mim.trunks.small  # noqa: F401  (registers vit_nano_patch4_32)
from eva_mim.trunks.kernels import tune


def tower(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A small open_clip tower or timm trunk, and an input for it."""
    torch.manual_seed(0)
    if kind == "vision":
        made = VisionTransformer(
            image_size=28, patch_size=7, width=32, layers=2, heads=4, mlp_ratio=2.0, output_dim=16, act_layer=nn.GELU
        )
        return made.eval(), torch.randn(3, 3, 28, 28)
    if kind == "text":
        text = TextTransformer(context_length=9, vocab_size=50, width=32, heads=4, layers=2, output_dim=16)
        return text.eval(), torch.randint(1, 50, (3, 9))
    return timm.create_model("vit_nano_patch4_32", num_classes=5).eval(), torch.randn(3, 3, 32, 32)


@pytest.mark.parametrize("kind", ["vision", "text", "timm"])
def test_what_a_network_says_and_learns_does_not_change(kind: str) -> None:
    found = []
    for device in ("cuda", "cpu"):  # the choice alone; nothing moves
        network, given = tower(kind)
        tune(network, device)
        output = network(given)
        output.square().sum().backward()
        grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found.append((output.detach(), grads))
    (one, grads), (other, others) = found
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        assert (grad - others[name]).abs().max() < 1e-4 * grad.abs().max() + 1e-6, name


def test_the_sequence_goes_first_on_a_cpu_and_the_batch_on_cuda() -> None:
    """Whole stacks at once: a block that is asked for the other order would mix up images and tokens."""
    model = open_clip.CustomTextCLIP(
        8, open_clip.CLIPVisionCfg(layers=1, width=64, patch_size=14, image_size=28),
        open_clip.CLIPTextCfg(context_length=9, vocab_size=50, width=64, heads=2, layers=1),
    )
    for device, batch_first in (("cpu", False), ("cuda", True)):
        tune(model, device)
        layers = [layer for layer in model.modules() if isinstance(layer, nn.MultiheadAttention)]
        assert len(layers) == 2
        assert {layer.batch_first for layer in layers} == {batch_first}
        assert {stack.batch_first for stack in (model.visual.transformer, model.text.transformer)} == {batch_first}
