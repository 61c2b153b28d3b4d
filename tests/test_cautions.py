from __future__ import annotations

import pytest

from autobatch._accumulation import BatchNorms, Splitting
from autobatch._plan import BatchPlan
from autobatch._report.notes import (
    accumulation_costs,
    batch_norm,
    not_additive,
    share,
    stretched_schedule,
    usual_learning_rate,
)
from autobatch._report.tradeoff import LearningRateRule, common_rule


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
def test_batch_norm_sees_a_micro_batch_and_not_the_update(norms, plan, notes):
    assert batch_norm(norms, plan) == notes


def test_a_batch_that_does_not_split_is_told_by_how_much():
    note = not_additive(Splitting(32, 0.184, is_sum=False), BatchPlan(32, 8))

    assert note.startswith("Splitting a batch of 32 changed its gradient by 18 %: ")
    assert "does not reproduce a batch of 256" in note


def test_a_loss_that_is_a_sum_is_told_as_one():
    note = not_additive(Splitting(32, 0.5, is_sum=True), BatchPlan(32, 8))

    assert "accumulated over 8 micro-batches, its gradient is 1/8" in note


@pytest.mark.parametrize(
    ("rule", "batches", "told"),
    [
        ("square-root", 8.0, "×2.8 the learning rate for that (square-root rule)"),
        ("linear", 8.0, "×8 the learning rate for that (linear rule)"),
        ("linear", 1 / 32, "×0.031 the learning rate"),
        ("linear", 128.0, "×128 the learning rate"),
    ],
)
def test_the_learning_rate_goes_by_the_rule_of_the_optimizer(rule, batches, told):
    note = usual_learning_rate(LearningRateRule("AdamW", rule), batches)

    assert note.startswith("AdamW usually wants about ×")
    assert told in note


def test_a_schedule_of_so_many_updates_covers_other_data():
    note = stretched_schedule("LinearLR", 1000, BatchPlan(32), BatchPlan(32, 8))

    assert note == (
        "LinearLR counts updates: its 1,000 steps now cover 256,000 samples instead of 32,000."
    )


def test_a_schedule_whose_length_is_not_known_is_told_without_it():
    note = stretched_schedule("LambdaLR", None, BatchPlan(32), BatchPlan(32, 8))

    assert note is not None
    assert "each of 256 samples now instead of 32" in note


def test_with_the_same_effective_batch_a_schedule_is_what_it_was():
    assert stretched_schedule("LinearLR", 1000, BatchPlan(256), BatchPlan(32, 8)) is None


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
def test_accumulation_is_called_costly_past_twice_the_best(accumulate, best, past):
    note = accumulation_costs(BatchPlan(32, accumulate), best, 0.09)

    assert (note is not None) == (past is not None)
    assert note is None or note == (
        f"Accumulating more than ×{past} would likely cost time: all it saves is optimizer steps, 9 % of an update "
        "that does not accumulate."
    )


@pytest.mark.parametrize(
    ("part", "told"),
    [(0.012, "1.2 %"), (0.1, "10 %"), (0.184, "18 %"), (1.234, "123 %")],
)
def test_a_share_has_two_digits_or_whole_percents(part, told):
    assert share(part) == told


# Which rule


def an(name, *bases):
    return type(name, bases or (object,), {})()


ADAM, SGD, LION = an("Adam"), an("SGD"), an("Lion")


@pytest.mark.parametrize(
    ("optimizers", "rule"),
    [
        ((), None),
        ((LION,), None),
        ((ADAM,), LearningRateRule("Adam", "square-root")),
        ((SGD,), LearningRateRule("SGD", "linear")),
        ((an("Own", type(SGD)),), LearningRateRule("Own", "linear")),
        ((ADAM, an("Adam")), LearningRateRule("Adam", "square-root")),
        ((ADAM, SGD), None),
        ((ADAM, LION), None),
    ],
)
def test_several_optimizers_have_one_rule_or_none(optimizers, rule):
    assert common_rule(optimizers) == rule
