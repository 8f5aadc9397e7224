"""A GPU that is not there: tensors with real values in memory that say they lie on it, as one of eight processes.

Everything is computed on the CPU, the backward pass too. What a GPU would refuse is refused: an operator with tensors of both
devices. A tensor of the CPU that reaches a collective, which NCCL would refuse, is an AssertionError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

ASKED = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
"""Operators whose result the host needs: a value, or a size that depends on values."""
CARD = torch.device("cuda:5")
WORLD = 8
UNKNOWN = {"barrier", "alltoall_"}
"""Collectives whose tensors do not say where they lie: torch's own one, and gradients that come from its engine."""
MOVING = {"to", "cpu", "cuda", "copy_", "_to_copy", "__get__", "__set__", "_make_subclass", "tolist", "item", "pin_memory",
          "__setitem__", "__getitem__", "index_put_", "detach"}
"""Functions that take tensors of two devices on a GPU too: copies, and places that lie on the CPU."""


class OnCard(Tensor):
    """A tensor of the CPU that claims to lie on the card."""

    @property
    def device(self) -> torch.device:
        return CARD

    is_cuda = True
    is_cpu = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = on_card(on_host(self.detach()).clone())
        memo[id(self)] = copied = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return copied

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return applied(function, arguments, keywords or {})


def on_card(value: Tensor) -> Tensor:
    """The same tensor, on the card."""
    return value if isinstance(value, OnCard) else value.as_subclass(OnCard)


def on_host(value: Tensor) -> Tensor:
    """The same tensor, on the CPU."""
    return value.as_subclass(Tensor)


def applied(function: Any, arguments: Any, keywords: dict[str, Any], mixed: bool = False) -> Any:
    """What a function returns, on the device on which a GPU would have it. `mixed`: tensors of both devices are taken."""
    with torch._C.DisableTorchFunctionSubclass():
        name = getattr(function, "__name__", str(function))
        given = [one for one in tree_iter((arguments, keywords)) if isinstance(one, Tensor)]
        claimed = any(isinstance(one, OnCard) for one in given)
        if claimed and not mixed and name not in MOVING and any(one.dim() and not isinstance(one, OnCard) for one in given):
            raise RuntimeError(f"{name}: tensors on {CARD} and on the CPU")
        target = "cpu" if name == "cpu" else None
        if name == "to":
            target = next((one for one in (*arguments[1:], *keywords.values()) if isinstance(one, str | torch.device)), None)
            target = next((one.device for one in given[1:]), target)
            arguments = tuple("cpu" if isinstance(one, str | torch.device) else one for one in arguments)
        if keywords.get("device") is not None:
            target, keywords = keywords["device"], keywords | {"device": "cpu"}
        keywords.pop("pin_memory", None)
        result = function(*arguments, **keywords)
        there = claimed if target is None else torch.device(target).type == "cuda"
        return tree_map_only(Tensor, on_card if there else on_host, result)


def module_to(original: Any) -> Any:
    """`Module.to` that moves parameters in place, as it does with a GPU."""

    def moved(self: nn.Module, *arguments: Any, **keywords: Any) -> nn.Module:
        targets = [one for one in (*arguments, *keywords.values()) if isinstance(one, str | torch.device)]
        keywords = {name: one for name, one in keywords.items() if not isinstance(one, str | torch.device)}
        original(self, *(one for one in arguments if not isinstance(one, str | torch.device)), **keywords)
        for one in (*self.parameters(), *self.buffers()) if targets else ():
            if torch.device(targets[0]).type == "cuda" and not isinstance(one, OnCard):
                one._is_param = isinstance(one, nn.Parameter)  # type: ignore[attr-defined]
                one.__class__ = OnCard
        return self

    return moved


class Card(TorchFunctionMode):
    """Tensors that are made for the card lie on it."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.mixed = mixed

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return applied(function, arguments, keywords or {}, self.mixed)


def with_hooks(engine: Any) -> Any:
    """The backward pass, in which libraries call functions of their own: for these the card is there too, but gradients come to
    them from torch's engine, which knows nothing of it."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        with torch._C._EnableTorchFunction(), Card(mixed=True):
            return engine(*arguments, **keywords)

    return run


