"""Predicted memory as the guide of a search."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import torch

from autobatch._estimate.band import band_of
from autobatch._estimate.inputs import Inputs
from autobatch._memory.estimate.events import UntraceableError
from autobatch._memory.estimate.prediction import SIZES, MemoryEstimate
from autobatch._search.estimated import MAX_ERROR, EstimatedSearch
from autobatch._search.guided import GuidedBisection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._memory.estimate.prediction import Peaks
    from autobatch._memory.estimate.tracer import TrainingStep
    from autobatch._search import Search
    from autobatch._subject import Subject
    from autobatch._trials import Trial
    from autobatch._trials.runner import TrialRunner

# Seconds that predictions may take, or this share of the search so far where that is more
_SECONDS: Final = 10.0
_SHARE: Final = 0.1


class Guide:
    """A search that follows predicted memory while trials confirm it, or else measured memory.

    The step is traced after the first trial, unless the search ends there or goes to the largest
    size allowed. Each rank would run out of prediction time at another size, so only a single rank
    is guided.
    """

    def __init__(self, search: Search, subject: Subject, runner: TrialRunner) -> None:
        self._search = search  # on measured memory
        self._subject = subject
        self._runner = runner
        self._guided: EstimatedSearch | None = None
        # Words for the report; None where nothing was to be predicted
        self.followed: str | None = None

    def propose(self, trials: Sequence[Trial], *, start: int, high: int, budget: int) -> int | None:
        """Return an untried size from 1 to `high`, or None if the largest fit is the answer."""
        size = self._search.propose(trials, start=start, high=high, budget=budget)
        try:
            if len(trials) == 1 and self.followed is None and size not in (None, high):
                self._guided = self._confirmed(trials)
            if self._guided is not None and self._guided.is_trusted(trials):
                return self._guided.propose(trials, high=high, budget=budget)
        except UntraceableError as error:
            self._guided, self.followed = None, f"by measured memory: {error}"
        if self._guided is not None and not trials[-1].fits:
            failed = f"{trials[-1].batch_size:,} samples did not fit as predicted"
            self._guided, self.followed = None, f"by measured memory, since {failed}"
        return size

    def _confirmed(self, trials: Sequence[Trial]) -> EstimatedSearch | None:
        """Return a search on predictions that the first trial confirms; None if none are made."""
        search, runner = self._search, self._runner
        gpu_of = getattr(runner.context.probe, "gpu", None)
        if not isinstance(search, GuidedBisection) or not search.estimate or not trials[0].fits:
            return None
        if trials[0].profile:  # every allocation was seen, which predicts as much
            return None
        ranks = runner.context.ranks
        if gpu_of is None or ranks.world_size > 1 or ranks.as_if:
            return None
        seconds = max(_SECONDS, _SHARE * runner.time_limit.spent)
        if (left := runner.time_limit.left) is not None:
            seconds = min(seconds, left / 2)
        deadline = time.perf_counter() + seconds
        try:
            if (step := self._subject.traceable_step(trials[0].accumulate)) is None:
                return None
            estimate = MemoryEstimate.of(step, gpu_of(), deadline)
            timed = _Timed(estimate, deadline - time.perf_counter())
            share = error_of_peaks(step, estimate, runner.budget)
            guided = EstimatedSearch(timed, search.resolution, share)
            error = guided.error(trials)
        finally:
            runner.context.snapshot.restore()  # making batches may have changed state
            runner.gather(None)  # this time is no trial's
        if abs(error) > MAX_ERROR:
            raise UntraceableError(f"predicted bytes of the first trial were {error:+.0%} off")
        self.followed = "by predicted memory"
        return guided


def error_of_peaks(step: TrainingStep, estimate: MemoryEstimate, budget: int) -> float:
    """Return the largest error of predicted peaks near the budget, as a share of them."""
    if estimate.gpu is None:  # bytes are counted, and no allocator reserves more
        return MAX_ERROR
    precision = "bf16-mixed" if step.autocast is torch.bfloat16 else str(step.autocast)
    band = band_of(Inputs(step, precision), estimate.events.at(SIZES[0]), ())
    return band.share_at(budget)


class _Timed:
    """Predicted peaks, each computed once, until their time is over."""

    def __init__(self, estimate: MemoryEstimate, seconds: float) -> None:
        self._estimate = estimate
        self._seconds = seconds
        self._known: dict[int, Peaks] = {}

    def peaks(self, batch_size: int) -> Peaks:
        """Return the peaks at a batch size; `UntraceableError` if there is no time left."""
        if batch_size not in self._known:
            if self._seconds <= 0:
                raise UntraceableError("predicting peaks takes too long")
            began = time.perf_counter()
            self._known[batch_size] = self._estimate.peaks(batch_size)
            self._seconds -= time.perf_counter() - began
        return self._known[batch_size]
