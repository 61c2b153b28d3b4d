"""Run one batch size and measure it."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from autobatch._trials import Outcome, Trial
from autobatch._trials.timing import time_restarted, time_steps, until
from autobatch._trials.workload import FailureCleanup, RunningWorkload, uses_torch_compile

if TYPE_CHECKING:
    from autobatch._memory import MemoryProbe, MemoryReading, Watch
    from autobatch._trials.context import TrialContext
    from autobatch._trials.workload import SizedWorkload

# Steps until an optimizer has really stepped: a GradScaler may skip the first dozen while its
# scale settles
_MAX_WARM_UP_STEPS: Final = 20


def run_trial(
    sized: SizedWorkload, *, steps: int, is_timed: bool, deadline: float, context: TrialContext
) -> Trial:
    """Run one batch size within the budget, and measure its memory and time.

    The budget is read before and after, since other processes may take memory meanwhile.

    Args:
        sized: The workload at that size.
        steps: Optimizer steps to run.
        is_timed: Whether to run the steps once more if watching memory slows them down.
        deadline: Reading of the device's clock after which no step begins but those that any trial
            needs: one to warm up, and one that is timed.
        context: Resources of the trials.

    Raises:
        ShortTrialError: The workload ended before its first step.
        ValueError: The workload ran more samples than it was given, or allocated no memory.
        Exception: Any other error of the workload, with a note.
    """
    probe = context.probe
    trial = Trial(sized.batch_size, Outcome.FIT, accumulate=sized.accumulate)
    failure = FailureCleanup(sized, context)

    # The first step allocates optimizer state, and is slower: it is not timed
    enough = until(deadline, probe.clock, updates=steps - 1)
    with failure:
        if _cudnn_selects_algorithms(probe):
            _let_cudnn_select(sized, context)
        probe.release()
        budget = context.budget.read()
        before = probe.read()
        run = RunningWorkload(sized)
        # A generator must be closed under the modes it was started under
        with probe.limited(budget) as watch, run:
            with context.capturing_new_modules():
                warm_up(run, watch, deadline, context)
                warm = probe.read()
                # The hooks that capture modules would break graphs of torch.compile
                is_timed_under_hooks = watch is not None or not uses_torch_compile()
                if is_timed_under_hooks:
                    timing = time_steps(run, enough, watch, context)
            if not is_timed_under_hooks:
                run.step()  # hooks are gone: modules that ran eagerly until now compile
                timing = time_steps(run, enough, watch, context)
    if failure.outcome is not None:
        return replace(trial, outcome=failure.outcome, error=failure.message)
    measured = measure_memory(trial, run, before, warm, watch, context)
    if not measured.fits:
        return measured
    if watch is not None and is_timed and probe.clock() < deadline:
        # The watch slows every operator down: time again without it
        with failure:
            timing = time_restarted(sized, enough, context)
        if failure.outcome is not None:
            return replace(trial, outcome=failure.outcome, error=failure.message)
    optimizer = timing.optimizer_seconds
    return replace(
        measured,
        step_seconds=statistics.median(timing.update_seconds) / trial.accumulate,
        optimizer_seconds=statistics.median(optimizer) if optimizer else None,
    )


def warm_up(
    run: RunningWorkload, watch: Watch | None, deadline: float, context: TrialContext
) -> None:
    """Take steps until optimizer state exists: the first real optimizer step allocates it."""
    optimizers = context.optimizers
    steps_before = optimizers.steps
    for _ in range(_MAX_WARM_UP_STEPS):
        if watch:
            watch.mark()
        with optimizers.watching(run.accumulate):
            run.step()
        context.progress.stepped()
        if optimizers.steps > steps_before or not optimizers.expected:
            return
        if context.probe.clock() >= deadline:
            break
    # If no optimizer ever stepped, later trials need not wait for one
    optimizers.expected = optimizers.steps > 0


def measure_memory(
    trial: Trial,
    run: RunningWorkload,
    before: MemoryReading,
    warm: MemoryReading,
    watch: Watch | None,
    context: TrialContext,
) -> Trial:
    """Return the trial with its peak memory, and an outcome by the budget that holds now."""
    after = context.probe.read()
    # Retries during warm-up are harmless: blocks of new sizes need room. Later ones, or a failure
    # that the workload caught, mean that the size does not fit
    has_failed = after.refused > before.refused or after.retries > warm.retries
    measured = replace(
        trial,
        batch_size=_samples_run(trial, run),
        outcome=Outcome.OUT_OF_MEMORY if has_failed else Outcome.FIT,
        peak=None if has_failed else after.peak,
        allocated=None if has_failed else after.allocated,
        requested=None if has_failed else after.requested,
        resident=before.reserved,
        profile=watch.profile if watch else (),
    )
    if has_failed:
        return measured
    if watch and not watch.profile:
        raise ValueError(
            "The workload allocated no memory at all in a step at "
            f"batch_size={trial.batch_size}; it must run a step each time it yields: train on a "
            "batch, or answer one."
        )
    return measured.judged(context.budget.read())


def _cudnn_selects_algorithms(probe: MemoryProbe) -> bool:
    """Return whether cuDNN benchmarks its algorithms for every new size, to keep the fastest."""
    import torch

    on_cuda = str(getattr(probe, "device", "")).startswith("cuda")
    return on_cuda and bool(torch.backends.cudnn.benchmark)


def _let_cudnn_select(sized: SizedWorkload, context: TrialContext) -> None:
    """Let cuDNN select algorithms before the steps that are measured.

    It sizes workspaces by the free memory of the device and ignores the cap; if refused, it asks
    for less and empties the cache (torch 2.13, Conv_v8.cpp). In training that happens once for each
    size: neither these failures nor that peak show whether a size fits.
    """
    context.probe.release()
    run = RunningWorkload(sized)
    with context.probe.limited(context.budget.read()), run:
        with context.capturing_new_modules():
            run.step()
        if uses_torch_compile():
            run.step()  # compiled, a convolution may be another one


def _samples_run(trial: Trial, run: RunningWorkload) -> int:
    """Return the batch size that the workload reached, if it yields it."""
    counts = set(run.sample_counts)
    most = max(counts, default=trial.batch_size)
    if most == trial.batch_size:
        return most
    if most > trial.batch_size or most < 1 or len(counts) > 1:
        raise ValueError(
            f"The workload yielded {_listed(counts)} at batch_size={trial.batch_size}; it must "
            "make micro-batches of the size it is given, and yield the number of samples in the "
            "last one, or nothing."
        )
    return most


def _listed(counts: set[int]) -> str:
    first = [str(count) for count in sorted(counts)[:3]]
    return ", ".join(first) + (", …" if len(counts) > len(first) else "")
