"""Micro-batches of image-text pairs give the loss, the gradients and the step of the undivided batch, in both engines."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn

import eva_mim.trunks.small  # noqa: F401  registers the architectures
from eva_mim.core.batches import ImageTextBatch
from eva_mim.core.contracts import Rates
from eva_mim.core.distributed import rank, world_size
from eva_mim.core.errors import UserError
from eva_mim.core.losses import LossTerm, StepOutput
from eva_mim.core.settings import parse
from eva_mim.data.preparation import ImageTextPreparation
from eva_mim.data.splits import open_splits
from eva_mim.data.views import TrainView
from eva_mim.engine import RunSettings
from eva_mim.engine.local import LocalEngine
from eva_mim.optim import OptimSettings
from eva_mim.optim.groups import parameter_groups
from eva_mim.pipeline.plan import sections
from eva_mim.run.loaders import train_loader
from eva_mim.students import ClipSettings, TextSettings
from eva_mim.students.clip import ClipStudent
from eva_mim.tasks import ContrastiveSettings
from eva_mim.tasks.contrastive import Contrastive, ImageText
from pretrain.clip import StageRecipe
from tests.ranks import on_ranks
from tests.tiny import CLIP, losses, run, write_recipe

PAIRS, CLIP_NORM = 8, 0.5
CPU = torch.device("cpu")
OPTIM = OptimSettings(lr=1e-2, eps=1e-3, clip_grad=CLIP_NORM, weight_decay=0.1)
"""A large eps: with a small one Adam's first step is the gradient's sign, which rounding turns where a gradient should be 0."""
RATES = Rates(1e-2, 0.1)
DIVISIONS = [("clip", 2), ("clip", 4), ("siglip", 2)]
"""Loss, and pairs in a micro-batch of a rank of two."""


def make_student(kind: str = "clip", **more: Any) -> ClipStudent:
    """The same weights at every call; 24 px."""
    torch.manual_seed(0)
    sigmoid = {"init_logit_scale": 2.3026, "init_logit_bias": -3.0} if kind == "siglip" else {}
    text = TextSettings(width=32, layers=1, heads=2, context_length=12)
    return ClipStudent(ClipSettings(**{"name": "vit_nano_patch4_24", "embed_dim": 16, "text": text} | sigmoid | more)).train()


def batches(micro: int, number: int = 0, world: int = 1) -> list[ImageTextBatch]:
    """Micro-batches of the PAIRS pairs as the loader deals them out to a rank."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (PAIRS, 3, 24, 24), dtype=torch.uint8, generator=generator)
    texts = torch.randint(1, 49000, (PAIRS, 12), generator=generator)
    parts = torch.arange(PAIRS).split(micro)[number::world]
    return [ImageTextBatch(rows, images[rows], texts[rows], torch.arange(len(rows))) for rows in parts]


def open_clip_step(
    student: ClipStudent, kind: str, seed: int, parts: list[ImageTextBatch]
) -> tuple[StepOutput, dict[str, Tensor]]:
    """One step by open_clip's loss of all pairs together and torch's own AdamW, with the gradients; moves the student.

    The parts are run in order in one graph: networks draw for each of them as they do for micro-batches.
    """
    torch.manual_seed(seed)
    image, text, *scalars = zip(*(student(part.images, part.texts) for part in parts), strict=True)
    objective: Any = SigLipLoss() if kind == "siglip" else ClipLoss()
    loss = objective(torch.cat(image), torch.cat(text), *(same[0] for same in scalars))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    norm = nn.utils.clip_grad_norm_(student.parameters(), CLIP_NORM)
    groups = [group | {"weight_decay": 0.1 * group["decays"]} for group in parameter_groups(student, OPTIM)]
    torch.optim.AdamW(groups, lr=1e-2, betas=OPTIM.betas, eps=OPTIM.eps).step()
    metrics = {"grad_norm": norm, "logit_scale": scalars[0][0].detach()}
    return StepOutput({"contrastive": LossTerm(loss.detach())}, metrics), gradients


def local_step(
    student: ClipStudent, kind: Any, parts: list[ImageTextBatch], seed: int = 0, chunk: int | None = None,
    precision: Any = "fp32",
) -> tuple[StepOutput, dict[str, Tensor]]:
    """One step of the local engine, with the gradients (times the loss scale) that it gathered."""
    settings = RunSettings(epochs=1, global_batch=PAIRS, precision=precision)
    engine = LocalEngine(student, settings, OPTIM, CPU)
    gradients: dict[str, Tensor] = {}

    def note(parameter: nn.Parameter, name: str) -> None:
        assert parameter.grad is not None
        gradients[name] = parameter.grad.clone()

    for name, parameter in student.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: note(parameter, name))
    torch.manual_seed(seed)
    output = engine.step(ImageText(student, Contrastive(ContrastiveSettings(kind=kind, chunk=chunk))), parts, RATES)
    return output, gradients


