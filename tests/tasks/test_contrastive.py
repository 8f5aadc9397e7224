"""Contrastive losses against open_clip's own on the undivided batch, against loops, and over two real processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss, SigLipLoss
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from eva_mim.core.distributed import rank, world_size
from eva_mim.tasks import ContrastiveSettings
from eva_mim.tasks.contrastive import Contrastive
from tests.ranks import on_ranks

PAIRS, WIDTH = 12, 10
NAMES = ("image", "text", "scale", "bias")


def said(kind: str) -> list[Tensor]:
    """What a student says of PAIRS pairs; the bias only with "siglip"."""
    generator = torch.Generator().manual_seed(4)
    text = normalize(torch.randn(PAIRS, WIDTH, generator=generator), dim=1)
    image = normalize(text + 0.5 * torch.randn(PAIRS, WIDTH, generator=generator), dim=1)
    tensors = [image, text, torch.tensor(14.0)] + ([torch.tensor(-3.0)] if kind == "siglip" else [])
    return [tensor.requires_grad_() for tensor in tensors]


def reference(kind: str) -> tuple[float, list[Tensor]]:
    """open_clip's loss of the undivided batch, and its gradients."""
    tensors = said(kind)
    loss = (SigLipLoss() if kind == "siglip" else ClipLoss())(*tensors)
    return loss.item(), list(torch.autograd.grad(loss, tensors))