class Collectives(TorchDispatchMode):
    """Every tensor of a collective lies on the card. The other ranks have the same gradients and sums, and no rows to gather."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}
        self.waits: list[int] = []
        """How often each step of the engine asked for a value that lies on the card."""
        self._in_step = False

    def counting(self, step: Any) -> Any:
        """A step of an engine whose waits are counted."""

        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.waits.append(0)
            self._in_step = True
            try:
                return step(*arguments, **keywords)
            finally:
                self._in_step = False

        return counted

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            result = function(*arguments, **(keywords or {}))
        if self._in_step and function._schema.name in ASKED and isinstance(arguments[0], OnCard):
            self.waits[-1] += 1
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::")
            tensors = [one for one in tree_iter((arguments, keywords)) if isinstance(one, Tensor) and name not in UNKNOWN]
            self.seen[name] = self.seen.get(name, 0) + 1
            assert all(isinstance(one, OnCard) for one in tensors), f"{name}: a tensor lies on the CPU, not on {CARD}"
            for one in tensors if name == "allreduce_" else ():
                if one.is_floating_point():  # a sum; whole numbers are a maximum, or what one rank alone says
                    one.mul_(WORLD)
            if name == "allgather_" and tensors[-1].dtype == torch.int64 and tensors[-1].numel() == 1:  # numbers of rows
                for one in tensors[1:-1]:
                    one.zero_()
        return result


def forked(fork: Any, devices: Any = (), enabled: bool = True, **_: Any) -> Any:
    """`torch.random.fork_rng` of the CPU alone."""
    return fork([], enabled)


class HostGenerator(torch.Generator):
    """A generator of random numbers on the CPU, whatever it is made for."""

    def __new__(cls, device: Any = None) -> HostGenerator:
        made: HostGenerator = super().__new__(cls)
        return made


@contextmanager
def pretended_card() -> Iterator[Collectives]:
    """This process is rank 0 of eight, on its card. Only this process computes; what ranks say through the store is left out."""
    collectives = Collectives()
    events = {"record": lambda: None, "synchronize": lambda: None, "elapsed_time": lambda _: 0.0}
    with ExitStack() as held:
        held.enter_context(patch.dict(os.environ, {"RANK": "0", "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(CARD.index)}))
        held.enter_context(patch("eva_mim.run.stage.setup", lambda *_: CARD))
        held.enter_context(patch("eva_mim.core.distributed.run_on", lambda work, mine: {0: work()} if mine else {}))
        held.enter_context(patch.object(nn.Module, "to", module_to(nn.Module.to)))
        engine = "torch.autograd._engine_run_backward"
        held.enter_context(patch(engine, with_hooks(torch.autograd._engine_run_backward)))
        held.enter_context(patch("torch.cuda.Event", lambda **_: SimpleNamespace(**events)))
        held.enter_context(patch("torch.Generator", HostGenerator))
        held.enter_context(patch("torch.cuda.get_device_capability", lambda *_: (8, 0)))
        held.enter_context(patch("torch.random.fork_rng", partial(forked, torch.random.fork_rng)))
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
        held.callback(torch.distributed.destroy_process_group)
        held.enter_context(Card())
        held.enter_context(collectives)
        yield collectives


def as_rank_of_eight(module: str, words: list[str]) -> tuple[int, dict[str, int], list[int]]:
    """`python -m MODULE WORDS` with DeepSpeed, as one of eight processes on its card: its exit code, how often each collective
    was called, and the waits of each step."""
    from deepspeed.accelerator import get_accelerator

    from eva_mim.engine.deepspeed import DeepSpeedEngine

    with pretended_card() as collectives, ExitStack() as held:
        for name in ("device_name", "current_device_name", "current_device"):
            held.enter_context(patch.object(type(get_accelerator()), name, lambda *_: str(CARD)))
        held.enter_context(patch.object(DeepSpeedEngine, "step", collectives.counting(DeepSpeedEngine.step)))
        return import_module(module).main(words), collectives.seen, collectives.waits
