"""SIGTERM while a Trainer tunes again: the run ends with the step, as it does in training."""

from __future__ import annotations

import os
import signal

import pytest

from lightning_here import Model, plain, quiet_trainer, tuner

STEPS = []


class Terminated(Model):
    """Gets SIGTERM in the first step of epoch 1, which belongs to a trial."""

    def training_step(self, batch, batch_idx):
        STEPS.append(self.current_epoch)
        if STEPS.count(1) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_a_run_that_tunes_again_ends_with_the_step_after_sigterm():
    STEPS.clear()
    loader, callback = plain(), tuner(retune_at_epochs=[1])
    trainer = quiet_trainer(callback, max_epochs=3)

    with pytest.raises(SystemExit) as caught:
        trainer.fit(Terminated(), loader)

    assert type(caught.value).__name__ == "SIGTERMException"
    assert STEPS.count(1) == 1
    assert trainer.interrupted
    assert loader.batch_size == 4
