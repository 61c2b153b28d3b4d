from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch import BatchPlan, Outcome, Trial
from autobatch._settings import Bound, tightest_bound
from autobatch.report import CurvePoint, LearningRateRule, Look
from report_examples import notes_after, settings, subject_notes


def drifted(drift):
    return CurvePoint(
        batch_size=32,
        accumulate=8,
        step_seconds=0.1,
        step_seconds_low=0.09,
        step_seconds_high=0.11,
        optimizer_seconds=None,
        updates=10,
        peak=None,
        drift=drift,
    )


def scattered(size, low, high):
    """A size timed at a median of one second, between the seconds `low` and `high`."""
    return replace(
        drifted(None),
        batch_size=size,
        step_seconds=1.0,
        step_seconds_low=low,
        step_seconds_high=high,
    )


def test_evaluation_has_no_notes_on_updates():
    sizes = (
        Trial(size, Outcome.FIT, step_seconds=size / speed) for size, speed in ((16, 96), (64, 100))
    )
    result = {
        "plan": BatchPlan(64),
        "trials": tuple(sizes),
        "dataset_size": 64,
        "target_batch_size": None,
        "bound": None,
    }

    assert any("update" in note for note in notes_after(**result))
    predicting = notes_after(**result, task="predict")
    assert predicting == ("64 fits, and is about as fast as 16.",)
    assert notes_after(**result, task="answer", latency_limit=0.1) == ()


def test_quiet_result_has_no_notes():
    assert notes_after() == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (changes, expected)
        for changes, *expected in [
            (
                {"before": BatchPlan(32)},
                "The effective batch goes from 32 to 256.",
            ),
            (
                {"before": BatchPlan(32), "dataset_size": 50_000},
                "The effective batch goes from 32 to 256: 196 updates per epoch instead of 1,563.",
            ),
            (
                {
                    "before": BatchPlan(32),
                    "dataset_size": 50_000,
                    "learning_rate": LearningRateRule("AdamW", "square-root"),
                },
                (
                    "The effective batch goes from 32 to 256: 196 updates per epoch instead of 1,563. AdamW usually wants about "
                    "×2.8 the learning rate for that (square-root rule)."
                ),
            ),
            (
                {
                    "before": BatchPlan(32),
                    "dataset_size": 128,
                    "target_batch_size": None,
                    "plan": BatchPlan(128, 1),
                    "trials": (Trial(128, Outcome.FIT),),
                    "bound": None,
                },
                "The effective batch goes from 32 to 128: 1 update per epoch instead of 4.",
                (
                    "All 128 samples of an epoch fit at once. Set target_batch_size for smaller "
                    "batches and more updates."
                ),
            ),
            (
                {
                    "dataset_size": 128,
                    "target_batch_size": None,
                    "plan": BatchPlan(128, 1),
                    "trials": (Trial(128, Outcome.FIT),),
                    "bound": Bound(128, "an epoch of 128 samples has no more"),
                },
                (
                    "All 128 samples of an epoch fit at once: it performs one update. "
                    "Set target_batch_size for smaller batches and more updates."
                ),
            ),
            (
                {
                    "trials": (
                        Trial(32, Outcome.FIT, peak=int(10.5 * 2**30)),
                        Trial(64, Outcome.OUT_OF_MEMORY),
                    )
                },
                (
                    "Only 512 MiB of 12 GiB to spare: longer inputs, or other processes on this "
                    "device, may not fit. A lower memory_limit leaves more."
                ),
            ),
            (
                {"curve": (drifted(0.88), drifted(1.0), drifted(None), drifted(1.2))},
                "Timings drifted by 12 % while sizes were timed; other processes may use this device.",
            ),
            (
                {
                    "time_limit": 40.0,
                    "is_out_of_time": True,
                    "target_batch_size": None,
                    "latency_limit": 1.0,
                    "task": "answer",
                },
                "The search stopped at time_limit=40 seconds: larger sizes may answer in time too.",
            ),
            (
                {"curve": (scattered(32, 0.5, 2.0),)},
                (
                    "Single updates of 32 ran at 16 to 64 samples/s; on a quieter machine another size may be the "
                    "fastest."
                ),
            ),
            (
                {
                    "trials": tuple(Trial(size, Outcome.FIT) for size in (8, 32, 56)),
                    "curve": (drifted(None),),
                    "unreached": (2, 4, 56, 8),
                },
                (
                    "20 s did not suffice to time all sizes: micro-batches of 8 and 56 were "
                    "timed in their trials only, micro-batches of 2 and 4 were left out."
                ),
            ),
            (
                {"curve": (drifted(None),), "unreached": (16,)},
                "20 s did not suffice to time all sizes: micro-batches of 16 were left out.",
            ),
            (
                {"before": BatchPlan(64, 4)},
                "accumulate_grad_batches=4 of the Trainer is overridden with 8 to reach target_batch_size.",
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
                {"is_out_of_time": True},
                "The search stopped at time_limit=300 seconds: 56 is the largest verified so far, more may fit.",
            ),
            (
                {"settings": settings(memory_limit="16GiB")},
                "memory_limit='16GiB' is more than the 12 GiB of this device: the budget is 11.6 GiB.",
            ),
            (
                {"foreign": 3 * 2**30},
                "Other processes hold 3 GiB of this device's 12 GiB; the largest fit changes when they start or stop.",
            ),
            (
                {
                    "trials": (
                        Trial(32, Outcome.FIT),
                        Trial(1, Outcome.REFUSED, error="ValueError: too few"),
                        Trial(3, Outcome.REFUSED, error="KeyError: 3"),
                        Trial(5, Outcome.REFUSED, error="KeyError: 5"),
                    )
                },
                "The workload itself raised an error at batch_size=1, 3 and 5, so only sizes that ran are used (ValueError: too few; KeyError: 3).",
            ),
            (
                {"target_batch_size": 257, "plan": BatchPlan(32, 4, 2)},
                "Asked for 257 samples per update, got 256: 257 is not divisible by 2 ranks.",
            ),
            (
                {"target_batch_size": 1009, "plan": BatchPlan(56, 18)},
                "Asked for 1,009 samples per update, got 1,008: exact would take 1,009 micro-batches of 1 instead of 18 of 56.",
            ),
            (
                {"target_batch_size": 512},
                "Asked for 512 samples per update, got 256: no plan that gives it exactly was verified.",
            ),
        ]
    ],
)
def test_each_note_has_its_trigger(changes, expected):
    assert notes_after(**changes) == tuple(expected)


