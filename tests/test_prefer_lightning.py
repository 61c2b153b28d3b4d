"""The size of the loader is kept if it is as fast as others."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

from autobatch import AutoBatch, BatchPlan
from autobatch.testing import SimulatedAccelerator
from lightning_here import Model, data, quiet_trainer

pytestmark = pytest.mark.curve


class Timed(SimulatedAccelerator):
    """A clock that only training steps advance."""

    now = 0.0

    def clock(self):
        return Timed.now


class SameSpeed(Model):
    """Takes as long for a sample in any batch."""

    seconds_per_step = 0.0

    def training_step(self, batch, batch_idx):
        Timed.now += self.seconds_per_step + 1e-3 * len(batch[0])
        return super().training_step(batch, batch_idx)


def fitted(seconds_per_step, **options):
    module, auto = SameSpeed(), AutoBatch(device=Timed("450KiB"), timing_seconds=20, **options)
    module.seconds_per_step = seconds_per_step
    quiet_trainer(auto, max_epochs=1).fit(module, DataLoader(data(), 32))
    return module, auto.report


@pytest.mark.parametrize(("target", "accumulate"), [(None, 1), (128, 4)])
def test_the_own_size_is_kept_if_it_is_as_fast(target, accumulate):
    module, report = fitted(0.0, target_batch_size=target)

    assert report.plan == BatchPlan(32, accumulate)
    assert module.sizes == [32] * 18 + [24]


def test_a_slow_own_size_gives_way():
    module, report = fitted(0.05)

    assert report.plan.micro_batch_size > 32
    assert module.sizes[0] == report.plan.micro_batch_size


@pytest.mark.parametrize(
    ("options", "is_timed"),
    [({"max_epochs": 1}, False), ({"max_steps": 2}, False), ({"max_epochs": 400}, True)],
)
def test_timing_takes_at_most_a_tenth_of_the_training(options, is_timed):
    auto = AutoBatch(device=Timed("450KiB"))
    trainer = quiet_trainer(**options)

    report = auto.tune(trainer, SameSpeed(), DataLoader(data(), 32))

    # An epoch takes 0.6 seconds, and timing updates of 32 samples 0.13
    assert (report.curve != ()) == is_timed
    assert report.plan == BatchPlan(32)
    untimed = any(
        note.startswith("No size was timed: ")
        and " ms, a tenth of the shortest time that the planned training may take, " in note
        and "so your own batch size of 32 is kept. timing_seconds sets another limit." in note
        for note in report.notes
    )
    assert untimed != is_timed


def test_the_limit_that_ended_timing_is_named():
    auto = AutoBatch(device=Timed("450KiB"), prefer="largest")

    report = auto.tune(quiet_trainer(max_epochs=1), SameSpeed(), DataLoader(data(), 32))

    (note,) = (note for note in report.notes if "did not suffice" in note)
    assert "a tenth of" in note
    assert "half the time of the search" not in note
