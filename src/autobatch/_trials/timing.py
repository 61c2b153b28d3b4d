"""Time updates and calls; count optimizer steps."""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from autobatch._trials.workload import OutOfMemory, Running, run_or_oom, uses_torch_compile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch._memory import Watch
    from autobatch._trials.workload import Bench, Workload

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timing:
    """Optimizer updates, timed one by one.

    Args:
        update_seconds: Seconds of each.
        optimizer_seconds: Seconds of the optimizer in each; empty where none stepped.
    """

    update_seconds: tuple[float, ...]
    optimizer_seconds: tuple[float, ...]

    @property
    def optimizer_median(self) -> float | None:
        """Median seconds of an optimizer step; None where none stepped."""
        seconds = self.optimizer_seconds
        return statistics.median(seconds) if seconds else None


def time_updates(
    workload: Workload,
    batch_size: int,
    *,
    accumulate: int,
    enough: Callable[[Sequence[float]], bool],
    bench: Bench,
) -> Timing | None:
    """Time optimizer updates of a size, under the cap where watching does not slow them down, until there are enough.

    `enough` is asked after each, with the seconds of all so far. None where it ran out of memory. An error that is
    not about memory passes through with a note.
    """
    ended = run_or_oom(
        lambda: _capped(lambda: timed(workload, batch_size, accumulate, enough, bench), bench),
        batch_size,
        bench,
    )
    return None if isinstance(ended, OutOfMemory) else ended


def time_calls(
    workload: Workload,
    batch_size: int,
    *,
    before: int,
    is_new: bool,
    enough: Callable[[Sequence[float]], bool],
    bench: Bench,
) -> Sequence[float] | None:
    """Time calls of a size one by one, under the cap where watching does not slow them down, until there are enough.

    The device is waited for each time, as a caller would. Calls that had to start the workload anew are left out, and
    so many `before` those that are timed, at least one, which find the device as another size left it. `is_new` tells
    whether modules that no one has seen yet may come up. None where it ran out of memory. An error
    that is not about memory passes through with a note.
    """
    looks = is_new and not uses_torch_compile()
    looking = bench.first_touch if looks else contextlib.nullcontext
    ended = run_or_oom(
        lambda: _capped(
            lambda: _called(Running(workload, batch_size, 1), before, looking, enough, bench),
            bench,
        ),
        batch_size,
        bench,
    )
    return None if isinstance(ended, OutOfMemory) else ended


def timed(
    workload: Workload,
    batch_size: int,
    accumulate: int,
    enough: Callable[[Sequence[float]], bool],
    bench: Bench,
) -> Timing:
    """Updates of a fresh start, timed after the first, which allocates what the others find there."""
    looking = contextlib.nullcontext if uses_torch_compile() else bench.first_touch
    run = Running(workload, batch_size, accumulate)
    with looking(), contextlib.closing(run):
        run.step()
        return pace(run, enough, None, bench)


def pace(
    run: Running,
    enough: Callable[[Sequence[float]], bool],
    watch: Watch | None,
    bench: Bench,
) -> Timing:
    """Take further steps until there are enough, each timed, and the optimizers within it."""
    clock, optimizers = bench.probe.clock, bench.optimizers
    stepped = optimizers.steps
    whole: list[float] = []
    inside: list[float] = []
    with optimizers.timing() as optimizer_seconds:
        while not enough(whole):
            if watch:
                watch.mark()
            began = clock()
            run.step()
            whole.append(clock() - began)
            inside.append(optimizer_seconds())
    if watch:
        watch.mark()
    return Timing(tuple(whole), tuple(inside) if optimizers.steps > stepped else ())


def _called(
    run: Running,
    before: int,
    looking: Callable[[], contextlib.AbstractContextManager[None]],
    enough: Callable[[Sequence[float]], bool],
    bench: Bench,
) -> Sequence[float]:
    clock = bench.probe.clock
    steady: list[float] = []
    anew: list[float] = []
    with contextlib.closing(run):
        with looking():
            run.step()
        for _ in range(1, before):
            run.step()
        # A workload may never get further than one call
        while not enough(steady) and not (anew and not steady and enough(anew)):
            starts, began = run.starts, clock()
            run.step()
            seconds = clock() - began
            (steady if run.starts == starts else anew).append(seconds)
    return steady or anew


def _capped(act: Callable[[], T], bench: Bench) -> T:
    """What it gives, under the cap of an allocator; a ledger would slow it down."""
    bench.probe.release()
    with bench.probe.limited(bench.budget()) as watch:
        if watch is None:
            return act()
    return act()