def test_notes_on_the_plan_come_before_notes_on_measurements():
    shown = notes_after(
        subject_notes=subject_notes("a trial note", "a plan note"),
        target_batch_size=257,
        plan=BatchPlan(32, 4, 2),
        is_out_of_time=True,
        before=BatchPlan(32, 2),
        dataset_size=200,
        trials=(
            Trial(1, Outcome.REFUSED),
            Trial(32, Outcome.FIT, peak=int(8.9 * 2**30)),
            Trial(64, Outcome.OUT_OF_MEMORY),
        ),
        look=Look(100, 200, is_even=False),
        foreign=3 * 2**30,
        curve=(drifted(0.88),),
        source="a file, because of it",
    )

    begins = [
        "a trial note",
        "Asked for",
        "The search stopped",
        "The effective batch",
        "The epoch (200 samples)",
        "a plan note",
        "Only",
        "Samples differ",
        "Other processes hold",
        "The workload itself",
        "Timings drifted",
        "Memory is read",
    ]
    assert len(shown) == len(begins)
    assert all(note.startswith(one) for note, one in zip(shown, begins, strict=True))


@pytest.mark.parametrize("bound", [56, 57])
def test_memory_of_other_processes_is_noted_only_if_memory_limits_the_search(bound):
    found = notes_after(foreign=3 * 2**30, bound=Bound(bound, "there is no more"))

    shown = [note for note in found if note.startswith("Other processes hold")]

    assert bool(shown) == (bound > 56)


def test_overridden_accumulation_joins_the_note_on_the_changed_batch():
    (note,) = notes_after(before=BatchPlan(64, 2))

    assert note.endswith(
        " to 256. accumulate_grad_batches=2 of the Trainer is overridden with 8 to reach target_batch_size."
    )


@pytest.mark.parametrize(
    "changes",
    [
        # The same effective batch, and no more than an epoch of it either way
        {
            "before": BatchPlan(256),
            "learning_rate": LearningRateRule("AdamW", "square-root"),
        },
        {
            "before": BatchPlan(256),
            "plan": BatchPlan(128, 1),
            "target_batch_size": 128,
            "dataset_size": 128,
            "learning_rate": LearningRateRule("AdamW", "square-root"),
        },
        # Nothing is trained, so nothing is updated
        {
            "dataset_size": 128,
            "target_batch_size": None,
            "plan": BatchPlan(128, 1),
            "trials": (Trial(128, Outcome.FIT),),
            "bound": None,
            "task": "predict",
        },
        # Asked for
        {"plan": BatchPlan(128, 1), "target_batch_size": 128, "dataset_size": 128},
        # A little more room than what is tight
        {
            "trials": (
                Trial(32, Outcome.FIT, peak=int(10.4 * 2**30)),
                Trial(64, Outcome.OUT_OF_MEMORY),
            )
        },
        # Another size's peak
        {
            "trials": (
                Trial(32, Outcome.FIT, peak=2**30),
                Trial(40, Outcome.FIT, peak=11 * 2**30),
                Trial(64, Outcome.OUT_OF_MEMORY),
            )
        },
        {"curve": (drifted(0.96), drifted(1.04), drifted(1.3), drifted(None))},
    ],
)
def test_no_note_below_its_trigger(changes):
    assert notes_after(**changes) == ()


