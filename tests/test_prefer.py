"""The choice among sizes that are about as fast: by preference, and not by luck."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import autobatch
from autobatch import BatchPlan
from autobatch._plan import candidates
from autobatch._throughput.preference import Preference, SampleTime
from autobatch.report import Settings, StepTimes
from autobatch.testing import PaperDevice


class NoisyDevice(PaperDevice):
    """A device whose updates scatter about their time, and whose turns differ as well."""

    def __init__(self, *, seed, **options):
        super().__init__(1000, fixed=200, memory=lambda size: 200 + 18 * size, **options)
        self._seed, self._draws = seed, itertools.count()

    def _scatter(self, deviation):
        # Another generator each time: find() restores those that a loop can reach
        return random.Random(10**6 * self._seed + next(self._draws)).gauss(0, deviation)

    def workload(self, batch_size, accumulate):
        turn = self._scatter(0.02)
        before = self._now
        for each in super().workload(batch_size, accumulate):
            self._now += (self._now - before) * abs(turn + self._scatter(0.05))
            yield each
            before = self._now


def plans(seeds, *, has_batch_norm=False, **options):
    """Return the plans of searches that differ in nothing but noise."""
    devices = (NoisyDevice(seed=seed, **options) for seed in seeds)
    return plans_on(devices, has_batch_norm=has_batch_norm)


def plans_on(devices, *, has_batch_norm=True):
    found = set()
    for device in devices:
        model = torch.nn.BatchNorm1d(2) if has_batch_norm else torch.nn.Identity()

        def train(batch_size, accumulate, model=model, device=device):
            model(torch.ones(2, 2))
            yield from device.workload(batch_size, accumulate)

        found.add(autobatch.find(train, device=device, target_batch_size=512).plan)
    return found


SEEDS = [range(30), pytest.param(range(30, 120), marks=pytest.mark.slow)]


@pytest.mark.curve
@pytest.mark.parametrize("seeds", SEEDS)
def test_noise_does_not_change_the_choice_with_batch_norm(seeds):
    # 40 samples fit, and all sizes are about as fast
    assert plans(seeds, has_batch_norm=True, seconds_per_step=1e-5) == {BatchPlan(32, 16)}


@pytest.mark.curve
@pytest.mark.parametrize("seeds", SEEDS)
def test_noise_does_not_change_the_smallest_of_the_fast_sizes(seeds):
    # 8 has 77 % of the speed of 32, 16 has 90 %
    assert plans(seeds, seconds_per_step=4e-5) == {BatchPlan(32, 16)}


class LoadedDevice(PaperDevice):
    """A device that other processes slow down to 1.5 or 2 times, half of the time, for a while."""

    def __init__(self, *, seed, seconds, rates):
        super().__init__(1000, memory=lambda size: 100 + 24 * size)  # 33 samples fit
        draw = random.Random(seed)
        self._slower = tuple(draw.choice([1.0, 1.0, 1.5, 2.0]) for _ in range(2000))
        self._seconds, self._rates = seconds, rates

    def workload(self, batch_size, accumulate):
        larger = min(size for size in self._rates if size >= batch_size)
        for each in super().workload(batch_size, accumulate):
            self._work(accumulate * batch_size / self._rates[larger])
            yield each

    def _work(self, seconds):
        while seconds > 1e-9:  # goes on in the next while, which is as fast or not
            at = int(self._now / self._seconds)
            slower = self._slower[at]
            passed = min(slower * seconds, (at + 1) * self._seconds - self._now + 1e-9)
            self._now += passed
            seconds -= passed / slower


@pytest.mark.curve
@pytest.mark.parametrize(
    ("rate", "size", "seconds"), [(280, 32, 0.3), (280, 32, 2.0), (190, 16, 0.3)]
)
def test_a_loaded_machine_does_not_change_the_choice(rate, size, seconds):
    rates = {1: 90, 2: 134, 4: 180, 8: 249, 16: 280, 32: rate, 64: rate}

    assert plans_on(
        LoadedDevice(seed=seed, seconds=seconds, rates=rates) for seed in range(10)
    ) == {BatchPlan(size, 512 // size)}


def speeds(rates, error=0.0):
    """Return step times by samples per second."""
    sizes = tuple(rates)
    seconds = tuple(size / rate for size, rate in rates.items())
    return StepTimes(sizes, seconds, 0.0, tuple(error for _ in sizes))


FLAT = {8: 960, 16: 970, 32: 980, 64: 990, 128: 1000}
STEEP = {8: 500, 16: 700, 32: 900, 64: 990, 128: 1000}


@pytest.mark.parametrize(
    ("rates", "error", "preference", "size"),
    [
        (FLAT, 0.0, Preference(None, has_batch_norm=False, is_split=True), 8),
        (FLAT, 0.0, Preference(32, has_batch_norm=False, is_split=True), 32),
        (FLAT, 0.0, Preference(48, has_batch_norm=False, is_split=True), 8),  # 256 is not 48 times
        (FLAT, 0.0, Preference(8, has_batch_norm=True, is_split=True), 8),
        (FLAT, 0.0, Preference(None, has_batch_norm=True, is_split=True), 128),
        (STEEP, 0.0, Preference(None, has_batch_norm=False, is_split=True), 64),
        (STEEP, 0.0, Preference(16, has_batch_norm=False, is_split=True), 64),
        # 900 is 5 % less than 950, within the error
        (STEEP, 0.03, Preference(None, has_batch_norm=False, is_split=True), 32),
        (STEEP, 0.01, Preference(None, has_batch_norm=False, is_split=True), 64),
        # Convolutions that outgrow a cache: the largest that fits is 22 % slower than 32
        (
            {8: 822, 16: 933, 32: 976, 64: 893, 128: 757},
            0.0,
            Preference(None, has_batch_norm=False, is_split=True),
            16,
        ),
        # 8 is the fastest, and too few for statistics
        (
            {8: 1000, 16: 800, 32: 700},
            0.0,
            Preference(None, has_batch_norm=True, is_split=True),
            16,
        ),
        ({4: 900, 8: 1000}, 0.0, Preference(None, has_batch_norm=True, is_split=True), 8),
    ],
)
def test_the_preferred_one_of_the_fast_sizes_is_taken(rates, error, preference, size):
    plan = candidates(256, 1, max(rates), speeds(rates, error), lambda _: True, preference)[0]

    assert plan == BatchPlan(size, 256 // size)


def test_timing_goes_on_only_while_errors_decide():
    order = Preference(None, has_batch_norm=False, is_split=True)
    fastest = SampleTime(1.0, 0.005)

    def undecided(seconds, error):
        times = {8: SampleTime(2.0, 0.01), 16: SampleTime(seconds, error), 32: fastest}
        return order.undecided(times, times)

    assert set(undecided(1.2, 0.01)) == set()
    assert set(undecided(1.02, 0.005)) == set()
    assert set(undecided(1.06, 0.01)) == {16, 32}
    assert set(undecided(1.2, 0.2)) == {16, 32}


@pytest.mark.curve
@pytest.mark.parametrize(("prefer", "size"), [("fast", 32), ("largest", 100)])
def test_without_a_target_the_preference_decides(prefer, size):
    # 16 has 80 % of the speed of 100, 32 has 95 %
    device = PaperDevice(1000, fixed=200, per_sample=8, memory=None, seconds_per_step=2e-5)

    report = autobatch.find(device.workload, device=device, memory_limit=1.0, prefer=prefer)

    assert report.plan == BatchPlan(size)
    assert report.largest_fit == 100
    assert f"Micro-batch {size} × accumulate 1" in str(report)
    assert ("100 is the largest found to fit" in str(report)) == (size != 100)
    assert report.from_json(report.to_json()).settings.prefer == prefer


def test_without_timing_the_largest_is_taken():
    device = PaperDevice(1000, fixed=200, per_sample=8)

    assert autobatch.find(device.workload, device=device, memory_limit=1.0).plan == BatchPlan(100)


def test_another_preference_is_refused():
    device = PaperDevice(1000)

    with pytest.raises(ValueError, match=r'^prefer=\'best\' is .*; give "fast" or "largest"\.$'):
        autobatch.find(device.workload, device=device, prefer="best")

    assert device.sizes_run == []


def test_reports_of_earlier_versions_took_the_largest():
    without = {
        "target_batch_size": None,
        "memory_limit": 0.9,
        "max_micro_batch_size": None,
        "steps_per_trial": 3,
        "time_limit": 300.0,
        "dataset_size": None,
    }

    assert Settings(**without).prefer == "largest"