def same(found: dict[str, Tensor], expected: dict[str, Tensor], unit: float = 1.0) -> None:
    """Equal to 1e-6 of the unit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-6 * unit, name


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to 1e-6 of the largest entry: so far lies the undivided batch's gradient, about 20, from the one in float64."""
    same(found, expected, max(float(value.abs().max()) for value in expected.values()))


def agrees(output: StepOutput, expected: StepOutput) -> None:
    """Loss, and metrics of the whole batch."""
    assert output.loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)
    for name, value in expected.metrics.items():
        assert output.metrics[name].item() == pytest.approx(value.item(), rel=1e-6), name


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("micro", [8, 4, 2])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_micro_batches_step_as_the_undivided_batch(kind: str, micro: int, chunk: int | None) -> None:
    wanted, mine = make_student(kind), make_student(kind)
    expected, expected_gradients = open_clip_step(wanted, kind, 0, batches(PAIRS))
    output, gradients = local_step(mine, kind, batches(micro), chunk=chunk)
    agrees(output, expected)
    assert expected.metrics["grad_norm"] > CLIP_NORM  # it was clipped
    same_gradients(gradients, expected_gradients)
    for name in ("model.logit_scale", "model.logit_bias") if kind == "siglip" else ("model.logit_scale",):
        assert gradients[name].item() == pytest.approx(expected_gradients[name].item(), rel=1e-6)
        assert gradients[name].abs() > 1e-2
    same(mine.state_dict(), wanted.state_dict())
    assert (mine.trunk.norm.weight - make_student(kind).trunk.norm.weight).abs().max() > 1e-3


@pytest.mark.parametrize("drawn", [{"drop_path": 0.5}, {"patch_dropout": 0.5}, {"drop_path": 0.3, "grad_checkpointing": True}])
def test_both_passes_draw_the_same_random_numbers(drawn: dict[str, Any]) -> None:
    wanted, mine = make_student(**drawn), make_student(**drawn)
    expected, expected_gradients = open_clip_step(wanted, "clip", 3, batches(2))
    output, gradients = local_step(mine, "clip", batches(2), seed=3)
    after = torch.rand(1)
    agrees(output, expected)
    same_gradients(gradients, expected_gradients)
    other, _ = open_clip_step(make_student(**drawn), "clip", 4, batches(2))
    assert abs(other.loss - expected.loss) > 1e-3  # the numbers matter
    torch.manual_seed(3)
    with torch.no_grad():
        for part in batches(2):
            mine(part.images, part.texts)
    assert torch.rand(1) == after  # the step moved the generator once


def test_one_micro_batch_takes_one_pass_and_more_take_two() -> None:
    for micro, passes in ((8, 1), (4, 4), (2, 8)):
        student, seen = make_student(), []
        student.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output[0].requires_grad))
        local_step(student, "clip", batches(micro))
        count = PAIRS // micro
        assert seen == ([True] if count == 1 else [False] * count + [True] * count)
        assert len(seen) == passes