LARGEST = {"target_batch_size": None, "plan": BatchPlan(64), "bound": None}


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({64: 100}, ()),
        ({32: 80, 64: 100}, ()),
        ({48: 99, 64: 100}, ()),  # not by much smaller
        ({16: 96, 32: 99, 64: 100}, ("64 fits, and is about as fast as 16, which gives more updates of the same samples.",)),
        ({16: 94, 32: 96, 64: 100}, ("64 fits, and is about as fast as 32, which gives more updates of the same samples.",)),
        ({16: 94, 32: 104, 64: 100}, ("64 fits, and is about as fast as 32, which gives more updates of the same samples.",)),
        ({16: 100, 32: 125, 64: 100}, ("64 fits, and is 20 % slower than 32.",)),
    ],
)  # fmt: skip
def test_the_largest_that_fits_is_compared_with_smaller_ones(speeds, expected):
    trials = tuple(
        Trial(size, Outcome.FIT, step_seconds=size / speed) for size, speed in speeds.items()
    )

    assert notes_after(**LARGEST, trials=trials) == expected


@pytest.mark.parametrize("changes", [{"target_batch_size": 32}, {"latency_limit": 1.0}])
def test_sizes_are_not_compared_with_a_target_or_a_latency_limit(changes):
    trials = (
        Trial(16, Outcome.FIT, step_seconds=0.1),
        Trial(32, Outcome.FIT, step_seconds=0.3),
    )

    slower = LARGEST | {"plan": BatchPlan(32), "trials": trials}

    assert notes_after(**slower) != ()
    assert notes_after(**(slower | changes)) == ()


@pytest.mark.parametrize(
    ("given_bounds", "world_size", "batch_size", "reason"),
    [
        (
            {"target_batch_size": 256},
            1,
            256,
            "target_batch_size=256 needs no more than 256 at once",
        ),
        (
            {"target_batch_size": 256},
            4,
            64,
            "target_batch_size=256 on 4 ranks needs no more than 64 at once",
        ),
        ({"max_micro_batch_size": 64}, 1, 64, "max_micro_batch_size=64 allows no more"),
        ({"dataset_size": 1797}, 1, 1797, "an epoch of 1,797 samples has no more"),
        (
            {"dataset_size": 1797},
            2,
            898,
            "an epoch of 1,797 samples on 2 ranks has no more",
        ),
    ],
)
def test_bound_has_its_reason(given_bounds, world_size, batch_size, reason):
    arguments = settings(**({"target_batch_size": None} | given_bounds))
    bound = tightest_bound(arguments, world_size)

    assert bound == Bound(batch_size, reason)


def test_no_bound_without_limits():
    assert tightest_bound(settings(target_batch_size=None), 1) is None


@given(*[st.none() | st.integers(1, 10**6)] * 3, st.integers(1, 64))
def test_the_lowest_bound_holds(target, largest, dataset, world_size):
    given_bounds = {"max_micro_batch_size": largest, "dataset_size": dataset}
    bound = tightest_bound(settings(target_batch_size=target, **given_bounds), world_size)

    shares = [n // world_size for n in (target, dataset) if n is not None]
    allowed = [*shares, *([largest] if largest is not None else [])]
    assert (bound.batch_size if bound else None) == min(allowed, default=None)


@pytest.mark.parametrize(("allocated", "is_noted"), [(101, True), (113, True), (114, False)])
def test_memory_held_by_fragments_is_noted_with_the_size_that_may_fit(allocated, is_noted):
    gib = 2**30
    trial = Trial(2424, Outcome.FIT, peak=125 * gib, resident=gib, allocated=allocated * gib)

    found = notes_after(plan=BatchPlan(2424), trials=(trial,), total=150 * gib, bound=None)

    more = 2424 * 124 // (allocated - 1)
    expected = (
        f"{125 - allocated} GiB of 125 GiB at 2,424 are fragments. "
        f"PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may fit up to {more:,}, an estimate from "
        "the bytes in use."
    )
    assert (expected in found) is is_noted


def test_fragments_do_not_matter_if_more_samples_are_not_needed():
    trial = Trial(256, Outcome.FIT, peak=2**33, resident=2**20, allocated=2**32)

    found = notes_after(plan=BatchPlan(256), trials=(trial,))

    assert not any("fragments" in note for note in found)
