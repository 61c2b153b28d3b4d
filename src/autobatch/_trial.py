"""One batch size, tried: run real steps, count them, time them, name the outcome."""

from __future__ import annotations

import contextlib
import gc
import operator
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from autobatch._memory import is_oom
from autobatch.errors import ShortTrialError

if TYPE_CHECKING:
    from autobatch._memory import MemoryProbe, Watch
    from autobatch._optimizers import OptimizerWatch

__all__ = [
    "Bench",
    "Outcome",
    "Timing",
    "Trial",
    "Workload",
    "recover",
    "run_trial",
    "time_calls",
    "time_updates",
]

T = TypeVar("T")

# (batch size, accumulation) -> a training loop that yields after every optimizer step
Workload: TypeAlias = Callable[[int, int], Iterator[Any]]

# Steps granted until an optimizer has really stepped: a GradScaler may skip the first dozen while its scale settles.
_WARM_UP: Final = 20


class Outcome(StrEnum):
    """How a trial ended."""

    FIT = "fit"
    OVER_BUDGET = "over_budget"
    OUT_OF_MEMORY = "out_of_memory"
    REFUSED = "refused"  # an error of the workload's own, below a size that ran: too small for it


@dataclass(frozen=True, slots=True)
class Trial:
    """What running one batch size showed.

    Args:
        batch_size: Samples per forward pass.
        outcome: How it ended.
        peak: Most memory this process held during the trial, in bytes; None when it did not end.
        step_seconds: Seconds per micro-batch, its share of the optimizer step included; None when not timed. Of a size
            that the speed curve had no time for they may be longer, since its memory was watched meanwhile.
        accumulate: Micro-batches per optimizer step in this trial.
        optimizer_seconds: Seconds of one optimizer step; None when not timed.
        resident: Bytes this process held when the trial began.
        profile: Bytes held after each allocation of the last step, where the probe keeps a ledger.
        error: What the failure said, where there was one.
    """

    batch_size: int
    outcome: Outcome
    peak: int | None = None
    step_seconds: float | None = None
    accumulate: int = 1
    optimizer_seconds: float | None = None
    resident: int = 0
    profile: tuple[int, ...] = ()
    error: str | None = None

    @property
    def fits(self) -> bool:
        """Whether it ran and stayed in the budget."""
        return self.outcome is Outcome.FIT

    @property
    def samples_per_second(self) -> float | None:
        """Samples per second of one device."""
        return self.batch_size / self.step_seconds if self.step_seconds else None

    def judged(self, budget: int) -> Trial:
        """The same trial under another budget, in bytes."""
        if self.peak is None or self.outcome not in (Outcome.FIT, Outcome.OVER_BUDGET):
            return self
        return replace(
            self, outcome=Outcome.FIT if self.peak <= budget else Outcome.OVER_BUDGET
        )


class _Run:
    """A running workload: its steps counted, started again when it ends after at least one of them."""

    def __init__(self, workload: Workload, batch_size: int, accumulate: int) -> None:
        self.steps = 0
        self.starts = 1
        self.counts: list[int] = []  # samples of its micro-batches, where it says
        self.accumulate = accumulate
        self._start: Callable[[], Iterator[Any]] = partial(
            workload, batch_size, accumulate
        )
        self._batch_size = batch_size
        self._steps = self._start()

    def step(self) -> None:
        try:
            said = next(self._steps)
        except StopIteration:
            self._steps = self._start()
            self.starts += 1
            try:
                said = next(self._steps)
            except StopIteration:
                raise self._too_short() from None
        self.steps += 1
        count = _count(said)
        if count is not None:
            self.counts.append(count)

    def close(self) -> None:
        if hasattr(self._steps, "close"):
            self._steps.close()

    def _too_short(self) -> ShortTrialError:
        return ShortTrialError(
            f"The workload ended after {self.steps} optimizer steps at batch_size={self._batch_size}, without "
            "yielding again when it was started anew. A trial that runs no step proves nothing: yield after every "
            "optimizer step, or after every answer."
        )


@dataclass(frozen=True, slots=True)
class Bench:
    """What trials run on.

    Args:
        probe: The device.
        budget: Reads how many bytes this process may hold now.
        optimizers: Counts and times optimizer steps.
        first_touch: Watches for modules that no one has seen yet.
        times_later: Whether sizes are timed after all trials, so that a trial need not do it.
    """

    probe: MemoryProbe
    budget: Callable[[], int]
    optimizers: OptimizerWatch
    first_touch: Callable[[], contextlib.AbstractContextManager[None]]
    times_later: bool = False


