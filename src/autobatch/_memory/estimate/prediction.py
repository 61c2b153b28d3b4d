"""Peaks of memory at any batch size, from the events of a step: one polynomial per number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, Self

from autobatch._memory.estimate.allocator import CachingAllocator
from autobatch._memory.estimate.events import (
    Event,
    Kind,
    Phase,
    UntraceableError,
    in_fixed_order,
    in_place_sums,
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


class Fit(StrEnum):
    """Outcome of a step within a capacity."""

    PLAIN = "plain"
    FLUSHED = "flushed"  # the cache had to be emptied
    OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, slots=True)
class Peaks:
    """Peaks of memory, in bytes."""

    requested: int  # bytes of live tensors, workspaces and scratch memory
    allocated: int  # bytes of blocks in use, as `torch.cuda.max_memory_allocated`
    reserved: int  # bytes of segments, as `torch.cuda.max_memory_reserved`
    fit: Fit  # whether the step fits the capacity


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
        return list(in_fixed_order(in_place_sums(trace(step, size, gpu, deadline))))

    def peaks(self, batch_size: int) -> Peaks:
        """Return the peaks of all steps, without a limit of memory."""
        steps = self.steps(batch_size, None)
        return Peaks(
            max(peaks.requested for peaks in steps),
            max(peaks.allocated for peaks in steps),
            max(peaks.reserved for peaks in steps),
            Fit.PLAIN,
        )

    def steps(self, batch_size: int, capacity: int | None) -> list[Peaks]:
        """Return the peaks of each step, up to the one that runs out of memory."""
        if self.gpu is None:
            replay = _Replay(_Count(capacity), Gpu())
        else:
            replay = _Replay(self.allocator(capacity), self.gpu)
            for nbytes in self.gpu.workspaces:
                replay.hold(nbytes)
        return replay.run(self.events.at(batch_size))

    def largest(self, capacity: int, high: int) -> int:
        """Return the largest size up to `high` that runs plainly, within a thousandth; 0 if none.

        Memory may fall as the size grows: a larger size may fit too.
        """

        def fits(size: int) -> bool:
            return self.steps(size, capacity)[-1].fit is Fit.PLAIN

        low = min(SIZES[0], high)
        if not fits(low):
            return 0
        bad = min(2 * low, high + 1)
        while bad <= high and fits(bad):
            low, bad = bad, min(2 * bad, high + 1)
        while bad - low > max(1, low // 1000):
            middle = (low + bad) // 2
            low, bad = (middle, bad) if fits(middle) else (low, middle)
        return low


@dataclass
class _Count:
    """Allocator of a device that counts live bytes."""

    capacity: int | None
    allocated: int = 0
    peak_allocated: int = 0
    retries: ClassVar = 0

    @property
    def peak_reserved(self) -> int:
        return self.peak_allocated

    def allocate(self, nbytes: int) -> int | None:
        if self.capacity is not None and self.allocated + nbytes > self.capacity:
            return None
        self.allocated += nbytes
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return nbytes

    def free(self, block: int) -> None:
        self.allocated -= block

    def reset_peaks(self) -> None:
        self.peak_allocated = self.allocated


class _Replay:
    """Replay of events on an allocator."""

    def __init__(self, allocator: CachingAllocator | _Count, gpu: Gpu) -> None:
        self.allocator: Any = allocator
        self._gpu = gpu
        self._blocks: dict[int, _InUse] = {}
        self._requested = 0
        self._peak_requested = 0
        self._steps: list[Peaks] = []

    def hold(self, nbytes: int) -> None:
        """Allocate a block that stays."""
        self.allocator.allocate(nbytes)
        self._requested += nbytes
        self._peak_requested = self._requested

    def run(self, events: Iterable[Event]) -> list[Peaks]:
        for event in events:
            if event.kind is Kind.FREE:
                self._free(event.block)
            elif event.kind is Kind.PHASE:
                if event.name == Phase.END:
                    self._end_step(Fit.FLUSHED if self.allocator.retries else Fit.PLAIN)
            elif not self._allocate(event):
                self._end_step(Fit.OUT_OF_MEMORY)
                break
        return self._steps

    def _allocate(self, event: Event) -> bool:
        """Allocate, or hold scratch memory for a moment; False if memory ran out."""
        if event.kind is Kind.ALLOCATE:
            return self._take(event.block, event.numbers[0])
        scratch = sum_scratch(event.numbers, self._gpu)
        numbers = range(-1, -1 - len(scratch), -1)
        if not all(self._take(*each) for each in zip(numbers, scratch, strict=True)):
            return False
        for number in reversed(numbers):
            self._free(number)
        return True

    def _take(self, number: int, nbytes: int) -> bool:
        block = self.allocator.allocate(nbytes)
        if block is None:
            return False
        self._blocks[number] = _InUse(block, nbytes)
        self._requested += nbytes
        self._peak_requested = max(self._peak_requested, self._requested)
        return True

    def _free(self, number: int) -> None:
        used = self._blocks.pop(number)
        self._requested -= used.nbytes
        self.allocator.free(used.block)

    def _end_step(self, fit: Fit) -> None:
        allocator = self.allocator
        peaks = Peaks(self._peak_requested, allocator.peak_allocated, allocator.peak_reserved, fit)
        self._steps.append(peaks)
        allocator.reset_peaks()
        self._peak_requested = self._requested


class _InUse(NamedTuple):
    block: Any
    nbytes: int
