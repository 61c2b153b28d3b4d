"""The time for timing sizes is in proportion to what it decides."""

from __future__ import annotations

import pytest

import autobatch
from autobatch import BatchPlan
from autobatch.testing import PaperDevice

pytestmark = pytest.mark.curve


def found(device, **options):
    report = autobatch.find(device.workload, device=device, memory_limit=1.0, **options)
    return report, device.clock()


def paper(**options):
    return PaperDevice(1000, fixed=200, per_sample=8, **options)  # 100 samples fit


@pytest.mark.parametrize("target", [None, 200])
def test_no_seconds_turn_timing_off(target):
    report, _ = found(paper(), timing_seconds=0, target_batch_size=target)

    assert report.curve == ()
    assert report.plan == (BatchPlan(100) if target is None else BatchPlan(100, 2))


def test_timing_ends_as_soon_as_the_choice_is_settled():
    # 64 has 65 % of the speed of 100, and all smaller ones less
    report, _ = found(paper(seconds_per_step=1e-2, seconds_per_sample=1e-6))

    assert report.plan == BatchPlan(100)
    assert len(report.curve) > 5
    assert {each.drift for each in report.curve} == {None}  # one turn of each


def test_only_sizes_in_doubt_are_timed_again():
    # 64 has 96 % of the speed of 100
    report, _ = found(paper(seconds_per_step=9e-3, seconds_per_sample=1e-3))

    again = {each.batch_size for each in report.curve if each.drift is not None}
    assert report.plan.micro_batch_size in again
    assert 100 in again
    assert again.isdisjoint({1, 2, 4, 8})


@pytest.mark.parametrize("value", [-1, "10", float("nan"), True])
def test_bad_seconds_are_refused(value):
    device = paper()

    with pytest.raises(ValueError, match=r"^timing_seconds=.* is not a time; give seconds"):
        found(device, timing_seconds=value)

    assert device.sizes_run == []
