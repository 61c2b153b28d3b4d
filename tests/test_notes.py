from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch._notes import Bound, Findings, notes, tightest_bound
from autobatch._plan import BatchPlan
from autobatch._trial import Outcome, Trial

QUIET = Findings(
    remarks=(),
    plan=BatchPlan(32, 8),
    trials=(
        Trial(32, Outcome.FIT),
        Trial(56, Outcome.FIT),
        Trial(64, Outcome.OUT_OF_MEMORY),
    ),
    target_batch_size=256,
    bound=Bound(256, "target_batch_size=256 needs no more than 256 at once"),
    time_limit=None,
    source="NVML",
    total=12 * 2**30,
    foreign=2**30,
    before=None,
    curve=(),
    learning_rate=None,
    dataset_size=None,
    look=None,
)
NO_BOUND = {
    "target_batch_size": None,
    "max_micro_batch_size": None,
    "dataset_size": None,
    "world_size": 1,
}


def test_where_nothing_is_noteworthy_nothing_is_said():
    assert notes(QUIET) == ()


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (
            {"before": BatchPlan(32)},
            "The effective batch goes from 32 to 256.",
        ),
        (
            {"before": BatchPlan(32), "dataset_size": 50_000},
            "The effective batch goes from 32 to 256: 196 updates per epoch instead of 1,563.",
        ),
        (
            {"before": BatchPlan(64, 4)},
            "accumulate_grad_batches=4 of the Trainer gives way to 8, for the target.",
        ),
        (
            {"source": "torch.cuda.mem_get_info, because NVML is not installed"},
            "Memory is read from torch.cuda.mem_get_info, because NVML is not installed.",
        ),
        (
            {"bound": Bound(56, "max_micro_batch_size=56 allows no more")},
            "Largest fit not sought: max_micro_batch_size=56 allows no more.",
        ),
        (
            {"time_limit": 300.0},
            "The search stopped at time_limit=300 seconds: 56 is the largest verified so far, more may fit.",
        ),
        (
            {"foreign": 3 * 2**30},
            "Others hold 3 GiB of this device's 12 GiB; what fits changes when they come or go.",
        ),
        (
            {"trials": (*QUIET.trials, Trial(1, Outcome.REFUSED))},
            "The workload itself refused batch_size=1; its own error, not memory, bounds it from below.",
        ),
        (
            {"target_batch_size": 257, "plan": BatchPlan(32, 4, 2)},
            "Asked for 257 samples per update, got 256: 257 does not divide by 2 ranks.",
        ),
        (
            {"target_batch_size": 1009, "plan": BatchPlan(56, 18)},
            "Asked for 1009 samples per update, got 1008: exact would take 1009 micro-batches of 1 instead of 18 of 56.",
        ),
        (
            {"target_batch_size": 512},
            "Asked for 512 samples per update, got 256: no plan that gives it exactly was verified.",
        ),
    ],
)
def test_each_note_has_its_trigger(changes, note):
    assert notes(replace(QUIET, **changes)) == (note,)


@pytest.mark.parametrize(
    ("given_bounds", "batch_size", "reason"),
    [
        (
            {"target_batch_size": 256},
            256,
            "target_batch_size=256 needs no more than 256 at once",
        ),
        (
            {"target_batch_size": 256, "world_size": 4},
            64,
            "target_batch_size=256 on 4 ranks needs no more than 64 at once",
        ),
        ({"max_micro_batch_size": 64}, 64, "max_micro_batch_size=64 allows no more"),
        ({"dataset_size": 1797}, 1797, "an epoch of 1,797 samples has no more"),
        (
            {"dataset_size": 1797, "world_size": 2},
            898,
            "an epoch of 1,797 samples on 2 ranks has no more",
        ),
    ],
)
def test_a_bound_says_what_sets_it(given_bounds, batch_size, reason):
    bound = tightest_bound(**(NO_BOUND | given_bounds))

    assert bound == Bound(batch_size, reason)


def test_without_bounds_only_memory_bounds_the_search():
    assert tightest_bound(**NO_BOUND) is None


@given(*[st.none() | st.integers(1, 10**6)] * 3, st.integers(1, 64))
def test_the_lowest_bound_holds(target, largest, dataset, world_size):
    bound = tightest_bound(
        target_batch_size=target,
        max_micro_batch_size=largest,
        dataset_size=dataset,
        world_size=world_size,
    )

    shares = [n // world_size for n in (target, dataset) if n is not None]
    allowed = [*shares, *([largest] if largest is not None else [])]
    assert (bound.batch_size if bound else None) == min(allowed, default=None)