def run_trial(
    workload: Workload, batch_size: int, *, accumulate: int, steps: int, bench: Bench
) -> Trial:
    """Run one batch size for `steps` optimizer steps under a cap, and say how it went.

    Where watching memory slows the steps down, they are run once more without, and those are timed, unless that is
    done later. The budget is read before and after, since others may take memory meanwhile. An error that is not about
    memory passes through with a note; `ShortTrialError` when the workload ends early; `ValueError` when it runs more
    samples than it was given.
    """
    trial = Trial(batch_size, Outcome.OUT_OF_MEMORY, accumulate=accumulate)
    ended = _survived(lambda: _try(trial, workload, steps, bench), batch_size, bench)
    return (
        replace(trial, error=ended.said) if isinstance(ended, _OutOfMemory) else ended
    )


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
    ended = _survived(
        lambda: _capped(
            lambda: _timed(workload, batch_size, accumulate, enough, bench), bench
        ),
        batch_size,
        bench,
    )
    return None if isinstance(ended, _OutOfMemory) else ended


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
    looks = is_new and not _compiles()
    looking = bench.first_touch if looks else contextlib.nullcontext
    ended = _survived(
        lambda: _capped(
            lambda: _called(
                _Run(workload, batch_size, 1), before, looking, enough, bench
            ),
            bench,
        ),
        batch_size,
        bench,
    )
    return None if isinstance(ended, _OutOfMemory) else ended


