from __future__ import annotations

import pytest

from autobatch import BatchPlan
from autobatch._accumulation import BatchNorms, Splitting
from autobatch._report.accumulation_notes import accumulation_costs, batch_norm, not_additive
from autobatch.report import LearningRateRule
from report_examples import notes_after


@pytest.mark.parametrize(
    ("norms", "plan", "notes"),
    [
        (BatchNorms(53, 0), BatchPlan(32, 1), ()),
        (BatchNorms(0, 0), BatchPlan(32, 8), ()),
        (
            BatchNorms(53, 0),
            BatchPlan(32, 8),
            ("53 BatchNorm layers use the statistics of 32 samples, not 256.",),
        ),
        (
            BatchNorms(1, 0),
            BatchPlan(16, 2),
            ("1 BatchNorm layer uses the statistics of 16 samples, not 32.",),
        ),
        (
            BatchNorms(53, 0),
            BatchPlan(15, 8),
            (
                (
                    "53 BatchNorm layers use the statistics of 15 samples, not 120, and their running averages move 8 times "
                    "per update. Micro-batches of 16 or more, or GroupNorm, are steadier."
                ),
            ),
        ),
        (
            BatchNorms(0, 2),
            BatchPlan(8, 4, 2),
            ("2 SyncBatchNorm layers use the statistics of 16 samples, not 64.",),
        ),
        (
            BatchNorms(1, 1),
            BatchPlan(16, 4, 2),
            (
                "1 BatchNorm layer uses the statistics of 16 samples, not 128.",
                "1 SyncBatchNorm layer uses the statistics of 32 samples, not 128.",
            ),
        ),
    ],
)
def test_batch_norm_layers_are_noted_with_their_batch_size(norms, plan, notes):
    assert batch_norm(norms, plan) == notes


def test_note_on_splitting_has_the_change_of_the_gradient():
    note = not_additive(Splitting(32, 0.184, is_sum=False), BatchPlan(32, 8))

    assert note.startswith("Splitting a batch of 32 changed its gradient by 18 %: ")
    assert "does not reproduce a batch of 256" in note


def test_sum_loss_has_its_own_note():
    note = not_additive(Splitting(32, 0.5, is_sum=True), BatchPlan(32, 8))

    assert "accumulated over 8 micro-batches, its gradient is 1/8" in note


@pytest.mark.parametrize(
    ("rule", "before", "expected"),
    [
        ("square-root", 32, "×2.8 the learning rate for that (square-root rule)."),
        ("linear", 32, "×8 the learning rate for that (linear rule)."),
        ("linear", 8192, "×0.031 the learning rate for that (linear rule)."),
        ("linear", 2, "×128 the learning rate for that (linear rule)."),
    ],
)
def test_usual_learning_rate_follows_the_rule(rule, before, expected):
    (note,) = notes_after(before=BatchPlan(before), learning_rate=LearningRateRule("AdamW", rule))

    assert note.endswith(f" AdamW usually wants about {expected}")


@pytest.mark.parametrize(
    ("accumulate", "best", "past"),
    [
        (2, 0.3, None),
        (3, 0.3, 1),
        (8, 4.0, None),
        (9, 4.0, 4),
        (9, 2.6, 3),
    ],
)
def test_accumulation_is_costly_above_twice_the_best(accumulate, best, past):
    note = accumulation_costs(BatchPlan(32, accumulate), best, 0.09)

    assert (note is not None) == (past is not None)
    assert note is None or note == (
        f"Accumulating more than ×{past} would likely cost time: it only saves optimizer steps, "
        "9 % of an update without accumulation."
    )
