"""Copies in the host's memory, from a GPU that is pretended: it makes them at once or as late as it may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from eva_mim.core.host_copy import to_host
from tests.pretended import Card, OnCard, applied, on_card, on_host

VALUES = [
    torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
    torch.tensor(3.5, dtype=torch.float64),
    torch.arange(1000, dtype=torch.int64),
    torch.empty(0, 4),
    torch.tensor([True, False, True]),
    torch.randn(3, 8, 5, 5).to(memory_format=torch.channels_last).bfloat16(),
    torch.randn(6, 4).T,
]


class Stream:
    """What a GPU has been told. It does it at once, or when the host waits for an event that comes after."""

    def __init__(self, late: bool) -> None:
        self.late = late
        self.told: list[Callable[[], Any]] = []
        self.done = 0

    def tell(self, work: Callable[[], Any]) -> None:
        self.told.append(work)
        if not self.late:
            self.until(len(self.told))

    def until(self, place: int) -> None:
        while self.done < place:
            self.told[self.done]()
            self.done += 1

    def event(self) -> Any:
        """As `torch.cuda.Event()`."""
        stream = self

        class Event:
            def record(self) -> None:
                self.place = len(stream.told)

            def synchronize(self) -> None:
                stream.until(self.place)

        return Event()


class Late(Card):
    """Copies from the card to pinned memory are made by the stream."""

    def __init__(self, stream: Stream):
        super().__init__()
        self.stream = stream

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if getattr(function, "__name__", "") == "copy_" and (keywords or {}).get("non_blocking"):
            target, source = arguments
            taken = on_host(source)
            self.stream.tell(lambda: on_host(target).copy_(taken))
            return target
        return applied(function, arguments, keywords or {})


@pytest.mark.parametrize("pinned", [32, 64, 1024, 1 << 20])
@pytest.mark.parametrize("late", [False, True])
def test_every_bit_of_every_kind(late: bool, pinned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces smaller and larger than the tensors. A half that is read too early or filled too early holds other bytes."""
    stream = Stream(late)
    monkeypatch.setattr("torch.cuda.Event", stream.event)
    with Late(stream):
        copies = to_host([on_card(value.clone()) for value in VALUES], pinned)
        assert not any(isinstance(copy, OnCard) for copy in copies)
    for value, copy in zip(VALUES, copies, strict=True):
        assert copy.dtype == value.dtype
        assert torch.equal(copy, value)
