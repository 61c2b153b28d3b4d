"""Peaks of memory at any batch size, from the events of a step: one polynomial per number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from autobatch._memory.estimate.allocator import CachingAllocator, UncachedAllocator
from autobatch._memory.estimate.events import (
    Event,
    Kind,
    Phase,
    UntraceableError,
    in_fixed_order,
)
from autobatch._memory.estimate.scratch import Gpu, sum_scratch
from autobatch._memory.estimate.tracer import trace

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from autobatch._memory.estimate.tracer import TrainingStep

# Not 1, at which other kernels run; three points determine a parabola, and their distances are
# small enough that its coefficients are whole numbers over 6
SIZES: Final = (2, 3, 5)


@dataclass(frozen=True, slots=True)
class Parabola:
    """Parabola through values at batch sizes 2, 3 and 5, in Newton's form."""

    first: int
    linear: int
    sixfold_quadratic: int

    @classmethod
    def through(cls, values: Sequence[int]) -> Self:
        at_2, at_3, at_5 = values
        linear = at_3 - at_2
        return cls(at_2, linear, at_5 - at_3 - 2 * linear)

    def at(self, size: int) -> int:
        quadratic = self.sixfold_quadratic * (size - 2) * (size - 3) // 6
        return self.first + self.linear * (size - 2) + quadratic


@dataclass(frozen=True, slots=True)
class FittedEvents:
    """Events of a step at any batch size."""

    _first: tuple[Event, ...]
    _changes: dict[int, tuple[Parabola, ...]]  # by the index of the event

    @classmethod
    def through(cls, traces: Sequence[Sequence[Event]]) -> Self:
        """Fit traces at `SIZES`; refuse a step that does other things at another size."""
        if len(set(map(len, traces))) > 1:
            raise UntraceableError("the step runs other operators at other batch sizes")
        changes = {}
        for at, events in enumerate(zip(*traces, strict=True)):
            if len({(e.kind, e.block, e.name, len(e.numbers)) for e in events}) > 1:
                raise UntraceableError("the step runs other operators at other batch sizes")
            numbers = [event.numbers for event in events]
            if len(set(numbers)) > 1:
                changes[at] = tuple(map(Parabola.through, zip(*numbers, strict=True)))
        return cls(tuple(traces[0]), changes)

    def at(self, size: int) -> Iterator[Event]:
        """Yield the events at a batch size."""
        for index, event in enumerate(self._first):
            if index in self._changes:
                numbers = tuple(parabola.at(size) for parabola in self._changes[index])
                yield Event(event.kind, event.block, event.name, numbers, event.module)
            else:
                yield event


@dataclass(frozen=True, slots=True)
class Peaks:
    """Peaks of memory, in bytes."""

    requested: int  # bytes of live tensors, workspaces and scratch memory
    allocated: int  # bytes of blocks in use, as `torch.cuda.max_memory_allocated`
    reserved: int  # bytes of segments, as `torch.cuda.max_memory_reserved`


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Memory of a training step at any batch size."""

    events: FittedEvents
    gpu: Gpu | None  # the device; None for one that counts live tensors, without an allocator
    allocator: type[CachingAllocator] = CachingAllocator

    @classmethod
    def of(cls, step: TrainingStep, gpu: Gpu | None, deadline: float = math.inf) -> Self:
        """Trace a step; `UntraceableError` if its memory cannot be predicted by the deadline."""
        traces = [cls.traced(step, size, gpu, deadline) for size in SIZES]
        return cls(FittedEvents.through(traces), gpu)

    @staticmethod
    def traced(
        step: TrainingStep, size: int, gpu: Gpu | None, deadline: float = math.inf
    ) -> list[Event]:
        """Return the events at one size, as they would be on the device, in a fixed order."""
        return list(in_fixed_order(trace(step, size, gpu, deadline)))

    def peaks(self, batch_size: int) -> Peaks:
        """Return the peaks of all steps together."""
        steps = self.steps(batch_size)
        return Peaks(
            max(peaks.requested for peaks in steps),
            max(peaks.allocated for peaks in steps),
            max(peaks.reserved for peaks in steps),
        )

    def steps(self, batch_size: int) -> list[Peaks]:
        """Return the peaks of each step."""
        allocator = UncachedAllocator() if self.gpu is None else self.allocator()
        for nbytes in self.gpu.workspaces if self.gpu else ():
            allocator.allocate(nbytes)
        return list(_replayed(self.events.at(batch_size), allocator, self.gpu or Gpu()))

    def largest(self, capacity: int, high: int) -> int:
        """Return the largest size up to `high` that reserves no more, within a thousandth, or 0.

        Memory may fall as the size grows: a larger size may fit too.
        """

        def fits(size: int) -> bool:
            return self.peaks(size).reserved <= capacity

        low = min(SIZES[0], high)
        if not fits(low):
            return int(fits(1))
        bad = min(2 * low, high + 1)
        while bad <= high and fits(bad):
            low, bad = bad, min(2 * bad, high + 1)
        while bad - low > max(1, low // 1000):
            middle = (low + bad) // 2
            low, bad = (middle, bad) if fits(middle) else (low, middle)
        return low


def _replayed(events: Iterable[Event], allocator: CachingAllocator, gpu: Gpu) -> Iterator[Peaks]:
    """Yield the peaks of each step in a replay of its events."""
    blocks: dict[int, Any] = {}  # no capacity: there is a block for every request
    for event in events:
        if event.kind is Kind.ALLOCATE:
            blocks[event.block] = allocator.allocate(event.numbers[0])
        elif event.kind is Kind.FREE:
            allocator.free(blocks.pop(event.block))
        elif event.kind is Kind.SUM:
            held: list[Any] = [allocator.allocate(each) for each in sum_scratch(event.numbers, gpu)]
            for block in reversed(held):
                allocator.free(block)
        elif event.name == Phase.END:
            yield Peaks(allocator.peak_requested, allocator.peak_allocated, allocator.peak_reserved)
            allocator.reset_peaks()
