"""Searches on memory curves that were measured on a GPU."""

from __future__ import annotations

from statistics import mean

import pytest

from autobatch import Bisection, GuidedBisection
from measured_curves import measured_curves, starts
from search_curves import failures, found, run

CURVES = measured_curves()


def searched(search, curve, start):
    return run(
        search,
        curve.peak,
        fits=curve.fits,
        resident=lambda _: curve.resident,
        allocated=curve.allocated,
        start=start,
        budget=curve.budget,
    )


def test_thirteen_searches_take_four_and_a_half_trials_and_seldom_fail():
    searches = [
        searched(GuidedBisection(), curve, start) for curve in CURVES for start in starts(curve)
    ]

    assert len(searches) == 13
    assert mean(map(len, searches)) <= 4.5
    assert mean(map(failures, searches)) <= 0.3
    assert max(map(failures, searches)) <= 1


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.name)
def test_the_size_found_ran_and_leaves_little_of_the_size_or_the_bytes(curve):
    for start in (2, 3, 5, *range(8, 49, 4)):
        size = found(searched(GuidedBisection(), curve, start))

        unused = (curve.budget - curve.peak(size)) / (curve.budget - curve.resident)
        assert curve.fits(size)
        assert size >= 0.99 * curve.largest or unused <= 0.02 + 1 / size


def test_bisection_may_stop_below_a_size_that_fails_though_larger_ones_fit():
    """Why readings matter: GPT-2 fits at 48 to 52 and runs out of memory at 47."""
    gpt = next(curve for curve in CURVES if curve.name == "GPT-2, bf16, AdamW")

    assert not gpt.fits(47)
    assert gpt.largest == 52
    assert gpt.fits(found(searched(Bisection(), gpt, 8)))
