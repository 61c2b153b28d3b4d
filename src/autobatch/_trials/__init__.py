"""Run one batch size and measure it."""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from autobatch._trials.timing import pace, timed
from autobatch._trials.workload import OutOfMemory, Running, run_or_oom, uses_torch_compile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._memory import MemoryProbe, Watch
    from autobatch._trials.workload import Bench, Workload

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
        return replace(self, outcome=Outcome.FIT if self.peak <= budget else Outcome.OVER_BUDGET)


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
    ended = run_or_oom(lambda: _try(trial, workload, steps, bench), batch_size, bench)
    return replace(trial, error=ended.said) if isinstance(ended, OutOfMemory) else ended


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
    run = Running(workload, trial.batch_size, trial.accumulate)
    # A generator must be closed under the modes it was started under
    with probe.limited(allowed) as watch, contextlib.closing(run):
        with bench.first_touch():
            _warm_up(run, watch, bench)
            warm = probe.read()
            if watch or not uses_torch_compile():
                timing = pace(run, enough, watch, bench)
        if not watch and uses_torch_compile():
            run.step()  # kept eager while they were looked at, modules compile now
            timing = pace(run, enough, watch, bench)
    after = probe.read()
    ran = replace(
        _really_ran(trial, run),
        peak=after.peak,
        resident=before.reserved,
        profile=watch.profile if watch else (),
    )
    # The workload swallowed an error, or the allocator has to empty its cache time and again. Once, in the first
    # steps, it may: blocks of sizes that are new to it have to find their place
    if after.refused > before.refused or after.retries > warm.retries:
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
        timing = timed(workload, trial.batch_size, trial.accumulate, enough, bench)
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
    run = Running(workload, trial.batch_size, trial.accumulate)
    with bench.probe.limited(bench.budget()), contextlib.closing(run):
        with bench.first_touch():
            run.step()
        if uses_torch_compile():
            run.step()  # compiled, a convolution may be another one


def _warm_up(run: Running, watch: Watch | None, bench: Bench) -> None:
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


def _really_ran(trial: Trial, run: Running) -> Trial:
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