def _called(
    run: _Run,
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


@dataclass(frozen=True, slots=True)
class _OutOfMemory:
    said: str


def _survived(act: Callable[[], T], batch_size: int, bench: Bench) -> T | _OutOfMemory:
    """What it gives; where that ran out of memory, nothing of it is left."""
    try:
        return act()
    except Exception as error:
        if not is_oom(error):
            error.add_note(f"autobatch was trying batch_size={batch_size}")
            raise
        ended = _OutOfMemory(_first_line(error))
        _forget(error)
    except BaseException as error:
        error.add_note(f"autobatch was trying batch_size={batch_size}")
        raise
    _empty_autograd(bench.probe)
    gc.collect()
    bench.probe.release()
    return ended


def _capped(act: Callable[[], T], bench: Bench) -> T:
    """What it gives, under the cap of an allocator; a ledger would slow it down."""
    bench.probe.release()
    with bench.probe.limited(bench.budget()) as watch:
        if watch is None:
            return act()
    return act()


def _try(trial: Trial, workload: Workload, steps: int, bench: Bench) -> Trial:
    probe = bench.probe
    # The first step allocates optimizer state, and is slower: it is not timed
    further = max(1, steps - 1)

    def enough(taken: Sequence[float]) -> bool:
        return len(taken) == further

    if _tries_algorithms(probe):
        _settle(trial, workload, bench)
    probe.release()
    allowed = bench.budget()
    before = probe.read()
    run = _Run(workload, trial.batch_size, trial.accumulate)
    # A generator must be closed under the modes it was started under
    with probe.limited(allowed) as watch, contextlib.closing(run):
        with bench.first_touch():
            _warm_up(run, watch, bench)
            if watch or not _compiles():
                timing = _pace(run, enough, watch, bench)
        if not watch and _compiles():
            run.step()  # kept eager while they were looked at, modules compile now
            timing = _pace(run, enough, watch, bench)
    after = probe.read()
    ran = replace(
        _really_ran(trial, run),
        peak=after.peak,
        resident=before.reserved,
        profile=watch.profile if watch else (),
    )
    if after.failures > before.failures:
        # The workload swallowed an error, or the allocator had to retry: not a fit
        return replace(ran, outcome=Outcome.OUT_OF_MEMORY, peak=None)
    if watch and not watch.profile:
        raise ValueError(
            f"The workload allocated no memory at all in a step at batch_size={trial.batch_size}; "
            "it must run a step each time it yields: train on a batch, or answer one."
        )
    ran = replace(ran, outcome=Outcome.FIT).judged(bench.budget())
    if not ran.fits:
        return ran
    if watch is not None and not bench.times_later:
        # Watching every operator slows a step down
        timing = _timed(workload, trial.batch_size, trial.accumulate, enough, bench)
    return replace(
        ran,
        step_seconds=statistics.median(timing.update_seconds) / trial.accumulate,
        optimizer_seconds=timing.optimizer_median,
    )


def _tries_algorithms(probe: MemoryProbe) -> bool:
    """Whether cuDNN tries its algorithms on every size that is new to it, to keep the fastest."""
    import torch

    on_cuda = str(getattr(probe, "device", "")).startswith("cuda")
    return on_cuda and bool(torch.backends.cudnn.benchmark)


def _settle(trial: Trial, workload: Workload, bench: Bench) -> None:
    """Let cuDNN choose, ahead of the steps that are judged.

    It asks for the workspace of each algorithm, by what the device has free and not by any cap, and for less where
    that is refused; then it empties the cache (torch 2.13, Conv_v8.cpp). In training that happens once for each size:
    neither these refusals nor that peak say anything of whether a size fits.
    """
    bench.probe.release()
    run = _Run(workload, trial.batch_size, trial.accumulate)
    with bench.probe.limited(bench.budget()), contextlib.closing(run):
        with bench.first_touch():
            run.step()
        if _compiles():
            run.step()  # compiled, a convolution may be another one


def _timed(
    workload: Workload,
    batch_size: int,
    accumulate: int,
    enough: Callable[[Sequence[float]], bool],
    bench: Bench,
) -> Timing:
    """Updates of a fresh start, timed after the first, which allocates what the others find there."""
    looking = contextlib.nullcontext if _compiles() else bench.first_touch
    run = _Run(workload, batch_size, accumulate)
    with looking(), contextlib.closing(run):
        run.step()
        return _pace(run, enough, None, bench)


def _warm_up(run: _Run, watch: Watch | None, bench: Bench) -> None:
    """Take the first step, and go on until optimizer state exists: the first real optimizer step allocates it."""
    optimizers = bench.optimizers
    stepped = optimizers.steps
    for _ in range(_WARM_UP):
        if watch:
            watch.mark()
        with optimizers.watching(run.accumulate):
            run.step()
        if optimizers.steps > stepped or not optimizers.expected:
            return
    optimizers.expected = optimizers.steps > 0


def _compiles() -> bool:
    """Whether torch.compile is in use: a hook that looks at modules would then break graphs."""
    return "torch._dynamo" in sys.modules


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


def _pace(
    run: _Run,
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


def _really_ran(trial: Trial, run: _Run) -> Trial:
    """The trial under the size that the workload really reached, where it says so."""
    counts = set(run.counts)
    most = max(counts, default=trial.batch_size)
    if most == trial.batch_size:
        return trial
    if most > trial.batch_size or most < 1 or len(counts) > 1:
        raise ValueError(
            f"The workload yielded {_listed(counts)} at batch_size={trial.batch_size}; it must make micro-batches of "
            "the size it is given, and yield how many samples the last one had, or nothing."
        )
    return replace(trial, batch_size=most)


def _listed(counts: set[int]) -> str:
    first = [str(count) for count in sorted(counts)[:3]]
    return ", ".join(first) + (", …" if len(counts) > len(first) else "")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _count(said: Any) -> int | None:
    """What was yielded, where it is a count: an int, also one of numpy's."""
    if isinstance(said, bool) or not hasattr(said, "__index__"):
        return None
    try:
        return operator.index(said)
    except TypeError:  # a tensor of a loss
        return None


def recover(error: Exception, probe: MemoryProbe) -> None:
    """Let go of what a failed step holds, and give its memory back."""
    _forget(error)
    _empty_autograd(probe)
    gc.collect()
    probe.release()


def _forget(error: BaseException) -> None:
    """Let go of what the failed step left in its frames, along the whole chain of causes."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        pending += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]


def _empty_autograd(probe: MemoryProbe) -> None:
    """Run a tiny backward: one that failed leaves activations in autograd's queue until the next on its thread."""
    import torch

    from autobatch._ledger import unobserved

    # On the CPU that is this thread; a CUDA device has one of its own
    ours = [getattr(probe, "device", "cpu")] if torch.cuda.is_initialized() else []
    with unobserved(), torch.enable_grad():
        for device in {"cpu", *ours}:
            torch.ones(1, device=device, requires_grad=True).sum().backward()
