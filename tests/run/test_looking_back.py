"""What is measured while a run goes on, and looking at a run afterwards."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eva_mim.commands.evaluate import table
from eva_mim.core.batches import FeatureBatch
from eva_mim.core.losses import LossTerm, StepOutput
from eva_mim.core.timing import Stopwatch, measuring, phase
from eva_mim.run.diagnose import diagnose, first_bad, largest_of
from eva_mim.run.meter import Meter
from tests.conftest import make_folder
from tests.tiny import CLASSIFY, MIM, finish, python, run, write_recipe


def evaluate(out: Path, processes: int = 1) -> str:
    """Standard output of `eva-mim evaluate OUT`."""
    return finish(python("eva_mim.cli", "evaluate", out, processes=processes)).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "settings", "processes"),
    [
        ("mim", ["run.ema_decay=0.9"], 1),
        ("mim", ["student.form=visible", "mask.kind=random", "mask.ratio=0.75", "run.precision=bf16",
                 "student.decoder={width: 32, depth: 1, heads: 2}"], 1),
        ("mim", ["run.engine=deepspeed", "run.zero_stage=3"], 2),
        ("classify", ["run.ema_decay=0.9"], 1),
    ],
)
def test_saved_reloaded_and_evaluated_again_gives_the_same_numbers(
    tmp_path: Path, program: str, settings: list[str], processes: int
) -> None:
    recipe = write_recipe(tmp_path, {"mim": MIM, "classify": CLASSIFY}[program])
    run(program, recipe, tmp_path / "run", *settings, processes=processes)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = evaluate(tmp_path / "run", processes).partition("figure ")[2].splitlines()[1:]
    assert len(lines) >= (3 if program == "classify" else 7)
    assert all(line.endswith("equal") for line in lines), "\n".join(lines)
    assert any(line.startswith("ema_") for line in lines) == ("run.ema_decay=0.9" in settings)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_the_table_says_what_differs() -> None:
    text = table({"cosine": 0.5, "knn_top1": 40.0, "new": 1.0}, {"cosine": 0.5, "knn_top1": 40.1}).splitlines()
    assert text[1].endswith("equal")
    assert text[2].endswith("differs")
    assert text[3].split() == ["new", "1", "-"]


def output(loss: float, skipped: float, **metrics: float) -> StepOutput:
    """A step's loss and metrics as tensors."""
    scalars = {name: torch.tensor(value) for name, value in (metrics | {"skipped": skipped}).items()}
    return StepOutput({"loss": LossTerm(torch.tensor(loss))}, scalars)


def test_means_are_over_the_steps_that_were_taken() -> None:
    """A skipped step's NaN hides nothing; a metric that only some steps have is the mean of these."""
    meter = Meter(Stopwatch())
    meter.outputs = [
        output(-0.5, 0, grad_norm=1.0, loss_scale=8.0),
        output(float("nan"), 1, grad_norm=float("inf"), loss_scale=8.0),
        output(-0.7, 0, grad_norm=3.0, loss_scale=4.0, update_ratio=0.25),
    ]
    meter.broken = ["a", "b"]
    window = meter.read(torch.device("cpu"))
    assert window.figures == pytest.approx({
        "loss": -0.6, "grad_norm": 2.0, "grad_norm_max": 3.0, "loss_scale": 4.0, "update_ratio": 0.25, "skipped": 1.0,
        "broken": 2.0,
    })
    assert window.losses[0] == pytest.approx(-0.5)
    assert math.isnan(window.losses[1])
    meter.outputs = [output(float("nan"), 1, grad_norm=float("nan"))]
    alone = meter.read(torch.device("cpu")).figures
    assert math.isnan(alone["loss"])
    assert alone["grad_norm_max"] == 0.0


def test_phases_add_up_and_belong_to_the_innermost_stopwatch() -> None:
    outer, inner = Stopwatch(), Stopwatch()
    with phase("nobody"):
        pass
    with measuring(outer):
        for _ in range(2):
            with phase("teacher"):
                time.sleep(0.01)
        with measuring(inner), phase("student"):
            time.sleep(0.01)
        with pytest.raises(ValueError, match="lost"), phase("data"):
            raise ValueError("lost")
    seconds = outer.take()
    assert set(seconds) == {"teacher", "data"}
    assert 0.02 <= seconds["teacher"] < 0.5
    assert set(inner.take()) == {"student"}
    assert outer.take() == {}


class Chain(nn.Module):
    """Three layers; the task below squares its way to infinity at the second."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4, bias=False) for _ in range(3))
        nn.init.eye_(self.one.weight)
        nn.init.constant_(self.two.weight, 1e30)
        nn.init.constant_(self.three.weight, 1e30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 4] -> [B, 4]."""
        return self.three(self.two(self.one(x)))  # type: ignore[no-any-return]


class Mean:
    """A task: the mean of what the network says."""

    student = nn.Identity()

    def loss(self, student: nn.Module, batch: FeatureBatch) -> StepOutput:
        """Mean output."""
        return StepOutput({"loss": LossTerm(student(batch.features).mean())}, {})

    def counts(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """Not weighed."""
        return {}


def test_the_first_bad_layer_is_where_infinity_begins() -> None:
    module = Chain()
    batch = FeatureBatch(torch.arange(2), torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), torch.zeros(2))
    found = diagnose(Mean(), module, batch, torch.enable_grad, loss_scale=2.0)  # type: ignore[arg-type]
    assert found.layers["one"] == pytest.approx({"output": 8.0, "weight": 1.0, "gradient": found.layers["one"]["gradient"]})
    assert found.layers["two"]["output"] == pytest.approx(26e30, rel=1e-6)
    assert first_bad(found.layers) == "three"
    assert math.isinf(found.loss)
    # d mean / d three.weight = two's output / 4, times the loss scale.
    assert found.layers["three"]["gradient"] == pytest.approx(2.0 * (10e30 + 26e30) / 8, rel=1e-6)
    assert first_bad(found.layers, "gradient") == "one"  # 1e30 * 1e30 comes back through two and three
    merged = largest_of([found.layers, {"one": {"output": 9.0}, "two": {"output": float("nan")}}])
    assert merged["one"]["output"] == 9.0
    assert first_bad(merged) == "two"


@pytest.mark.parametrize("command", ["evaluate", "replay"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, command: str) -> None:
    done = finish(python("eva_mim.cli", command, tmp_path), 2)
    assert str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_does_not_meet_another_list_of_classes(tmp_path: Path) -> None:
    """As many classes under other names: a head would count the wrong ones as right. Neither measured nor resumed."""
    root = make_folder(tmp_path / "data", {"ant": 30, "bee": 30}, size=(32, 32))
    recipe, out = write_recipe(tmp_path, CLASSIFY), tmp_path / "run"
    data = ["data.source=folder", f"data.root={root}", "data.val_share=0.2"]
    run("classify", recipe, out, *data)
    (root / "ant").rename(root / "cat")
    done = finish(python("eva_mim.cli", "evaluate", out), 2)
    assert "begun with another list of classes" in done.stderr
    assert "Traceback" not in done.stderr
