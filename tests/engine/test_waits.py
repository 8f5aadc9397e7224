"""No step makes the host wait for a GPU: shown without one, on tensors that have no values and say that they are on cuda:0.

The backward pass is left out here, since autograd wants a real device: gradients are put there. So are the states of the random
numbers of a GPU, which `fork_rng` keeps on the host.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from eva_mim.core.batches import FeatureBatch
from eva_mim.core.contracts import Rates
from eva_mim.core.settings import parse
from eva_mim.engine import RunSettings, build_engine
from eva_mim.optim import OptimSettings
from eva_mim.run.measure import average_of
from eva_mim.teachers.cast import CastWeights
from eva_mim.trunks import pixels
from finetune import classify
from pretrain import clip, mim
from tests.engine.test_lamb import Line, Squares
from tests.pretended import ASKED
from tests.ranks import on_ranks
from tests.tiny import CLASSIFY, CLIP, MIM

pytestmark = pytest.mark.slow
CUDA = torch.device("cuda:0")
COPIES = {"aten::_to_copy": 0, "aten::copy_": 1}
"""Operators that can copy between devices -> place of the source."""
SIX = {"run.micro_batch": 6}
VISIBLE = {"student.form": "visible", "mask.kind": "random", "mask.ratio": 0.75}
MIXED = {"mix.mixup": 0.8, "mix.cutmix": 1.0, "mix.smoothing": 0.1}


class Waits(TorchDispatchMode):
    """Collects what would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name, keywords = function._schema.name, keywords or {}
        if name in ASKED:
            self.found.append(name)
        result = function(*arguments, **keywords)
        if name in COPIES:
            source = arguments[COPIES[name]].device
            late = keywords.get("non_blocking") or (name == "aten::copy_" and arguments[2:])
            if source != result.device and not late:
                self.found.append(f"{name} from {source} to {result.device}")
        return result


def pretended(value: Tensor) -> Tensor:
    """A tensor of the same form on a GPU that is not there, with no values."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)


def pretend(network: nn.Module) -> None:
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(pretended(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = pretended(buffer)


def waits_of(program: ModuleType, tree: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What waits in the second step of a stage (the first fills caches) and in its average."""
    tree = {name: dict(section) if isinstance(section, dict) else section for name, section in tree.items()}
    for name, value in settings.items():
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    recipe = parse(program.StageRecipe, tree, "r.yaml")
    built = program.build(recipe, torch.device("cpu"))
    task, batches = built.parts.task, next(iter(built.parts.train.steps(0, 1)))
    average = average_of(task.student, recipe.run)
    waits = Waits()

    def backward(*_: Any) -> None:
        for parameter in task.student.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    pixels._scale_and_shift.cache_clear()
    with FakeTensorMode(), ExitStack() as held:
        held.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        held.enter_context(patch("torch.cuda.is_bf16_supported", lambda *_, **__: True))
        held.enter_context(patch("torch.autograd.backward", backward))
        held.enter_context(patch("torch.autograd.grad", lambda _, inputs: [torch.empty_like(one) for one in inputs]))
        held.enter_context(patch("torch.random.fork_rng", lambda _: nullcontext()))
        held.enter_context(patch("eva_mim.engine.local.placed", lambda student, *_: student))
        networks = [task.student, *(teacher.network for teacher in built.teachers.values())]  # type: ignore[attr-defined]
        for network in [*networks, *([] if average is None else [average.module])]:
            pretend(network)
        for teacher in built.teachers.values():
            teacher._weights = CastWeights(teacher.network)  # type: ignore[attr-defined]
        engine = build_engine(task.student, recipe.run, recipe.optim, CUDA)
        batches = [batch._each(pretended) for batch in batches]
        for step in range(2):
            waits.found.clear()
            with waits:
                engine.step(task, batches, Rates(1e-3, 0.1), measure_update=True)
                if average is not None:
                    average.update(task.student, step)
    pixels._scale_and_shift.cache_clear()
    return waits.found


