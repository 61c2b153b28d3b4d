"""Events of a training step: allocations, releases, and kernels that need scratch memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_ADD: Final = "aten.add.Tensor"
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


def in_place_sums(events: Sequence[Event]) -> list[Event]:
    """Return the events with sums written into an operand that dies with the addition.

    Autograd adds gradients in place, and a linear layer its bias, but not below a dispatch mode
    (torch 2.13, `isTensorSubclassLike` in accumulate_grad and in Linear.cpp).
    """
    kept: list[Event] = []
    phase: str = Phase.BUILD
    same_as: dict[int, int] = {}
    numbers: dict[int, tuple[int, ...]] = {}
    for event in events:
        if event.kind is Kind.PHASE:
            phase = event.name
        elif event.kind is Kind.ALLOCATE:
            numbers[event.block] = event.numbers
        elif event.kind is Kind.FREE:
            block = same_as.get(event.block, event.block)
            if numbers[block] == _sum(kept) and _may_be_written_into(event, kept, phase):
                same_as[kept.pop().block] = block
            else:
                kept.append(replace(event, block=block))
            continue
        kept.append(event)
    return kept


def _sum(events: Sequence[Event]) -> tuple[int, ...] | None:
    """Return the size of the result that an addition allocated just now."""
    last = events[-1] if events else None
    is_sum = last is not None and last.kind is Kind.ALLOCATE and last.name == _ADD
    return last.numbers if last is not None and is_sum else None


def _may_be_written_into(freed: Event, before: Sequence[Event], phase: str) -> bool:
    """Return True for a gradient, and for the product in a linear layer."""
    if freed.name != _ADD or phase == Phase.BACKWARD:
        return freed.name == _ADD
    product = before[-2] if len(before) > 1 else None
    if product is None or product.name != "aten.mm.default":
        return False
    return phase == Phase.FORWARD and product.block == freed.block


def in_fixed_order(events: Iterable[Event]) -> Iterator[Event]:
    """Yield the events with simultaneous releases sorted: autocast keeps its casts unordered."""
    for is_freed, group in groupby(events, key=lambda event: event.kind is Kind.FREE):
        together = list(group)
        yield from sorted(together, key=attrgetter("block")) if is_freed else together