def same(mine: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("chunk", [None, 1, 5, 12, 99])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_losses_and_gradients_are_open_clips(kind: Any, chunk: int | None) -> None:
    loss, gradients = reference(kind)
    tensors = said(kind)
    output = Contrastive(ContrastiveSettings(kind=kind, chunk=chunk))(*tensors)
    assert loss > 0.1
    assert output.loss.item() == pytest.approx(loss, abs=1e-6)
    for mine, expected in zip(torch.autograd.grad(output.loss, tensors), gradients, strict=True):
        same(mine, expected)
    metrics = {name: value.item() for name, value in output.metrics.items()}
    assert metrics == {"logit_scale": 14.0} | ({"logit_bias": -3.0} if kind == "siglip" else {})


def test_the_sigmoid_loss_is_the_papers_loop() -> None:
    """-1/B sum over all pairs of log sigmoid(z (t x y + b)), z = 1 for partners and -1 for others, in float64."""
    image, text, scale, bias = (tensor.tolist() for tensor in said("siglip"))
    total = 0.0
    for i, x in enumerate(image):
        for j, y in enumerate(text):
            logit = scale * math.fsum(a * b for a, b in zip(x, y, strict=True)) + bias
            total += math.log1p(math.exp(-logit if i == j else logit))
    output = Contrastive(ContrastiveSettings(kind="siglip", chunk=5))(*said("siglip"))
    assert output.loss.item() == pytest.approx(total / PAIRS, abs=1e-6)


@pytest.mark.parametrize("name", ["clip_eva01_g", "clip_eva02_b", "clip_eva01_b_layerscale"])
def test_the_loss_of_the_original_codes_logits(shared: Path, name: str) -> None:
    """Both cross entropies summed number by number over the golden logits, against the loss of the golden features. The
    fixtures have more texts than images; the first ones are taken as the partners."""
    golden = load_file(shared / "golden" / f"{name}.safetensors")
    logits = golden["out/logits_per_image"].double().tolist()
    pairs = range(len(logits))
    total = 0.0
    for i in pairs:
        total += math.log(math.fsum(math.exp(logits[i][j]) for j in pairs)) - logits[i][i]
        total += math.log(math.fsum(math.exp(logits[j][i]) for j in pairs)) - logits[i][i]
    image, text = golden["out/image_features"], golden["out/text_features"][: len(logits)]
    output = Contrastive()(image, text, golden["state_dict/logit_scale"].exp())
    assert output.loss.item() == pytest.approx(total / 2 / len(logits), abs=1e-5)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at its result."""
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_chunks_bound_the_memory_of_logits(kind: Any) -> None:
    """Forward and backward; and what autograd keeps between them grows with no chunk."""
    pairs, width, chunk = 256, 8, 16
    largest, kept = {}, {}
    for rows in (None, chunk):
        image, text = (torch.randn(pairs, width).requires_grad_() for _ in range(2))
        with Largest() as seen:
            before: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, b=before: (b.append(t.numel()), t)[1], lambda t: t):
                loss = Contrastive(ContrastiveSettings(kind=kind, chunk=rows))(
                    image, text, torch.tensor(1.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
                ).loss
            loss.backward()
        largest[rows], kept[rows] = seen.elements, max(before, default=0)
    assert largest[None] == kept[None] == pairs * pairs
    assert largest[chunk] == chunk * pairs
    assert kept[chunk] < chunk * pairs


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_it_is_fp32_inside_autocast(kind: Any, chunk: int | None) -> None:
    loss, gradients = reference(kind)
    tensors = said(kind)
    with torch.autocast("cpu", torch.bfloat16):
        output = Contrastive(ContrastiveSettings(kind=kind, chunk=chunk))(*tensors)
    assert output.loss.item() == pytest.approx(loss, abs=1e-6)
    for mine, expected in zip(torch.autograd.grad(output.loss, tensors), gradients, strict=True):
        same(mine, expected)


@pytest.mark.slow
def test_the_mean_of_two_ranks_is_the_undivided_batch() -> None:
    """Real gloo. A rank's gradients by its own rows are those of the sum of both losses: with the mean over ranks that engines
    take, half of them is the undivided batch's gradient."""
    ranks = on_ranks(2, rows_of_this_rank)
    for kind in ("clip", "siglip"):
        loss, gradients = reference(kind)
        for chunk in (None, 4):
            at = f"{kind}/{chunk}/"
            assert (ranks[0][at + "loss"] + ranks[1][at + "loss"]).item() / 2 == pytest.approx(loss, abs=1e-6)
            for name, expected in zip(NAMES, gradients, strict=False):
                parts = [found[at + name] for found in ranks]
                same(torch.cat(parts) / 2 if name in ("image", "text") else sum(parts) / 2, expected)  # type: ignore[arg-type]


def rows_of_this_rank() -> dict[str, Tensor]:
    """Losses and gradients of one rank's rows of the batch."""
    found: dict[str, Tensor] = {}
    for kind in ("clip", "siglip"):
        for chunk in (None, 4):
            image, text, *scalars = said(kind)
            rows = slice(rank() * PAIRS // world_size(), (rank() + 1) * PAIRS // world_size())
            own = [image.detach()[rows].requires_grad_(), text.detach()[rows].requires_grad_(), *scalars]
            loss = Contrastive(ContrastiveSettings(kind=kind, chunk=chunk))(*own).loss  # type: ignore[arg-type]
            at = f"{kind}/{chunk}/"
            found[at + "loss"] = loss.detach()
            found |= {at + name: value for name, value in zip(NAMES, torch.autograd.grad(loss, own), strict=False)}
    return found


@pytest.mark.slow
def test_the_branch_of_nccl_has_the_same_gradients() -> None:
    """With NCCL torch sums the gradients of gathered features by another collective, which gloo lacks: here its meaning."""
    for plain, pretended in on_ranks(2, rows_by_reduce_scatter):
        assert plain.keys() == pretended.keys()
        for name, value in plain.items():
            same(pretended[name], value)


def rows_by_reduce_scatter() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    calls = []

    def reduce_scatter(result: Tensor, parts: list[Tensor], op: Any, group: Any) -> None:
        calls.append(op)
        for part in parts:
            dist.all_reduce(part, op=op, group=group)
        result.copy_(parts[rank()])

    plain = rows_of_this_rank()
    with patch.object(dist, "get_backend", lambda group=None: "nccl"), patch.object(dist, "reduce_scatter", reduce_scatter):
        pretended = rows_of_this_rank()
    assert len(calls) == 6  # with and without chunks: images and texts for CLIP, texts for SigLIP
    return plain, pretended
