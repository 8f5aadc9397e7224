"""Initialisation of a student without `init_from`: the laws of the original code.

All numbers are drawn from torch's global generator. Each law sets biases of linear layers to 0, and weights and biases of norms
to 1 and 0; LayerScale and tables of relative positions keep timm's initialisation, and fixed positions do not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eva_mim.core.errors import UserError
from eva_mim.students import InitSettings

TOKENS = {"pos_embed", "cls_token", "reg_token", "mask_token"}

Draw = Callable[[Tensor], Any]


@torch.no_grad()
def initialise(student: nn.Module, settings: InitSettings) -> None:
    """Initialises trunk, heads, mask token and decoder of a student in place, by `settings.law`; "timm" changes nothing. Raises
    UserError for blocks of an unknown kind."""
    if settings.law == "eva01":
        eva01(student, settings.std)
    elif settings.law == "eva02":
        eva02(student, settings.std)
    elif settings.law == "mae":
        mae(student)


def eva01(student: nn.Module, std: float) -> None:
    """Draws weights from a normal distribution truncated at one standard deviation; output projections of attention and MLP in
    block l (from 1) are divided by sqrt(2 l) (EVA-01/eva/modeling_pretrain.py)."""
    cut_normal = _cut_normal(std)
    _draw(student, linear=cut_normal, token=cut_normal)
    for module in student.modules():
        if isinstance(module, nn.Conv2d):
            cut_normal(module.weight)
            if module.bias is not None:
                module.bias.zero_()
    for number, block in enumerate(_blocks(student), start=1):
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.div_(math.sqrt(2 * number))


def eva02(student: nn.Module, std: float) -> None:
    """Draws linear weights by Xavier's normal law, the patch kernel by Xavier's uniform law, tokens truncated normal. In blocks
    with a norm inside their MLP (sub-LN), linear layers except query and key are multiplied by sqrt(ln(2 depth))
    (EVA-02/asuka/modeling_pretrain.py)."""
    _draw(student, linear=nn.init.xavier_normal_, token=_cut_normal(std))
    _draw_flat_kernel(student)
    blocks = _blocks(student)
    for block in blocks:
        if isinstance(block.mlp.norm, nn.LayerNorm):
            for name, parameter in block.named_parameters():
                if name.startswith(("mlp.fc", "attn.proj.", "attn.v_proj.")):
                    parameter.mul_(math.sqrt(math.log(2 * len(blocks))))


def mae(student: nn.Module) -> None:
    """Draws weights by Xavier's uniform law, and tokens normal with std 0.02 (EVA-01/eva/modeling_mae_pretrain.py)."""
    _draw(student, linear=nn.init.xavier_uniform_, token=lambda token: nn.init.normal_(token, std=0.02))
    _draw_flat_kernel(student)


def _draw(student: nn.Module, *, linear: Draw, token: Draw) -> None:
    for module in student.modules():
        if isinstance(module, nn.Linear):
            linear(module.weight)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    for name, parameter in student.named_parameters():
        if name.rpartition(".")[2] in TOKENS and parameter.requires_grad:
            token(parameter)


def _cut_normal(std: float) -> Draw:
    return lambda tensor: nn.init.trunc_normal_(tensor, std=std, a=-std, b=std)


def _draw_flat_kernel(student: nn.Module) -> None:
    """Draws the patch kernel as the weight of a linear layer; its bias keeps the default of torch, as in EVA-02 and MAE."""
    for module in student.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))


def _blocks(student: nn.Module) -> list[Any]:
    trunk: Any = student.trunk
    blocks = list(trunk.blocks)
    if not all(hasattr(block, "attn") and hasattr(block, "mlp") for block in blocks):
        raise UserError(f"student.init.law: blocks of type {type(blocks[0]).__name__} have no such law; set it to timm or mae")
    return blocks
