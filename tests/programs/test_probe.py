"""Linear probe: several learning rates at once, features in files, and the figures of both against independent ones."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from eva_mim.core.batches import FeatureBatch
from eva_mim.core.contracts import Rates
from eva_mim.core.errors import UserError
from eva_mim.core.settings import parse
from eva_mim.data.preparation import LabelledPreparation
from eva_mim.data.sampler import GlobalOrder
from eva_mim.data.splits import open_splits
from eva_mim.data.store.rows import EvalRows, RowLoader, Rows, Stacked
from eva_mim.data.subset import Subset
from eva_mim.data.views import EvalView, TrainView
from eva_mim.engine import RunSettings
from eva_mim.engine.local import LocalEngine
from eva_mim.evaluate.features import ridge_accuracy
from eva_mim.evaluate.probe import ProbeEvaluator
from eva_mim.optim import OptimSettings
from eva_mim.run.loaders import eval_loader, train_loader
from eva_mim.run.stage import prepare
from eva_mim.students import ClassifierSettings
from eva_mim.students.classifier import LinearProbe
from eva_mim.tasks.probe import ProbeTask
from eva_mim.trunks import TrunkSettings
from eva_mim.weights.export import write_timm
from finetune.probe import StageRecipe, build
from finetune.probe_data import set_aside
from tests.tiny import RUN, SCENES, VIT, losses, records, run, same_weights, stopped_after, write_recipe

CPU = torch.device("cpu")
MADE = {"model_name": VIT["name"], "patch_size": VIT["patch_size"]}
LRS = [0.001, 0.01, 0.1]
OPTIM = {"lr": 0.01, "warmup_epochs": 0, "weight_decay": 0.0, "betas": [0.9, 0.999], "clip_grad": None}
LARS = {name: value for name, value in OPTIM.items() if name != "betas"} | {"optimizer": "lars"}


@pytest.fixture
def probe(tmp_path: Path) -> dict[str, Any]:
    """A recipe of a cached sweep on a trunk as a stage leaves it."""
    torch.manual_seed(3)
    trunk = timm.create_model(**MADE, num_classes=0)
    write_timm(folder(tmp_path), trunk, TrunkSettings(**VIT), trunk.state_dict())
    return {
        "data": SCENES, "run": RUN, "optim": OPTIM, "student": VIT, "init_from": str(tmp_path / "trunk"),
        "probe": {"cached": True, "lrs": LRS, "select": 0.25},
    }  # fmt: skip


def folder(tmp_path: Path) -> Path:
    (tmp_path / "trunk").mkdir()
    return tmp_path / "trunk"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": OPTIM | {"clip_grad": 1.0}}, r"optim\.clip_grad=1\.0 would tie .* set it to null"),
        ({"probe": {"lrs": [0.1, 0.2, 0.1]}}, r"two are the same"),
        ({"probe": {"lrs": []}}, r"probe\.lrs: .*at least 1 item"),
        ({"probe": {"lrs": [0.1], "select": 1.0}}, r"probe\.select: .*less than 1"),
        ({"run": RUN | {"engine": "deepspeed", "zero_stage": 3}}, r"zero_stage=3 with several probe\.lrs"),
        ({"data": {"mixture": [{"source": "scenes"}]}}, r"data\.mixture: .* need one source"),
        ({"view": {"flip": 0.0}}, r"view\.flip has no effect with probe\.cached=true"),
        ({"mix": {"mixup": 0.8}}, r"mix\.mixup"),
        ({"student": VIT | {"head_rows": "all"}}, r"head_rows=all: the layer of a probe starts anew"),
        (
            {"optim": LARS, "run": RUN | {"engine": "deepspeed", "zero_stage": 1}},
            r"optim\.optimizer=lars compares the norms of whole tensors, which run\.zero_stage=1",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(probe: dict[str, Any], change: dict[str, Any], message: str) -> None:
    assert parse(StageRecipe, probe, "recipe").lrs == tuple(LRS)
    with pytest.raises(UserError, match=message):
        parse(StageRecipe, probe | change, "recipe")


def test_a_shared_view_goes_with_features_that_depend_on_it(probe: dict[str, Any]) -> None:
    """crop_pct is of the held-out view; one learning rate may be clipped."""
    viewed = parse(StageRecipe, probe | {"view": {"crop_pct": 0.875}}, "recipe")
    assert (viewed.view.crop_pct, viewed.probe.cached) == (0.875, True)
    one = parse(StageRecipe, probe | {"probe": {"cached": True}, "optim": OPTIM | {"clip_grad": 1.0}}, "recipe")
    assert (one.lrs, one.optim.clip_grad) == ((OPTIM["lr"],), 1.0)


def test_what_is_set_aside_is_not_learned_from() -> None:
    kept, aside = set_aside(1000, 0.1)
    assert sorted([*kept, *aside]) == list(range(1000))
    assert len(aside) == 100
    assert 5 < (aside < 100).sum() < 20  # from everywhere
    with pytest.raises(UserError, match=r"probe\.select=0\.9: of 1 training images none"):
        set_aside(1, 0.9)


def task_and_rows(scales: list[float]) -> tuple[ProbeTask, list[FeatureBatch]]:
    torch.manual_seed(0)
    student = LinearProbe(ClassifierSettings(name=VIT["name"]), 4, scales=scales)
    generator = torch.Generator().manual_seed(1)
    width = student.trunk.num_features
    batches = [
        FeatureBatch(torch.arange(24), 3 + 2 * torch.randn(24, width, generator=generator),
                     torch.randint(0, 4, (24,), generator=generator))
        for _ in range(6)
    ]  # fmt: skip
    return ProbeTask(student, [f"lr{scale:g}" for scale in scales], 0.1), batches


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_each_layer_learns_as_it_would_alone(optimizer: str) -> None:
    """With its own learning rate as the only one; steps are accumulated over two micro-batches."""
    settings = RunSettings(epochs=1, global_batch=48, precision="fp32", device="cpu")

    def trained(lr: float, scales: list[float]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        task, batches = task_and_rows(scales)
        options = OPTIM | {"lr": lr, "optimizer": optimizer, "weight_decay": 0.05, "lars": {"trust": 0.05}}
        engine = LocalEngine(task.student, settings, OptimSettings(**options), CPU)
        engine.module.train()
        outputs = [engine.step(task, batches[2 * i : 2 * i + 2], Rates(lr, 0.05)) for i in range(3)]
        return dict(engine.weights()), [output.metrics | {"loss": output.loss} for output in outputs]

    whole, said = trained(0.1, [1.0, 0.1, 10.0])
    alone = [trained(lr, [1.0]) for lr in (0.1, 0.01, 1.0)]
    for number, (weights, told) in enumerate(alone):
        for name in ("weight", "bias"):
            found, expected = whole[f"heads.{number}.{name}"], weights[f"heads.0.{name}"]
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)
            assert (expected - alone[number - 1][0][f"heads.0.{name}"]).abs().max() > 1e-4
        for step, metrics in enumerate(told):
            name = ("loss_lr1", "loss_lr0.1", "loss_lr10")[number]
            assert float(said[step][name]) == pytest.approx(float(metrics["loss"]), abs=1e-5)
    total = [sum(float(told[step]["loss"]) for _, told in alone) for step in range(3)]
    assert [float(metrics["loss"]) for metrics in said] == pytest.approx(total, abs=1e-5)


def test_the_layer_is_chosen_without_the_held_out_images() -> None:
    """Three layers that answer one class each: what is set aside is of class 1, the held-out images are of class 0."""
    torch.manual_seed(0)
    student = LinearProbe(ClassifierSettings(name=VIT["name"]), 7, scales=[1, 1, 1]).eval()
    for number, head in enumerate(student.heads):
        head.weight.data.zero_()
        head.bias.data.copy_(F.one_hot(torch.tensor(number), 7) * 3.0)
    features, labels = torch.randn(40, student.trunk.num_features), torch.tensor([0] * 27 + [1] * 9 + [6] * 4)
    rows = Rows(stacked(features), labels, torch.arange(40))
    val, select = EvalRows(rows, np.arange(30)), EvalRows(rows, np.arange(27, 40))
    evaluator = ProbeEvaluator(val, select, ["a", "b", "c"], fixed={"ridge_top1": 1.5}, device=CPU)
    found = evaluator(student, nullcontext)
    assert int(student.chosen) == found["chosen"] == 1
    assert found["top1"] == found["top1_b"] == pytest.approx(100 * 3 / 30)
    assert (found["top1_a"], found["top1_c"]) == pytest.approx((90, 0))
    assert found["select_top1_b"] == pytest.approx(100 * 9 / 13)
    assert (found["select_top1_a"], found["select_top1_c"]) == (0, 0)
    logits = torch.tensor([0.0, 3, 0, 0, 0, 0, 0])
    wrong, right = (float(F.cross_entropy(logits, torch.tensor(label))) for label in (0, 1))
    assert found["loss"] == pytest.approx((27 * wrong + 3 * right) / 30)
    assert found["ridge_top1"] == 1.5
    one = LinearProbe(ClassifierSettings(name=VIT["name"]), 7).eval()
    assert set(ProbeEvaluator(val, [], ["a"], fixed={}, device=CPU)(one, nullcontext)) == {"top1", "top5", "loss"}


def stacked(rows: Tensor) -> Stacked:
    """Rows in files of seven."""
    return Stacked(rows.split(7), torch.arange(len(rows)))


def pictures(folder: Path, images: int) -> None:
    """Two classes, dark and light."""
    for number in range(images):
        path = folder / ("dark", "light")[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (100 * (number % 2) + number,) * 3).save(path)


def test_broken_images_are_left_out_and_counted(tmp_path: Path, probe: dict[str, Any]) -> None:
    pictures(tmp_path / "data" / "train", 60)
    pictures(tmp_path / "data" / "val", 8)
    data = {"source": "folder", "root": str(tmp_path / "data"), "train": "train", "val": "val", "workers": 0}
    tree = probe | {"data": data, "probe": {"cached": True}, "run": RUN | {"global_batch": 11}}
    broken = sorted((tmp_path / "data" / "train").rglob("*.png"))[3:17]
    for path in broken[:5]:
        path.write_bytes(b"no picture")
    _, built = prepare(parse(StageRecipe, tree, "recipe"), build)
    assert built.parts.train.steps_per_epoch == 5  # 55 images
    seen = [int(index) for step in built.parts.train.steps(0, 5) for batch in step for index in batch.index]
    assert sorted(seen) == [index for index in range(60) if not 3 <= index < 8]
    assert built.parts.evaluator.fixed["ridge_top1"] == 100  # type: ignore[attr-defined]
    for path in broken:
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"14 of 60 training images are broken, more than data\.max_broken=1\.00%"):
        prepare(parse(StageRecipe, tree | {"view": {"crop_pct": 0.9}}, "recipe"), build)


def test_what_features_depend_on_makes_others(tmp_path: Path, probe: dict[str, Any], cache: Path) -> None:
    """Held-out view and weights do; learning rates, seeds, batches and precision (always fp32) do not."""
    def count(**changes: Any) -> int:
        prepare(parse(StageRecipe, probe | changes, "recipe"), build)
        return len(list((cache / "features").iterdir()))

    assert count() == 1
    assert count(probe={"cached": True}, run=RUN | {"global_batch": 12, "seed": 5}, optim=OPTIM | {"lr": 1.0}) == 1
    assert count(view={"crop_pct": 0.5}) == 2
    assert count(run=RUN | {"precision": "bf16"}) == 2
    weights = load_file(tmp_path / "trunk" / "model.safetensors")
    save_file(weights | {"norm.bias": weights["norm.bias"] + 1}, tmp_path / "trunk" / "model.safetensors")
    assert count() == 3


def test_batches_of_rows_are_the_batches_of_images(probe: dict[str, Any]) -> None:
    """The same images in the same order, on each of two ranks and over accumulation; features stand in the place of pixels."""
    recipe = parse(StageRecipe, probe | {"run": RUN | {"micro_batch": 6}}, "recipe")
    source = open_splits(recipe.data).train
    kept, _ = set_aside(len(source), 0.25)
    whole = Rows(stacked(torch.randn(len(source), 5)), torch.tensor([source.read(i).label for i in range(len(source))]),
                 torch.arange(len(source)))
    images = train_loader(recipe, Subset(source, kept), TrainView(recipe.view, [32]), LabelledPreparation)
    order = {"seed": recipe.run.seed, "global_batch": 24, "micro_batch": 6}
    rows = RowLoader(whole, kept, GlobalOrder(len(kept), **order), source.key)
    assert rows.steps_per_epoch == images.steps_per_epoch == 3
    for ours, theirs in zip(rows.steps(2, 5), images.steps(2, 5), strict=True):
        assert len(ours) == len(theirs) == 4
        for a, b in zip(ours, theirs, strict=True):
            assert a.index.tolist() == kept[b.index].tolist()
            assert torch.equal(a.features, whole.features[torch.from_numpy(kept[b.index])])
            assert torch.equal(a.labels, b.labels)
    assert [sample["key"] for sample in rows.samples(4)] == [sample["key"] for sample in images.samples(4)]
    assert [sample["index"] for sample in rows.samples(4)] == [kept[sample["index"]] for sample in images.samples(4)]
    halves = [RowLoader(whole, kept, GlobalOrder(len(kept), **order, rank=rank, world=2), source.key) for rank in (0, 1)]
    for step, (first, second) in enumerate(zip(*(half.steps(0, 4) for half in halves), strict=True)):
        found = [index for pair in zip(first, second, strict=True) for batch in pair for index in batch.index.tolist()]
        assert found == [sample["index"] for sample in rows.samples(step)]


def test_features_are_the_trunks_on_the_held_out_view(probe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """timm's own trunk on the loader's images; the ridge figure is that of these features."""
    recipe = parse(StageRecipe, probe, "recipe")
    _, built = prepare(recipe, build)
    trunk = timm.create_model(**MADE, num_classes=0, global_pool="avg").eval()
    weights = load_file(Path(probe["init_from"]) / "model.safetensors")
    trunk.load_state_dict({name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: value
                           for name, value in weights.items()})
    splits = open_splits(recipe.data)
    rows = []
    for source in splits:
        batches = list(eval_loader(recipe, source, EvalView([32]), LabelledPreparation))
        images = torch.cat([batch.images for batch in batches]).float() / 255
        mean, std = (torch.tensor(trunk.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
        with torch.no_grad():
            rows.append((trunk((images - mean) / std), torch.cat([batch.labels for batch in batches])))
    (bank, bank_labels), (queries, labels) = rows
    ridge = ridge_accuracy(queries, labels, bank, bank_labels)
    assert built.parts.evaluator.fixed["ridge_top1"] == pytest.approx(ridge, abs=1e-6)  # type: ignore[attr-defined]
    assert f"ridge_top1 {ridge:.4g}" in capsys.readouterr().err
    for batch in (batch for step in built.parts.train.steps(0, 4) for batch in step):
        torch.testing.assert_close(batch.features, bank[batch.index], atol=1e-5, rtol=1e-5)
        assert torch.equal(batch.labels, bank_labels[batch.index])
    (held_out,) = built.parts.evaluator.val  # type: ignore[attr-defined]
    torch.testing.assert_close(held_out.features, queries, atol=1e-5, rtol=1e-5)


def accuracy(out: Path, tree: dict[str, Any]) -> float:
    """Percent of the held-out images that timm's model in `out` names rightly."""
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    recipe = parse(StageRecipe, tree, "recipe")
    batches = list(eval_loader(recipe, open_splits(recipe.data).val, EvalView([32]), LabelledPreparation))
    images = torch.cat([batch.images for batch in batches]).float() / 255
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        right = model((images - mean) / std).argmax(1) == torch.cat([batch.labels for batch in batches])
    return 100 * float(right.double().mean())


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_two_processes_find_what_one_finds(tmp_path: Path, probe: dict[str, Any], cached: bool, cache: Path) -> None:
    """Losses, every figure and the result; and the result is a classifier of timm's with the headline's accuracy."""
    tree = probe | {"run": RUN | {"epochs": 3}, "probe": {"cached": cached, "lrs": LRS, "select": 0.25}}
    tree["optim"] = LARS | {"lr": 1.0}
    recipe = write_recipe(tmp_path, tree)
    run("probe", recipe, tmp_path / "one")
    if cached:  # else the second run would read what the first has made
        (cache / "features").rename(tmp_path / "features of one process")
    run("probe", recipe, tmp_path / "two", "run.engine=deepspeed", processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    one, two = (json.loads((tmp_path / name / "lineage.json").read_text())["metrics"] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-4)
    assert one.keys() >= {"top1", "chosen", "top1_lr0.001", "select_top1_lr0.1"}
    assert ("ridge_top1" in one) == cached
    assert one["top1"] == one[f"top1_lr{LRS[int(one['chosen'])]}"]
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=0)
    assert accuracy(tmp_path / "one", tree) == pytest.approx(one["top1"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_a_sweep_on_features_that_was_stopped_ends_bit_for_bit_like_an_undisturbed_one(
    tmp_path: Path, probe: dict[str, Any], optimizer: str, cache: Path
) -> None:
    """The averaged weights as well; the second start reads the features of the first. A kill between two checkpoints."""
    tree = probe | {"run": RUN | {"epochs": 6, "checkpoint_every": 3, "keep_last": 9, "ema_decay": 0.9, "evaluate_every": 2}}
    recipe = write_recipe(tmp_path, tree | {"optim": LARS if optimizer == "lars" else OPTIM})
    run("probe", recipe, tmp_path / "straight")
    stopped = stopped_after(9, tmp_path / "straight", tmp_path / "stopped")
    run("probe", recipe, stopped)
    assert len(list((cache / "features").iterdir())) == 1
    assert losses(stopped) == losses(tmp_path / "straight")
    assert len(losses(stopped)) == 18
    assert len(records(stopped, "start")) == 2
    for name in ("model.safetensors", "ema/model.safetensors"):
        same_weights(stopped / name, tmp_path / "straight" / name)
    figures = [json.loads((folder / "lineage.json").read_text())["metrics"] for folder in (tmp_path / "straight", stopped)]
    assert figures[0] == figures[1]
