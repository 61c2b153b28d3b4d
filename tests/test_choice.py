from __future__ import annotations

import pytest

import autobatch
from autobatch import BatchPlan, Outcome
from autobatch.testing import PaperDevice


def found(device, *, needs=1, **options):
    """Tune a workload that refuses fewer samples than it needs, as BatchNorm does."""

    def train(batch_size, accumulate):
        if batch_size < needs:
            raise ValueError("Expected more than 1 value per channel when training")
        yield from device.workload(batch_size, accumulate)

    return autobatch.find(train, device=device, memory_limit=1.0, **options)


@pytest.mark.parametrize("target", [None, 8, 50, 64, 128])
def test_no_epoch_ends_with_a_single_sample_that_the_workload_refuses(target):
    device = PaperDevice(1000, fixed=200, per_sample=8)  # 100 samples fit

    report = found(device, needs=2, target_batch_size=target, dataset_size=401)

    assert 401 % report.plan.micro_batch_size != 1
    assert not any("will fail" in note for note in report.notes)
    assert report.plan.micro_batch_size in {
        trial.batch_size for trial in report.trials if trial.fits
    }


def test_the_largest_size_is_reduced_by_one_if_that_ends_well():
    device = PaperDevice(1000, fixed=200, per_sample=8)

    assert found(device, dataset_size=401).plan == BatchPlan(100)
    assert found(device, needs=2, dataset_size=401).plan == BatchPlan(99)


def test_a_single_last_sample_that_trains_changes_nothing():
    device = PaperDevice(1000, fixed=200, per_sample=8)

    here = found(device, target_batch_size=64, dataset_size=401)
    elsewhere = found(device, target_batch_size=64, dataset_size=400)

    assert here.plan == elsewhere.plan


def test_one_sample_is_tried_only_if_an_epoch_ends_with_it():
    device = PaperDevice(1000, fixed=200, per_sample=8)

    def tried(samples):
        report = found(device, dataset_size=samples)
        return 1 in {trial.batch_size for trial in report.trials}

    assert tried(401)
    assert not tried(402)


def test_the_first_note_reports_that_no_size_ends_well():
    device = PaperDevice(1000, fixed=200, per_sample=8)

    report = found(device, needs=2, max_micro_batch_size=2, dataset_size=401)

    assert report.plan == BatchPlan(2)
    assert report.trials[-1].outcome is Outcome.REFUSED
    assert report.notes[0].startswith(
        "Training will fail at the end of an epoch: its last micro-batch has 1 sample,"
    )


def test_a_missed_target_names_the_refused_last_sample():
    device = PaperDevice(1000, fixed=200, per_sample=8)

    report = found(device, needs=2, target_batch_size=8, dataset_size=401)

    assert report.notes[0] == (
        "Asked for 8 samples per update, got 7: with 8, an epoch would end with a single sample, which the workload refused; drop_last=True "
        "of the loader leaves it out."
    )


@pytest.mark.curve
def test_a_size_chosen_late_is_timed_like_the_others():
    device = PaperDevice(1000, fixed=200, per_sample=8)

    report = found(device, needs=2, target_batch_size=64, dataset_size=513)

    size = report.plan.micro_batch_size
    assert size < 64
    assert size in {point.batch_size for point in report.curve}
    assert report.curve == tuple(sorted(report.curve, key=lambda p: p.batch_size))


def test_no_row_is_shown_that_training_would_fail_with():
    device = PaperDevice(1000, fixed=200, per_sample=8)

    refusing = found(device, needs=2, target_batch_size=64, dataset_size=513)
    other = found(device, target_batch_size=64, dataset_size=513)

    def ending_with_one(report):
        sizes = {row.micro_batch_size for row in report.effective}
        return {size for size in sizes if 513 % size == 1}

    assert ending_with_one(other)
    assert not ending_with_one(refusing)


def test_the_speed_of_a_known_plan_is_marked_as_of_one_trial():
    device = PaperDevice(1000, fixed=200, per_sample=8)

    known = found(device, plan=BatchPlan(64))

    assert "by one trial, a few steps" in str(known)


@pytest.mark.curve
def test_speed_never_makes_a_loop_accumulate_that_cannot():
    # Small micro-batches are as fast, and the smallest within 5 % of the fastest is taken
    device = PaperDevice(1000, fixed=200, per_sample=8, seconds_per_step=0)

    def train(batch_size):
        yield from device.workload(batch_size, 1)

    either = autobatch.find(device.workload, device=device, target_batch_size=64)
    alone = autobatch.find(train, device=device, target_batch_size=64)

    assert either.plan.accumulate_grad_batches > 1
    assert alone.plan == BatchPlan(64)


@pytest.mark.parametrize(("target", "samples"), [(512, 300), (4, 3), (100, 99)])
def test_an_update_has_no_more_samples_than_an_epoch(target, samples):
    device = PaperDevice(1000, fixed=200, per_sample=8)

    report = found(device, target_batch_size=target, dataset_size=samples)

    assert report.plan.effective_batch_size == samples
    assert report.notes[0] == (
        f"Asked for {target} samples per update, got {samples}: an epoch has no more than {samples} samples."
    )
    assert [row.updates_per_epoch for row in report.effective][-1] == 1
