"""Choice of kernels for equal computations: CUDA and CPUs differ in which one is faster."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Strided(nn.Conv2d):
    """A convolution of 1 x 1 with a stride, as one without a stride on the pixels that it looks at.

    oneDNN's gradient of the weights of the strided one, with less than 16 input channels that are last in memory, writes beyond
    its buffer, and is wrong (github.com/uxlfoundation/oneDNN/issues/6035; torch 2.14.1): the stems of FastViT and RepVGG.
    """

    @staticmethod
    def replaces(layer: nn.Conv2d) -> bool:
        """Returns whether a convolution is such a one."""
        few = layer.in_channels // layer.groups < 16
        return few and layer.kernel_size == (1, 1) and layer.stride != (1, 1) and layer.padding in ((0, 0), "valid")

    def forward(self, input: Tensor) -> Tensor:
        """Returns the same as a convolution."""
        down, right = self.stride
        return nn.functional.conv2d(input[:, :, ::down, ::right], self.weight, self.bias, groups=self.groups)


def tune(module: nn.Module, device: Any) -> None:
    """Sets in place which kernels the attention layers of timm and open_clip below `module` use. Results differ by rounding only.

    On CPUs timm's explicit product is 1.3 to 7 times faster in training than the fused kernel. There open_clip's towers compute
    with the sequence as first dimension: otherwise torch's attention layer copies its weights for every token under autocast
    (ViT-L/14 at 224 px in bf16, 8 images: 40 s against 2.4 s). There convolutions of 1 x 1 with a stride, of few channels, become
    `Strided`.
    """
    cuda = getattr(device, "type", device) == "cuda"
    for layer in module.modules():
        if not cuda and type(layer) is nn.Conv2d and Strided.replaces(layer):
            layer.__class__ = Strided
        if isinstance(getattr(layer, "fused_attn", None), bool):
            layer.fused_attn = cuda  # type: ignore[assignment]
        stack = getattr(layer, "resblocks", None)
        if isinstance(getattr(layer, "batch_first", None), bool) and stack is not None:
            layer.batch_first = cuda  # type: ignore[assignment]
            for block in stack:
                block.attn.batch_first = cuda