def test_batch_norms_see_each_micro_batch_once() -> None:
    student = make_student(name="convnet_nano_24")
    twin = copy.deepcopy(student)
    local_step(student, "clip", batches(2))
    with torch.no_grad():
        for part in batches(2):
            twin(part.images, part.texts)
    buffers, expected = dict(student.named_buffers()), dict(twin.named_buffers())
    assert any(name.endswith("running_mean") for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(buffers[name], value, msg=name)


@pytest.mark.parametrize("when", ["first pass", "second pass"])
def test_a_bad_value_anywhere_skips_the_step(when: str) -> None:
    student, before, calls = make_student(), make_student(), []

    def poison(module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls.append(output)
        bad = len(calls) == (2 if when == "first pass" else 6)
        return (output[0] * (float("nan") if bad else 1.0), *output[1:])

    student.register_forward_hook(poison)
    output, _ = local_step(student, "clip", batches(2))
    assert len(calls) == 8
    assert output.metrics["skipped"] == 1
    assert not output.loss.isfinite()
    same(student.state_dict(), before.state_dict())


@pytest.mark.parametrize("micro", [8, 2])
def test_fp16_scales_the_gradients_as_ever(micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss scale is in the gradients and out of the norm; half precision is all that is between them and fp32."""
    monkeypatch.setattr("eva_mim.engine.loss_scale.SCALE_START", 2.0**10)
    expected, expected_gradients = open_clip_step(make_student(), "clip", 0, batches(PAIRS))
    output, gradients = local_step(make_student(), "clip", batches(micro), precision="fp16")
    assert output.metrics["loss_scale"] == 2.0**10
    assert output.metrics["skipped"] == 0
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-2)
    assert output.metrics["grad_norm"].item() == pytest.approx(expected.metrics["grad_norm"].item(), rel=2e-2)
    for name, value in expected_gradients.items():
        if value.norm() > 1e-2:
            assert (gradients[name] / 2.0**10 - value).norm() < 0.1 * value.norm(), name


def test_gradients_by_features_are_fp32_inside_autocast() -> None:
    """A student that says stored features, so that nothing but the loss and its gradient is computed."""
    image, text = (nn.functional.normalize(torch.randn(PAIRS, 16), dim=1) for _ in range(2))
    parts = [replace(part, texts=part.index) for part in batches(2)]

    def say(images: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        return image[rows], text[rows], torch.tensor(14.0)

    with torch.autocast("cpu", torch.bfloat16):
        prepared = ImageText(nn.Identity(), Contrastive()).prepare(say, parts)
    leaves = [tensor.clone().requires_grad_() for tensor in (image, text, torch.tensor(14.0))]
    by_image, by_text, by_scale = torch.autograd.grad(ClipLoss()(*leaves), leaves)
    for part in prepared:
        assert part.grad_cache is not None
        mine = dict(zip("its", part.grad_cache.gradients, strict=True))
        same(mine, {"i": by_image[part.index] * 4, "t": by_text[part.index] * 4, "s": by_scale})


def test_a_pipeline_keeps_the_names_of_the_sections() -> None:
    assert StageRecipe.model_fields.keys() <= sections()


def test_fewer_pairs_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    recipe = parse(StageRecipe, CLIP | {"run": CLIP["run"] | {"global_batch": 2}}, "r.yaml")
    with pytest.raises(UserError, match=r"run.global_batch=2 is not a multiple of 4 processes; nearest: run.global_batch=4"):
        train_loader(recipe, open_splits(recipe.data).train, TrainView(recipe.view, [32]), ImageTextPreparation)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_deepspeed_processes_step_as_the_undivided_batch(zero_stage: int) -> None:
    """Two micro-batches a rank, and one: real DeepSpeed, real gloo, against open_clip in this process."""
    said = on_ranks(2, step_of_each_division, zero_stage)
    for number, (kind, _) in enumerate(DIVISIONS):
        wanted = make_student(kind)
        expected, _ = open_clip_step(wanted, kind, 0, batches(PAIRS))
        ranks = [found[number] for found in said]
        assert sum(found["/loss"].item() for found in ranks) / 2 == pytest.approx(expected.loss.item(), abs=1e-6)
        for found in ranks:
            assert found["/grad_norm"].item() == pytest.approx(expected.metrics["grad_norm"].item(), rel=1e-5)
            assert found["/logit_scale"].item() == pytest.approx(expected.metrics["logit_scale"].item(), rel=1e-6)
        same({name: value for name, value in ranks[0].items() if name[0] != "/"}, wanted.state_dict())


@pytest.mark.slow
def test_a_whole_run_is_that_of_the_undivided_batch(tmp_path: Path) -> None:
    """Four steps by the program: two ranks with three micro-batches each, ZeRO 3, chunks."""
    student, settings = CLIP["student"] | {"init_logit_bias": -10.0}, CLIP["run"] | {"epochs": 1}
    recipe = write_recipe(tmp_path, CLIP | {"student": student, "run": settings})
    run("clip", recipe, tmp_path / "one", "contrastive.kind=siglip")
    divided = ["contrastive.chunk=5", "run.micro_batch=4", "run.engine=deepspeed", "run.zero_stage=3"]
    run("clip", recipe, tmp_path / "two", "contrastive.kind=siglip", *divided, processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5, abs=2e-5)


def step_of_each_division(zero_stage: Any) -> list[dict[str, Tensor]]:
    """On one of two ranks: figures and weights after a step of each division."""
    from eva_mim.engine.deepspeed import DeepSpeedEngine

    said = []
    for kind, micro in DIVISIONS:
        settings = RunSettings(epochs=1, global_batch=PAIRS, micro_batch=micro, precision="fp32", engine="deepspeed",
                               zero_stage=zero_stage)
        student = make_student(kind)
        engine = DeepSpeedEngine(student, settings, OPTIM, CPU)
        output = engine.step(ImageText(student, Contrastive(ContrastiveSettings(kind=kind))),  # type: ignore[arg-type]
                             batches(micro, rank(), world_size()), RATES)
        found = dict(engine.weights()) | {"/loss": output.loss}
        said.append(found | {f"/{name}": output.metrics[name] for name in ("grad_norm", "logit_scale")})
    return said
