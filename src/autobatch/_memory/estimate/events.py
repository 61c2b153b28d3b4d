"""Events of a training step: allocations, releases, and kernels that need scratch memory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SCRATCH: Final = " (scratch memory)"  # ends the name of what is freed within its operator


class UntraceableError(Exception):
    """The memory of a step cannot be predicted; the message is the reason."""


class Kind(StrEnum):
    """Kind of an event."""

    ALLOCATE = "allocate"
    FREE = "free"
    SUM = "sum"  # a reduction, whose scratch memory depends on the device
    PHASE = "phase"  # the beginning of a part of the step


class Phase(StrEnum):
    """Part of a step."""

    BUILD = "build"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    END = "end"  # of a step


class Origin(StrEnum):
    """Use of memory that is held before the first step: the name of its allocation."""

    PARAMETERS = "parameters"
    OPTIMIZER_STATE = "optimizer state"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Event:
    """One event; all but `numbers` is the same at every batch size."""

    kind: Kind
    block: int  # number of the allocation; 0 for other events
    name: str  # the operator, or the phase that begins
    numbers: tuple[int, ...] = ()  # bytes of an allocation, or axes of a sum
    module: str = ""  # the module that allocates; empty if none is known


def in_fixed_order(events: Iterable[Event]) -> Iterator[Event]:
    """Yield the events with simultaneous releases sorted: autocast keeps its casts unordered."""
    for is_freed, group in groupby(events, key=lambda event: event.kind is Kind.FREE):
        together = list(group)
        yield from sorted(together, key=attrgetter("block")) if is_freed else together
