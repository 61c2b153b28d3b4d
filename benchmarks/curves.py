"""Memory curves on paper, and the device that has them: exact, without tensors, on a clock of its own."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from bisect import bisect_right
from dataclasses import dataclass

import torch

from autobatch._memory import MemoryReading

MIB = 2**20
RESIDENT = 1024 * MIB  # weights, which are there before any trial
ROOM = 10 * 1024 * MIB  # for the memory of a step
BUDGET = RESIDENT + ROOM
ENDS = 100_000  # samples in the data set, beyond which none can go
MAXIMA = (30, 100, 500, 2000, 10_000)
STEP_SECONDS, SAMPLE_SECONDS = 0.02, 0.001  # of the paper clock


@dataclass(frozen=True)
class Curve:
    """Bytes of a training step over its batch size.

    Args:
        kind: What it is an example of.
        name: Which example.
        true: The largest size that fits the budget; 0 if none does.
        peak: Bytes by size, resident memory included.
        state: Bytes of it that only appear when the first step ends.
        profile: Bytes after each allocation of a step, if each can be seen.
        noise: Largest relative deviation, drawn again in each step.
        foreign: What another process takes during the search, as a share of the room.
        ends: Samples in the data set.
    """

    kind: str
    name: str
    true: int
    peak: object
    state: int = 0
    profile: object = None
    noise: float = 0.0
    seed: int = 0
    foreign: float = 0.0
    ends: int = ENDS

    @property
    def rises(self):
        """True if a larger size never needs less memory."""
        return self.kind not in ("hump", "noise of 1 %")


class Device:
    """A device whose steps need the memory of a curve, and run out of memory beyond its capacity."""

    name = "device on paper"
    source = "paper"

    def __init__(self, curve, share):
        self.curve = curve
        self.capacity = math.ceil(BUDGET / share)
        self.random = random.Random(curve.seed)  # noqa: S311 -- not for secrets
        self._held = self._peak = RESIDENT
        self._has_state = False
        self._limit = math.inf
        self._watch = None
        self._starts = 0
        self.foreign = 0
        self.failures = 0
        self.now = 0.0

    def start(self):
        """Start again with a new model and optimizer."""
        self._starts += 1
        if self._starts == 3:
            self.foreign = int(self.curve.foreign * ROOM)
        self._has_state = False
        self._hold(RESIDENT)

    def step(self, size, passes=1):
        """One update of so many passes."""
        for _ in range(passes):
            shake = 1 + self.curve.noise * self.random.uniform(-1, 1)
            need = self.curve.peak(size) - RESIDENT
            need -= 0 if self._has_state else self.curve.state
            self._hold(RESIDENT + int(need * shake))
            self.now += STEP_SECONDS + SAMPLE_SECONDS * size
        self._has_state = True
        self.size = size

    def _hold(self, nbytes):
        if nbytes > min(self._limit, self.capacity - self.foreign):
            self.failures += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {nbytes} bytes on paper."
            )
        self._held = nbytes
        self._peak = max(self._peak, nbytes)

    # What a probe of autobatch has

    def read(self):
        return MemoryReading(
            total=self.capacity,
            used=self.foreign + self._held,
            reserved=self._held,
            peak=self._peak,
            failures=self.failures,
        )

    @contextlib.contextmanager
    def limited(self, budget):
        self.start()  # a new trial frees the memory of the last one
        self._limit, self._peak = budget, self._held
        try:
            yield _Watch(self) if self.curve.profile else None
        finally:
            self._limit = math.inf

    def attach(self, *objects):
        pass

    def release(self):
        self._held = RESIDENT

    def clock(self):
        return self.now


class _Watch:
    def __init__(self, device):
        self._device = device

    def mark(self):
        pass

    @property
    def profile(self):
        return self._device.curve.profile(self._device.size)


# The curves


def line(largest, fixed=0.0, top=1.0):
    """Return a straight line that ends at `top` of the room if `largest` is the largest that fits."""
    each = (top - fixed) / (largest + 0.5)
    return lambda size: RESIDENT + int(ROOM * (fixed + each * size))


def truth(peak, ends=ENDS, budget=BUDGET):
    """Return the largest size that fits, for a curve that never falls."""
    return bisect_right(range(1, ends + 1), budget, key=peak)


def straight(maxima):
    for largest, fixed in itertools.product(maxima, (0.0, 0.5)):
        yield Curve("straight", f"fixed {fixed:.0%}", largest, line(largest, fixed))


def profiled(maxima):
    """Activations of three layers on top of each other, and an optimizer that does not know the size."""
    for largest, plateau in itertools.product(maxima, (0.0, 0.6)):
        each = 0.9 / (largest + 0.5)
        rows = ((0, each / 3), (0, each / 2), (0.1, each), (0.05, each / 9))
        rows = (*rows, (plateau, 0))

        def profile(size, rows=rows):
            return tuple(RESIDENT + int(ROOM * (f + e * size)) for f, e in rows)

        peak = lambda size, profile=profile: max(profile(size))  # noqa: E731
        name = f"plateau {plateau:.0%}"
        yield Curve("with profiles", name, truth(peak), peak, profile=profile)


def pairs(maxima):
    """A matrix of all pairs of samples, as a contrastive loss makes: memory grows with the square of the size."""
    for largest, share, is_seen in itertools.product(maxima, (0.1, 0.6), (True, False)):

        def profile(size, of=1 / (largest + 0.5), share=share):
            linear, square = (1 - share) * of * size, share * (of * size) ** 2
            held = (linear / 3, linear, linear + square, square)
            return tuple(RESIDENT + int(ROOM * each) for each in held)

        peak = lambda size, profile=profile: max(profile(size))  # noqa: E731
        kind = "all pairs, with profiles" if is_seen else "all pairs"
        seen = profile if is_seen else None
        yield Curve(kind, f"{share:.0%}", truth(peak), peak, profile=seen)


def stepwise(maxima):
    """An allocator that hands out 20 MiB at a time."""
    grain = 20 * MIB
    for largest in maxima:
        below = line(largest, 0.2)
        peak = lambda size, below=below: -(-below(size) // grain) * grain  # noqa: E731
        yield Curve("step-wise", "20 MiB", truth(peak), peak)


def late_state(maxima):
    for largest in maxima:
        state = ROOM // 3
        yield Curve("state after step 1", "a third", largest, line(largest, 0.4), state)


def jumping(maxima):
    for largest, at, height in itertools.product(maxima, (0.3, 0.8), (0.1, 0.33)):
        below = line(largest, 0.1, 1 - height)

        def peak(size, below=below, height=height, start=at * largest):
            return below(size) + (int(ROOM * height) if size >= start else 0)

        yield Curve("jump", f"{height:.0%} at {at:.0%}", truth(peak), peak)


def cliffs(maxima):
    """A jump right over the budget, which nothing below it foretells."""
    for largest in maxima:
        low = line(2 * largest, 0.1)
        peak = lambda size, low=low, at=largest: (  # noqa: E731
            low(size) if size <= at else 2 * BUDGET
        )
        yield Curve("cliff", "at half of the line", largest, peak)


def plateaus(maxima):
    for largest, knee in itertools.product(maxima, (0.1, 0.5, 0.8)):
        rising = line(largest, 0.1)
        peak = lambda size, rising=rising, low=int(knee * largest): (  # noqa: E731
            rising(max(size, low))
        )
        yield Curve("plateau", f"up to {knee:.0%}", largest, peak)


def humps(maxima):
    for largest in maxima:
        smooth = line(largest, 0.1)
        peak = lambda size, smooth=smooth, n=largest: (  # noqa: E731
            smooth(size) + int(0.2 * ROOM * (0.3 < size / n < 0.4))
        )
        yield Curve("hump", "a fifth", largest, peak)


def noises(maxima):
    for largest, seed in itertools.product(maxima, range(5)):
        peak = line(largest, 0.1)
        yield Curve("noise of 1 %", f"seed {seed}", largest, peak, noise=0.01, seed=seed)


def neighbours(maxima):
    """Another process takes a quarter of the room after two trials."""
    for largest in maxima:
        peak = line(largest, 0.1)
        true = truth(peak, budget=BUDGET - ROOM // 4)
        yield Curve("others take memory", "a quarter", true, peak, foreign=0.25)


def extremes(_):
    yield Curve("nothing fits", "", 0, lambda size: 2 * BUDGET + size)
    yield Curve("only 1 fits", "", 1, line(1))
    for ends in (1000, 20_000):
        yield Curve("all of it fits", f"{ends:,}", ends, line(10**6, 0.1), ends=ends)


def curves(maxima=MAXIMA):
    """Every one of them."""
    kinds = (straight, profiled, pairs, stepwise, late_state, jumping, cliffs, plateaus)
    kinds = (*kinds, humps, noises, neighbours, extremes)
    return [curve for kind in kinds for curve in kind(maxima)]
