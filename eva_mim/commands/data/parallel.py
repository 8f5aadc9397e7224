"""Work on the records of a source in several processes; a record that crashes its process is named."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

from eva_mim.core.contracts import Source
from eva_mim.core.errors import UserError
from eva_mim.core.processes import cores, pool_of
from eva_mim.data.quarantine import Fault

R = TypeVar("R")
Work = Callable[[Any, range], R]
"""Function of a source and a range of positions; it must be at the top of a module, since processes receive its name."""
AHEAD = 4
"""Ranges that are submitted in advance for each process."""

_source: Any = None


class RecordPool:
    """Pool of processes that each have a source open."""

    def __init__(self, source: Source, processes: int | None = None):
        """`processes`: number of processes, default one a core."""
        self._source, self._processes = source, processes or cores()
        self._pool = self._fresh()

    def _fresh(self) -> ProcessPoolExecutor:
        return pool_of(self._processes, _hold, self._source)

    def each(
        self, work: Work[R], ranges: Iterable[range], crashed: Callable[[int], R] | None = None
    ) -> Iterator[tuple[range, R]]:
        """Yields each range with its result, in order. If a process dies (in a decoder, or for lack of memory), the records of
        the range are processed one by one, and `crashed` returns the result of each record that ends its process again; without
        `crashed`, raises UserError."""
        left, waiting = iter(ranges), deque[tuple[range, Future[R]]]()
        while True:
            while len(waiting) < AHEAD * self._processes and (more := next(left, None)) is not None:
                waiting.append((more, self._submit(work, more)))
            if not waiting:
                return
            records, future = waiting.popleft()
            try:
                yield records, future.result()
            except BrokenProcessPool:
                if crashed is None:
                    raise UserError(f"a process died (killed, or out of memory?) near record {records.start}") from None
                for one in records:
                    yield range(one, one + 1), self._alone(work, one, crashed)
                waiting = deque((other, self._submit(work, other)) for other, _ in waiting)

    def records(self, work: Callable[[Any, int], R], ranges: Iterable[range]) -> Iterator[tuple[int, R | Fault]]:
        """Yields each record with the result of `work(source, record)` or its Fault, in order. Raises UserError if the error
        concerns more than one record."""

        def crashed(record: int) -> list[R | Fault]:
            return [Fault(self._source.key(record), "its decoder crashed")]

        for places, found in self.each(partial(_each_record, work), ranges, crashed):
            yield from zip(places, found, strict=True)

    def _submit(self, work: Work[R], records: range) -> Future[R]:
        try:
            return self._pool.submit(_call, work, records)
        except BrokenProcessPool:
            self._pool.shutdown()
            self._pool = self._fresh()
            return self._pool.submit(_call, work, records)

    def _alone(self, work: Work[R], record: int, crashed: Callable[[int], R]) -> R:
        try:
            return self._submit(work, range(record, record + 1)).result()
        except BrokenProcessPool:
            return crashed(record)

    def __enter__(self) -> RecordPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _hold(source: Source) -> None:
    global _source  # one source a process
    _source = source


def _call(work: Work[R], records: range) -> R:
    return work(_source, records)


def _each_record(work: Callable[[Any, int], R], source: Source, records: range) -> list[R | Fault]:
    found: list[R | Fault] = []
    for record in records:
        try:
            found.append(work(source, record))
        except UserError:
            raise
        except Exception as error:  # a record may be broken in any way
            found.append(Fault(source.key(record), f"{type(error).__name__}: {error}"))
    return found


def chunks(first: int, last: int, size: int) -> Iterator[range]:
    """Returns the integers first .. last - 1 in ranges of at most `size`."""
    return (range(start, min(start + size, last)) for start in range(first, last, size))
