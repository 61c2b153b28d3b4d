"""Time several batch sizes in turns."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from autobatch._throughput import CurvePoint, StepTimes
from autobatch._throughput.loading import Loading, loading_watch
from autobatch._throughput.points import noise_of, point
from autobatch._trials import is_selective, latest_by_size
from autobatch._trials.timing import time_together, time_updates

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from autobatch._throughput.preference import Preference
    from autobatch._trials import Trial
    from autobatch._trials.runner import Accumulation, TrialRunner
    from autobatch._trials.timing import Timing

# Updates that are timed in one turn of a batch size: noise of the machine then falls on a turn of
# several sizes, not on all turns of one
_MIN_UPDATES: Final = 3
_FEWEST_UPDATES: Final = 2  # of a turn that is out of time
_MAX_UPDATES: Final = 10
_TURN_SECONDS: Final = 0.5
# Updates shorter than the scheduler's time slices need a longer turn
_MIN_TURN_SECONDS: Final = 0.02
_MAX_QUICK_UPDATES: Final = 100
_MAX_TURNS: Final = 12  # of a size whose speed is in doubt
_EXACT_SIZES: Final = 3  # additional sizes that give the target exactly

_NO_LOADING: Final = Loading(wait_seconds=0.0, step_seconds=0.0, batches=0)


@dataclass(frozen=True, slots=True)
class TimingLimit:
    """The seconds that timing sizes may take."""

    seconds: float = 0.0
    share: str = ""  # of which time this is a share; "" for a fixed number of seconds


@dataclass(frozen=True, slots=True)
class Throughput:
    """Measured throughput of several batch sizes."""

    curve: tuple[CurvePoint, ...] = ()  # ascending
    unreached: tuple[int, ...] = ()  # sizes that there was no time for
    # Results of all ranks in trials that ran for the curve only, by batch size
    unrecorded: Mapping[int, Sequence[Trial]] = field(default_factory=dict)
    waited: Loading = _NO_LOADING  # for data, during the timed updates
    seconds: float = 0.0  # spent on the curve
    seconds_left: float = 0.0  # of the time for the curve

    @property
    def loading(self) -> Loading | None:
        """Time spent waiting for data; None if no loader was read."""
        return self.waited if self.waited.batches else None

    def with_times(self, trial: Trial) -> Trial:
        """Return a trial with the times of the curve, which no watch on memory slowed down."""
        points = (point for point in self.curve if point.batch_size == trial.batch_size)
        point = next(points, None)
        if point is None or not trial.fits or point.accumulate != trial.accumulate:
            return trial
        seconds, optimizer = point.step_seconds, point.optimizer_seconds
        return replace(trial, step_seconds=seconds, optimizer_seconds=optimizer)


def measure_throughput(
    runner: TrialRunner, seconds: float, preference: Preference | None
) -> Throughput:
    """Time the sizes that fit and some below, in turns, until the choice of one is settled.

    All of it may take `seconds`. Without a preference speed does not decide.
    """
    if not runner.fitting or not seconds:
        return Throughput()
    with runner.time_limit.excluded():
        timer = _UpdateTimer(runner, seconds)
        sizes = runner.fitting
        if not is_selective(runner.trials):
            sizes = _curve_sizes(sizes, runner.accumulation)
        unrecorded = _run_missing(sizes, timer)
        tried = {trial.batch_size: trial for trial in runner.trials if trial.fits}
        tried |= {size: runner.merge(results) for size, results in unrecorded.items()}
        failed = {size for size, trial in tried.items() if not trial.fits}
        fitting = [tried[size] for size in sizes if size in tried and size not in failed]
        curve = timer.points(fitting, preference)
    done = {*failed, *timer.failed, *(point.batch_size for point in curve)}
    return Throughput(
        curve=curve,
        unreached=tuple(size for size in sizes if size not in done),
        unrecorded=unrecorded,
        waited=timer.waited,
        seconds=timer.seconds_spent,
        seconds_left=timer.seconds_left,
    )


def _run_missing(sizes: Sequence[int], timer: _UpdateTimer) -> dict[int, Sequence[Trial]]:
    """Run trials of the sizes that the search did not run, as long as half of the time is left."""
    runner = timer.runner
    trial_seconds = runner.time_limit.seconds_of(runner.fitting[-1])
    unrecorded: dict[int, Sequence[Trial]] = {}
    for size in reversed(sizes):
        if size in runner.fitting or not timer.has_time(trial_seconds + timer.seconds / 2):
            continue
        results = runner.run_unrecorded(size, timer.seconds_left)
        if all(trial.batch_size == size for trial in results):
            unrecorded[size] = results
        else:
            timer.failed.add(size)  # the workload cannot fill it
    return unrecorded


def add_to_curve(throughput: Throughput, runner: TrialRunner, batch_size: int) -> Throughput:
    """Time one more size, which was run since, if there is time left."""
    reached = {each.batch_size for each in throughput.curve}
    if not reached or batch_size in {*reached, *throughput.unreached}:
        return throughput
    trial = latest_by_size(runner.trials)[batch_size]
    with runner.time_limit.excluded():
        timer = _UpdateTimer(runner, throughput.seconds_left)
        added = timer.points([trial], None)
    if not added:
        return replace(throughput, unreached=(*throughput.unreached, batch_size))
    return replace(
        throughput,
        curve=tuple(sorted((*throughput.curve, *added), key=lambda each: each.batch_size)),
        waited=throughput.waited + timer.waited,
        seconds=throughput.seconds + timer.seconds_spent,
    )


class _UpdateTimer:
    """Times updates on every rank, within a limit of seconds."""

    def __init__(self, runner: TrialRunner, seconds: float) -> None:
        self.runner = runner
        self.seconds = seconds
        self.failed: set[int] = set()  # sizes that cannot be timed
        self.waited = _NO_LOADING
        self._began = runner.time_limit.now

    @property
    def seconds_spent(self) -> float:
        return self.runner.time_limit.now - self._began

    @property
    def seconds_left(self) -> float:
        return self.seconds - self.seconds_spent

    def has_time(self, seconds: float) -> bool:
        return seconds <= self.seconds_left

    def points(
        self, tried: Iterable[Trial], preference: Preference | None
    ) -> tuple[CurvePoint, ...]:
        """Time sizes that were tried, and those in doubt again, as far as there is time.

        If there is no time to go up once, it goes down first: plans are made of the large sizes.
        Later it goes down and up in turns.
        """
        trials = {trial.batch_size: trial for trial in tried}
        expected = {size: _turn_seconds(trial) for size, trial in trials.items()}
        turn = sorted(trials, reverse=not self.has_time(sum(expected.values())))
        timings: dict[int, list[Timing]] = {}
        curve: tuple[CurvePoint, ...] = ()
        while turn:
            timed = [size for size in turn if self._add_turn(size, expected[size], timings)]
            curve = self._points(trials, timings)
            doubtful = _undecided(self.runner.accumulation, preference, curve) if timed else ()
            again = [size for size in doubtful if len(timings[size]) < _MAX_TURNS]
            turn = sorted(again, reverse=turn == sorted(turn))
        return curve

    def _points(
        self, trials: Mapping[int, Trial], timings: Mapping[int, Sequence[Timing]]
    ) -> tuple[CurvePoint, ...]:
        in_trial, noise = self.runner.accumulation.in_trial, noise_of(timings)
        return tuple(
            point(size, in_trial(size), timings[size], trials[size].peak, noise)
            for size in sorted(timings)
        )

    def _add_turn(self, size: int, expected: float, timings: dict[int, list[Timing]]) -> bool:
        """Time one turn of a size; return False if there is no time for it, or it fails."""
        if not self.has_time(expected):
            return False
        timing = self._time_turn(size)
        if timing is None:
            self.failed.add(size)
            timings.pop(size, None)
            return False
        timings.setdefault(size, []).append(timing)
        return True

    def _time_turn(self, batch_size: int) -> Timing | None:
        """Return the timing of the slowest rank; None if the size failed on one of them."""
        is_dry = not self.runner.runs_together
        if not is_dry and not self.runner.has_room(batch_size):
            return None
        with self.runner.on_every_rank(batch_size, is_dry=is_dry):
            turns = self.runner.gather(self._turn_here(batch_size))
        known = [turn for turn in turns if turn is not None]
        if len(known) < len(turns):
            return None
        slowest, waited = max(known, key=lambda turn: statistics.median(turn[0].update_seconds))
        self.waited += waited
        return slowest

    def _turn_here(self, batch_size: int) -> tuple[Timing, Loading] | None:
        clock = self.runner.context.probe.clock
        deadline = self.runner.deadline(self.seconds_left)
        # The host's own clock: waiting for the device here would slow down the updates
        with loading_watch(time.perf_counter) as waited:

            def enough_updates(update_seconds: Sequence[float]) -> bool:
                if not update_seconds:  # a loader has started its workers by now
                    waited.forget()
                is_late = len(update_seconds) >= _FEWEST_UPDATES and clock() >= deadline
                is_enough = is_late or _is_enough(update_seconds)
                if self.runner.runs_together:  # rank 0 decides for all
                    is_enough, *_ = self.runner.context.ranks.gather(is_enough)
                return is_enough

            time_here = time_together if self.runner.runs_together else time_updates
            sized = self.runner.sized(batch_size)
            timing = time_here(sized, enough_updates, self.runner.context)
        if timing is None:
            return None
        steps = max(0.0, sum(timing.update_seconds) - waited.seconds)
        return timing, Loading(waited.seconds, steps, waited.batches)


def _undecided(
    accumulation: Accumulation, preference: Preference | None, curve: Sequence[CurvePoint]
) -> Collection[int]:
    """Return the sizes of which one more turn could change the choice, and the fastest."""
    if preference is None:
        return ()
    samples, timed = accumulation.samples, StepTimes.undisturbed(curve)
    times = timed.by_size(
        {size: accumulation.in_update(size) for size in timed.sizes if size <= (samples or size)}
    )
    sizes = [size for size in times if samples is None or samples % size == 0]
    return preference.undecided(sizes, times)


def _curve_sizes(fitting: Sequence[int], accumulation: Accumulation) -> list[int]:
    """Return the sizes that fit, powers of two below, and the largest that divide an update."""
    largest, samples = fitting[-1], accumulation.samples
    powers = {2**exponent for exponent in range(largest.bit_length())}
    exact: list[int] = []
    if samples is not None:
        below = range(min(largest, samples), largest // 4, -1)
        exact = [size for size in below if samples % size == 0][:_EXACT_SIZES]
    return sorted({*fitting, *powers, *exact})


def _is_enough(update_seconds: Sequence[float]) -> bool:
    """Return whether one turn has timed enough updates."""
    count, spent = len(update_seconds), sum(update_seconds)
    if count >= _MAX_UPDATES:
        return spent >= _MIN_TURN_SECONDS or count >= _MAX_QUICK_UPDATES
    return count >= _MIN_UPDATES and spent >= _TURN_SECONDS


def _turn_seconds(trial: Trial) -> float:
    """Return the expected seconds of a turn, with the update that is not timed."""
    update_seconds = (trial.step_seconds or 0.0) * trial.accumulate
    if not update_seconds:
        return 0.0
    most = _TURN_SECONDS / update_seconds
    quick = min(_MAX_QUICK_UPDATES, _MIN_TURN_SECONDS / update_seconds)
    return (1 + max(1 + quick, min(_MAX_UPDATES, max(_MIN_UPDATES, most)))) * update_seconds
