"""Find the largest batch within a latency limit: by the present search, and as an outcome of the memory search.

On a device on paper, whose clock is exact. `python benchmarks/latency_search.py` prints a table.
"""

from __future__ import annotations

import itertools
import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import autobatch
from autobatch import Bisection, GuidedBisection, Outcome, Trial
from autobatch.testing import PaperDevice

if TYPE_CHECKING:
    from collections.abc import Callable

TIMED_SECONDS = 20.0  # the time that all timed calls may take
ENOUGH_CALLS = 100
CEILING = 2**20
TRIAL_STEPS = 3


@dataclass(frozen=True)
class Case:
    """One curve of call times, as `seconds(batch_size, random numbers)`, and a limit on them."""

    name: str
    limit: float
    seconds: Callable[[int, random.Random], float]

    def largest(self) -> int:
        """Return the largest size whose 99th percentile, of 1,000 calls, is within the limit."""
        low, high = 0, CEILING
        while high - low > 1:
            middle = (low + high) // 2
            chance = random.Random(1)  # noqa: S311 -- not for secrets
            calls = sorted(self.seconds(middle, chance) for _ in range(1000))
            low, high = (middle, high) if calls[989] <= self.limit else (low, middle)
        return low


def line(base, per_sample):
    return lambda size, _: base + per_sample * size


