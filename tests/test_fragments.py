"""Searches where a caching allocator reserves more than is in use, by a ratio that scatters."""

from __future__ import annotations

from autobatch import GuidedBisection, Outcome, Trial

BUDGET = 10_000_000


def trial(size, ratio, *, fits=True):
    """Return a trial of memory that uses 10,000 bytes a sample and reserves more by a ratio."""
    if not fits:
        return Trial(size, Outcome.OUT_OF_MEMORY)
    used = 10_000 * size
    return Trial(size, Outcome.FIT, peak=int(ratio * used), allocated=used)


def proposed(*trials):
    return GuidedBisection().propose(trials, start=8, high=10_000, budget=BUDGET)


def test_a_size_above_a_failure_is_tried_where_fragments_may_have_caused_it():
    # By 1.5 the limit is 666, by 1.4 it is 714
    size = proposed(trial(300, 1.4), trial(600, 1.5), trial(645, 1.4), trial(650, 0, fits=False))

    assert 650 < size <= 714


def test_sizes_beside_a_failure_are_not_tried():
    before = trial(300, 1.5), trial(600, 1.5), trial(630, 1.5)

    sizes = [proposed(*before, trial(bad, 0, fits=False)) for bad in (655, 660, 665)]

    assert all(
        size is None or abs(size - bad) > 3
        for size, bad in zip(sizes, (655, 660, 665), strict=True)
    )


def test_a_failure_that_memory_in_use_did_not_foretell_is_a_jump():
    size = proposed(trial(100, 1.2), trial(510, 1.2), trial(600, 0, fits=False))

    assert 510 < size < 600


def test_two_percent_of_the_bytes_may_stay_unused_where_memory_is_fragmented():
    assert proposed(trial(300, 1.5), trial(600, 1.5), trial(654, 1.5)) is None
    assert proposed(trial(300, 1.5), trial(600, 1.5), trial(645, 1.5)) > 645


def test_after_four_failures_the_bracket_is_halved():
    failed = [trial(size, 0, fits=False) for size in range(665, 685, 5)]

    size = proposed(trial(300, 1.5), trial(600, 1.5), trial(620, 1.5), *failed)

    assert size == (620 + 665) // 2


def test_a_line_below_which_memory_hardly_grows_is_not_followed_far():
    flat = [
        Trial(size, Outcome.FIT, peak=7_000_000 + size, allocated=6_000_000 + 100 * size)
        for size in (8, 14)
    ]

    assert proposed(*flat) <= 4 * 14
