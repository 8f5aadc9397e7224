"""Classifiers: a timm model with a small head, and a probe that folds into timm's own."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from eva_mim.students import ClassifierSettings
from eva_mim.students.classifier import Classifier, LinearProbe


@pytest.mark.parametrize(
    ("name", "pool"), [("vit_nano_patch4_32", "avg"), ("vit_nano_patch4_32", "token"), ("convnet_nano_32", "avg")]
)
@torch.no_grad()
def test_a_probe_folds_into_timms_own_head(name: str, pool: Any) -> None:
    """timm's model with `timm_weights` gives the logits of the chosen layer."""
    torch.manual_seed(0)
    probe = LinearProbe(ClassifierSettings(name=name, global_pool=pool), 7, scales=[1, 10, 100])
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    for _ in range(5):
        probe.train()(images)  # moves the norm's statistics away from 0 and 1
    for head in probe.eval().heads:
        head.weight.normal_()
        head.bias.normal_()
    probe.chosen.fill_(1)
    plain = timm.create_model(name, num_classes=7, **({"global_pool": pool} if "vit" in name else {})).eval()
    weights = {key: value.clone() for key, value in probe.state_dict().items()}
    plain.load_state_dict(probe.timm_weights(weights))
    x = torch.stack([(images[:, c].float() / 255 - probe.mean[c]) / probe.std[c] for c in range(3)], dim=1)
    expected = probe(images)[..., 1]
    assert torch.allclose(plain(x), expected, atol=1e-4 * expected.abs().max().item())
    assert not torch.allclose(plain(x), probe(images)[..., 2], atol=0.1)
    assert expected.std(0).mean() > 0.1


def test_a_probe_trains_only_its_layer() -> None:
    torch.manual_seed(0)
    probe = LinearProbe(ClassifierSettings(name="convnet_nano_32"), 7).train()
    before = {key: value.clone() for key, value in probe.trunk.state_dict().items()}
    probe(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)).sum().backward()
    learning = {name for name, parameter in probe.named_parameters() if parameter.grad is not None}
    assert learning == {"heads.0.weight", "heads.0.bias"}
    assert all(torch.equal(value, before[key]) for key, value in probe.trunk.state_dict().items())  # batch norms as well


@torch.no_grad()
def test_features_take_the_place_of_images() -> None:
    torch.manual_seed(0)
    probe = LinearProbe(ClassifierSettings(name="vit_nano_patch4_32"), 7, scales=[1, 1]).eval()
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    tokens = probe.trunk.forward_features(torch.stack([(images[:, c] / 255 - probe.mean[c]) / probe.std[c] for c in range(3)], 1))
    rows = probe.trunk.fc_norm(tokens[:, probe.trunk.num_prefix_tokens :].mean(1))
    assert torch.allclose(probe.features(images), rows, atol=1e-5)
    logits = probe(images)
    assert torch.allclose(probe(features=rows), logits, atol=1e-5)
    assert torch.equal(logits[..., 0], logits[..., 1])  # all layers start alike
    assert logits.std() > 0.01


def test_a_fingerprint_is_of_what_features_depend_on() -> None:
    torch.manual_seed(0)
    probe = LinearProbe(ClassifierSettings(name="vit_nano_patch4_32"), 7)
    before = probe.fingerprint()
    for parameter in (*probe.trunk.head.parameters(), *probe.heads.parameters()):
        parameter.data.add_(1)
    assert probe.fingerprint() == before
    probe.trunk.fc_norm.bias.data[0] += 1e-6
    assert probe.fingerprint() != before


@torch.no_grad()
def test_a_classifier_is_timms_model_with_a_small_head() -> None:
    torch.manual_seed(0)
    settings = ClassifierSettings(name="vit_nano_patch4_32")
    made = Classifier(settings, 7).eval()
    plain = timm.create_model("vit_nano_patch4_32", num_classes=7, global_pool="avg").eval()
    plain.load_state_dict(made.timm_weights(dict(made.state_dict())))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    x = torch.stack([(images[:, c].float() / 255 - made.mean[c]) / made.std[c] for c in range(3)], dim=1)
    assert torch.allclose(made(images), plain(x), atol=1e-6)
    torch.manual_seed(0)
    fresh = timm.create_model("vit_nano_patch4_32", num_classes=7, global_pool="avg")
    assert torch.allclose(plain.head.weight, fresh.head.weight * 0.001, atol=1e-9)
    assert made(images).softmax(-1).sub(1 / 7).abs().max() < 1e-3
    torch.manual_seed(0)
    whole = Classifier(settings.model_copy(update={"head_scale": 1.0}), 7)
    assert torch.equal(whole.trunk.head.weight, fresh.head.weight)  # type: ignore[union-attr]