def stairs(base, step, samples):
    return lambda size, _: base + step * -(-size // samples)


def jitter(base, per_sample, spread):
    return lambda size, chance: (base + per_sample * size) * (1 + chance.uniform(0, spread))


def late(base, per_sample, share, times):
    return lambda size, chance: (
        (base + per_sample * size) * (times if chance.random() < share else 1)
    )


CASES = (
    Case("line, 10 ms", 0.01, line(1e-4, 1e-4)),
    Case("line, 100 ms", 0.1, line(1e-3, 7e-4)),
    Case("line, far off, 1 s", 1.0, line(1e-3, 1e-4)),
    Case("stairs, 50 ms", 0.05, stairs(5e-3, 6e-3, 32)),
    Case("stairs, 33 ms", 0.0333, stairs(0, 3e-3, 8)),
    Case("jitter 10 %, 20 ms", 0.02, jitter(1e-3, 2e-4, 0.1)),
    Case("jitter 30 %, 60 ms", 0.06, jitter(5e-3, 5e-4, 0.3)),
    Case("0.5 % late, 50 ms", 0.05, late(1e-3, 3e-4, 0.005, 3)),
    Case("3 % late, 50 ms", 0.05, late(1e-3, 3e-4, 0.03, 3)),
    Case("line, 150 ms", 0.15, line(0.01, 1e-3)),
    Case("jitter 3 %, 180 ms", 0.18, jitter(0.01, 1.3e-3, 0.03)),
    Case("line, 1 s", 1.0, line(0.01, 0.03)),
    Case("line, 2 s", 2.05, line(0.1, 0.1)),
    Case("jitter 5 %, 5 s", 5.0, jitter(0.7, 0.09, 0.05)),
    Case("line, 30 s", 30.0, line(2.0, 0.3)),
)


class Device(PaperDevice):
    """A device whose calls take the time of a case."""

    def __init__(self, case, seed):
        super().__init__(10**9, seconds_per_step=0, seconds_per_sample=0)
        self._case, self._chance = case, random.Random(seed)  # noqa: S311

    def answer(self, batch_size):
        for _ in self.workload(batch_size, 1):
            self._now += self._case.seconds(batch_size, self._chance)
            yield


@dataclass(frozen=True)
class Result:
    """Largest size found, number of trials, timed calls at that size, and seconds in all."""

    size: int
    trials: int
    calls: int
    seconds: float


def present(case, seed):
    """Run `find` with its latency_limit."""
    device = Device(case, seed)
    try:
        report = autobatch.find(
            device.answer, device=device, latency_limit=case.limit, time_limit=None
        )
    except autobatch.DoesNotFitError:
        return Result(0, 0, 0, device.clock())
    size = report.plan.micro_batch_size
    calls = next(each.calls for each in report.latencies if each.batch_size == size)
    return Result(size, len(report.trials), calls, device.clock())


class AsAnOutcome:
    """A trial over the limit at the percentile does not fit; the memory search needs no change."""

    def __init__(self, case, seed, search):
        self.device, self.search = Device(case, seed), search
        self.limit = min(case.limit, TIMED_SECONDS / 2)  # slower calls cannot be timed
        self.calls: dict[int, list[float]] = {}
        self.spent = 0.0

    def run(self):
        trials = []
        while True:
            size = self.search.propose(trials, start=8, high=CEILING, budget=10**9)
            if size is None:
                size = max((each.batch_size for each in trials if each.fits), default=0)
                if not size or len(self.calls.get(size, ())) >= ENOUGH_CALLS:
                    break
                before = len(self.calls.get(size, ()))
                if self.time(size, ENOUGH_CALLS, TIMED_SECONDS):
                    if len(self.calls[size]) == before:
                        break  # no time is left
                    continue
                trials = [each for each in trials if each.batch_size != size]
                trials.append(Trial(size, Outcome.OUT_OF_MEMORY))
                continue
            trials.append(self.trial(size))
        trials += self.smaller_sizes(size, {each.batch_size for each in trials})
        calls = len(self.calls.get(size, ()))
        return Result(size, len(trials), calls, self.device.clock())

    def smaller_sizes(self, largest, tried):
        """Run and time powers of two below, as the present search does for the table of the report."""
        sizes = [2**power for power in range(largest.bit_length()) if 2**power not in tried]
        return [self.trial(each) for each in sizes if self.spent <= 0.85 * TIMED_SECONDS]

    def trial(self, size):
        """Run the steps of a trial, and one turn of timed calls where they are quick."""
        taken = self.timed(size, TRIAL_STEPS)[1:]
        step = statistics.median(taken)
        is_quick = step <= 0.5
        in_time = self.time(size, 10, 0.6 * TIMED_SECONDS) if is_quick else step <= self.limit
        if not in_time:
            return Trial(size, Outcome.OUT_OF_MEMORY)
        return Trial(size, Outcome.FIT, peak=size, step_seconds=step)

    def time(self, size, calls, until):
        """Time calls while there is time, and return whether the percentile is within the limit."""
        known = self.calls.setdefault(size, [])
        run = self.device.answer(size)
        began, spent = self.device.clock(), self.spent
        expected = statistics.median(known) if known else 0.0
        if spent + 2 * expected <= until:
            next(run)
            while len(known) < calls and self.spent <= until:
                before = self.device.clock()
                next(run)
                known.append(self.device.clock() - before)
                self.spent = spent + self.device.clock() - began
                if self.is_late(known):
                    break
        return not self.is_late(known)

    def is_late(self, seconds):
        return sum(each > self.limit for each in seconds) > len(seconds) // ENOUGH_CALLS

    def timed(self, size, count):
        run, clock = self.device.answer(size), self.device.clock
        times = [clock() for _ in itertools.chain([None], itertools.islice(run, count))]
        return [after - before for before, after in itertools.pairwise(times)]


def bisection(case, seed):
    return AsAnOutcome(case, seed, Bisection(1 / 32)).run()


def guided_bisection(case, seed):
    return AsAnOutcome(case, seed, GuidedBisection(1 / 32)).run()


METHODS = {
    "find": present,
    "as an outcome, Bisection": bisection,
    "as an outcome, GuidedBisection": guided_bisection,
}


def main(seeds=5):
    print("| curve and limit |", " | ".join(METHODS), "|")
    print("|" + " --- |" * (len(METHODS) + 1))
    for case in CASES:
        cells = [
            cell([method(case, seed) for seed in range(seeds)], case) for method in METHODS.values()
        ]
        print(f"| {case.name} |", " | ".join(cells), "|")


def cell(results, case):
    """Return found / true with its range, and medians of trials, calls and seconds."""
    shares = [each.size / case.largest() for each in results]
    low, high = min(shares), max(shares)
    extent = "" if high - low < 0.005 else f" ({low:.2f}-{high:.2f})"
    trials, calls, seconds = (
        statistics.median(getattr(each, name) for each in results)
        for name in ("trials", "calls", "seconds")
    )
    return (
        f"{statistics.median(shares):.2f}{extent}; {trials:.0f} trials, {calls:.0f} calls, "
        f"{seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
