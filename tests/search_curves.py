"""Curves of peak memory by batch size, and a function that runs a search on one."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from autobatch import Outcome, Trial

if TYPE_CHECKING:
    from collections.abc import Callable

RESIDENT = 2**30  # bytes before any trial
ROOM = 10 * 2**30  # bytes of a step within the budget
BUDGET = RESIDENT + ROOM
HIGH = 100_000


def run(
    search, peak, *, fits=None, profile=None, resident=None, allocated=None, read="fit", **options
):
    """Search until the end; `read` selects trials with a peak: "fit", "all" or "none"."""
    options = {"start": 8, "high": HIGH, "budget": BUDGET} | options
    trials = []
    while (size := search.propose(tuple(trials), **options)) is not None:
        assert 1 <= size <= options["high"]
        assert size not in [t.batch_size for t in trials]
        assert len(trials) < 10 + 5 * math.log2(options["high"]), "too many trials"
        fit = fits(size) if fits else peak(size) <= options["budget"]
        seen = read == "all" or (fit and read == "fit")
        failed = Outcome.OVER_BUDGET if read == "all" else Outcome.OUT_OF_MEMORY
        trials.append(
            Trial(
                size,
                Outcome.FIT if fit else failed,
                peak=peak(size) if seen else None,
                resident=resident(len(trials)) if resident else RESIDENT,
                allocated=allocated(size) if allocated and seen else None,
                profile=profile(size) if profile and seen else (),
            )
        )
    return trials


def sizes(trials):
    return [t.batch_size for t in trials]


def found(trials):
    return max((t.batch_size for t in trials if t.fits), default=0)


def failures(trials):
    return sum(not t.fits for t in trials)


def truth(peak, high=HIGH, budget=BUDGET):
    """Return the largest fit of a curve that never falls."""
    return bisect_right(range(1, high + 1), budget, key=peak)


def close(size, true, resolution):
    """Return True if a search may end at this size."""
    return true - size <= int(resolution * true)


def line(largest, fixed=0.0):
    """Return a straight line with this largest fit; `fixed` is a share of the room."""
    each = ROOM * (1 - fixed) / (largest + 0.5)
    return lambda size: RESIDENT + math.floor(ROOM * fixed + each * size)


@dataclass(frozen=True)
class Allocations:
    """Step of a model whose bytes after each allocation are straight lines."""

    lines: tuple[tuple[int, int], ...]

    def profile(self, size):
        return tuple(RESIDENT + fixed + each * size for fixed, each in self.lines)

    def peak(self, size):
        return max(self.profile(size))


class Model(Allocations):
    """Three layers with activations, and an optimizer step that does not depend on the size."""

    def __init__(self, largest, plateau=0.0):
        each = int(ROOM * 0.9 / (largest + 0.5))
        state = (int(ROOM * plateau), 0)
        tenth = ROOM // 10
        lines = ((0, each // 3), (0, each // 2), (tenth, each), (tenth // 2, each // 9))
        super().__init__((*lines, state))


# Families of curves

# Largest fits
LARGEST = (30, 37, 64, 100, 150, 256, 500, 1000, 2000, 3333, 5000, 7777, 10_000)
PAIRS = (0.02, 0.1, 0.3, 0.6, 0.9)  # share of the matrix in the room at the largest fit


@dataclass(frozen=True)
class Pairs:
    """Step with activations and then a matrix of all pairs of samples, which is kept longer."""

    largest: int
    share: float

    def profile(self, size):
        linear = (1 - self.share) * size / (self.largest + 0.5)
        square = self.share * (size / (self.largest + 0.5)) ** 2
        held = (linear / 3, linear, linear + square, square)
        return tuple(RESIDENT + int(ROOM * each) for each in held)

    def peak(self, size):
        return max(self.profile(size))


@dataclass(frozen=True)
class Curve:
    peak: Callable
    resident: Callable | None = None
    profile: Callable | None = None


def above_the_line(largest, fixed, extra):
    """Return a straight line plus `extra`, a share of the room by size."""
    below = line(largest, fixed)
    top = 1 - extra(largest)
    return lambda size: RESIDENT + int((below(size) - RESIDENT) * top + ROOM * extra(size))


def lines():
    return [Curve(line(n, f)) for n in LARGEST for f in (0, 0.1, 0.5, 0.9)]


def states():
    """Lines whose first trial begins without optimizer state."""
    late = lambda trial: RESIDENT if trial else RESIDENT // 3  # noqa: E731
    return [Curve(line(n, f), late) for n in LARGEST for f in (0.1, 0.5, 0.9)]


def grains():
    """Lines rounded up to 2 MiB by the allocator."""
    grain = 2 * 2**20
    round_up = lambda peak: lambda size: -(-peak(size) // grain) * grain  # noqa: E731
    return [Curve(round_up(line(n, f))) for n in LARGEST for f in (0, 0.1, 0.5)]


def brims():
    """Flat lines near the budget, rounded up to 20 MiB: one reading predicts the next poorly."""
    grain = 20 * 2**20
    round_up = lambda peak: lambda size: -(-peak(size) // grain) * grain  # noqa: E731
    return [Curve(round_up(line(n, f))) for n in LARGEST for f in (0.97, 0.98, 0.99)]


def jumps():
    """Lines with a jump of a tenth or a third of the room."""

    def jump(largest, fixed, at, height):
        return above_the_line(largest, fixed, lambda size: height if size >= at * largest else 0)

    parameters = product(LARGEST, (0, 0.3), (0.2, 0.5, 0.8), (0.1, 0.33))
    return [Curve(jump(*each)) for each in parameters]


def cliffs():
    """Lines that end half-way to the budget, where memory runs out at once."""

    def cliff(largest):
        low = line(2 * largest, 0.1)
        return lambda size: low(size) if size <= largest else 2 * BUDGET

    return [Curve(cliff(n)) for n in LARGEST]


def plateaus():
    def plateau(largest, fixed, knee):
        rising = line(largest, fixed)
        return lambda size: rising(max(size, int(knee * largest)))

    return [Curve(plateau(*e)) for e in product(LARGEST, (0, 0.3), (0.1, 0.3, 0.5, 0.8))]


def noises():
    """Lines with noise of up to 1 %, the same each time a size is tried."""

    def noise(largest, fixed, seed):
        smooth = line(largest, fixed)

        def peak(size):
            shake = random.Random(100_003 * seed + size).uniform(-0.01, 0.01)
            return int(smooth(size) * (1 + shake))

        return peak

    return [Curve(noise(*each)) for each in product(LARGEST, (0, 0.3, 0.6), range(5))]


def humps():
    def hump(largest, fixed):
        smooth = line(largest, fixed)
        extra = lambda size: 0.2 * ROOM * (0.3 < size / largest < 0.4)  # noqa: E731
        return lambda size: smooth(size) + int(extra(size))

    return [Curve(hump(*each)) for each in product(LARGEST, (0, 0.3))]


def pairs():
    """Lines plus memory for every pair of samples, as in a contrastive loss."""
    return [Curve(Pairs(n, share).peak) for n in LARGEST for share in PAIRS]


def profiled_pairs():
    models = [Pairs(n, share) for n in LARGEST for share in PAIRS]
    return [Curve(model.peak, profile=model.profile) for model in models]


def profiles():
    models = [Model(n, plateau) for n in LARGEST for plateau in (0, 0.3, 0.7)]
    return [Curve(model.peak, profile=model.profile) for model in models]