@pytest.mark.parametrize("precision", [
    "bf16", pytest.param("fp16", marks=pytest.mark.long), pytest.param("fp32", marks=pytest.mark.long),
])
@pytest.mark.parametrize(
    ("program", "tree", "settings"),
    [
        (mim, MIM, {"run.ema_decay": 0.9}),
        (mim, MIM, SIX | {"optim.optimizer": "lamb"}),
        (mim, MIM, VISIBLE),
        (clip, CLIP, {}),
        (clip, CLIP, SIX),
        (clip, CLIP, SIX | {"contrastive.kind": "siglip", "student.init_logit_bias": -10.0, "contrastive.chunk": 4}),
        (classify, CLASSIFY, MIXED | {"run.ema_decay": 0.9}),
        (classify, CLASSIFY, {"optim.optimizer": "lars", "student.name": "convnet_nano_32", "student.patch_size": None,
                              "optim.layer_decay": 1.0}),
    ],
)
def test_no_step_waits_for_the_device(
    program: ModuleType, tree: dict[str, Any], settings: dict[str, Any], precision: str
) -> None:
    assert waits_of(program, tree, settings | {"run.precision": precision}) == []


def test_faults_of_before_are_found() -> None:
    """The limit of the gradient's norm as a tensor, a count of the host copied in each micro-batch, a value that is asked for."""
    def by_value(optimizer: Any, parameters: Any, clip: float, scale: Any) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip * scale.value)
        optimizer.step()
        return norm

    asked = pytest.raises(DataDependentOutputException, match="_local_scalar_dense")
    with patch("eva_mim.engine.local.clip_and_step", by_value), asked:
        waits_of(mim, MIM, {})

    def counts(self: Any, batch: Any) -> dict[str, Tensor]:
        return {"teacher": torch.tensor(3.0, device=batch.index.device)}

    with patch("eva_mim.tasks.masked.MaskedFeatures.counts", counts):
        assert waits_of(mim, MIM, SIX) == ["aten::_to_copy from cpu to cuda:0"] * 4


def waits_of_deepspeed(zero_stage: Any) -> tuple[int, int]:
    """On a rank: calls of the accelerator's `synchronize` in three steps of two micro-batches, and buffers of at least 1e8
    values."""
    from deepspeed.accelerator import get_accelerator

    from eva_mim.engine.deepspeed import DeepSpeedEngine

    waited, large = [], []
    empty, zeros = torch.empty, torch.zeros

    def noting(make: Any) -> Any:
        def made(*sizes: Any, **options: Any) -> Tensor:
            shape = torch.Size(sizes[0] if sizes and isinstance(sizes[0], tuple | list | torch.Size) else sizes)
            large.extend([shape] * (shape.numel() >= 1e8))
            result: Tensor = make(*sizes, **options)
            return result
        return made

    with ExitStack() as held:
        held.enter_context(patch.object(type(get_accelerator()), "synchronize", lambda *_, **__: waited.append(1)))
        for name, make in (("empty", empty), ("zeros", zeros)):
            held.enter_context(patch.object(torch, name, noting(make)))
        run = RunSettings(epochs=1, global_batch=8, micro_batch=2, precision="fp32", engine="deepspeed", zero_stage=zero_stage)
        engine = DeepSpeedEngine(Line(), run, OptimSettings(lr=1e-2), torch.device("cpu"))
        for _ in range(3):
            batches = [FeatureBatch(torch.arange(2), torch.randn(2, 3), torch.zeros(2, dtype=torch.int64)) for _ in range(2)]
            engine.step(Squares(engine.module), batches, Rates(1e-2, 0.0))  # type: ignore[arg-type]
    return len(waited), len(large)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_deepspeed_waits_for_no_device_and_takes_no_large_buffer(zero_stage: int) -> None:
    """Its timer would wait twice for each micro-batch, and its buckets would take 2 GB."""
    assert on_ranks(2, waits_of_deepspeed, zero_stage) == [(0, 0)] * 2
