"""Time updates and calls."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from autobatch._trials.workload import (
    FailureCleanup,
    RunningWorkload,
    note_size,
    uses_torch_compile,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from autobatch._memory import Watch
    from autobatch._trials.context import TrialContext
    from autobatch._trials.workload import SizedWorkload


@dataclass(frozen=True, slots=True)
class Timing:
    """Optimizer updates, timed one by one, in seconds."""

    update_seconds: tuple[float, ...]
    optimizer_seconds: tuple[float, ...]  # of the optimizer in each update; empty if none stepped


# (seconds of all updates or calls so far) -> True to end; called after each
Enough: TypeAlias = "Callable[[Sequence[float]], bool]"


def time_updates(sized: SizedWorkload, enough: Enough, context: TrialContext) -> Timing | None:
    """Time optimizer updates of one batch size, within the budget if that costs no time.

    None if the size failed; any other error passes through with a note.
    """
    with FailureCleanup(sized, context), _within_budget(context):
        return time_restarted(sized, enough, context)
    return None


def time_together(sized: SizedWorkload, enough: Enough, context: TrialContext) -> Timing:
    """Time updates of a size with real collectives, on all ranks in step.

    The same updates have just run with dry ones: what they took is in the cache of the allocator,
    which is not emptied, so that memory runs out on no rank while others wait in a collective.
    `enough` decides the same on all ranks.
    """
    try:
        return time_restarted(sized, enough, context)
    except BaseException as error:
        note_size(error, sized.batch_size)
        raise


def until(deadline: float, clock: Callable[[], float], *, updates: int) -> Enough:
    """Return a function that ends timing after a number of updates, or by a deadline after one."""
    return lambda seconds: bool(seconds) and (len(seconds) >= updates or clock() >= deadline)


def time_restarted(sized: SizedWorkload, enough: Enough, context: TrialContext) -> Timing:
    """Start the workload and time updates after the first, which allocates for all of them."""
    looking = contextlib.nullcontext if uses_torch_compile() else context.capturing_new_modules
    with looking(), RunningWorkload(sized) as run:
        run.step()
        return time_steps(run, enough, None, context)


def time_steps(
    run: RunningWorkload, enough: Enough, watch: Watch | None, context: TrialContext
) -> Timing:
    """Take steps until there are enough; time each of them, and the optimizers within it."""
    clock, optimizers = context.probe.clock, context.optimizers
    steps_before = optimizers.steps
    update_seconds: list[float] = []
    optimizer_seconds: list[float] = []
    with optimizers.timing() as seconds_since_last:
        while not enough(update_seconds):
            if watch:
                watch.mark()
            began = clock()
            run.step()
            update_seconds.append(clock() - began)
            optimizer_seconds.append(seconds_since_last())
            context.progress.stepped()
    if watch:
        watch.mark()
    has_stepped = optimizers.steps > steps_before
    return Timing(tuple(update_seconds), tuple(optimizer_seconds) if has_stepped else ())


def time_calls(
    sized: SizedWorkload, *, before: int, is_new: bool, enough: Enough, context: TrialContext
) -> Sequence[float] | None:
    """Return the seconds of calls of one batch size, within the budget if that costs no time.

    After each call the device is waited for, as a caller would. Calls that had to restart the
    workload are left out. None if memory ran out; any other error passes through with a note.

    Args:
        sized: A workload that yields after every answered batch, at that size.
        before: Calls to leave out at the beginning, at least one: they find the device in the
            state that another batch size left.
        is_new: Whether modules that were not captured yet may come up.
        enough: Ends the calls.
        context: Resources of the trials.
    """
    looks = is_new and not uses_torch_compile()
    looking = context.capturing_new_modules if looks else contextlib.nullcontext
    with FailureCleanup(sized, context), _within_budget(context), RunningWorkload(sized) as run:
        with looking():
            run.step()
        for _ in range(1, before):
            run.step()
        return _call_seconds(run, enough, context)
    return None


def _call_seconds(run: RunningWorkload, enough: Enough, context: TrialContext) -> Sequence[float]:
    clock = context.probe.clock
    steady: list[float] = []
    restarted: list[float] = []
    # Every call may restart a workload that ends after one
    while not enough(steady) and not (restarted and not steady and enough(restarted)):
        starts, began = run.starts, clock()
        run.step()
        seconds = clock() - began
        (steady if run.starts == starts else restarted).append(seconds)
        context.progress.stepped()
    return steady or restarted


@contextlib.contextmanager
def _within_budget(context: TrialContext) -> Iterator[None]:
    """Cap an allocator at the budget; do without a ledger, which would slow every operator down."""
    context.probe.release()
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(context.probe.limited(context.budget.read()))
        if watch is not None:
            stack.close()
        yield
