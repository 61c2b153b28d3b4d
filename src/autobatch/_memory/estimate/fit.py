"""A step's events as a function of the batch size: one polynomial per number of each event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from autobatch._memory.estimate.events import Event, UntraceableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
