"""NoiseScale and AutoBatch in one Trainer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import pl, quiet_trainer
from sameness import same
from test_noise_scale_lightning import Model, Recorded, hooks_of, loader


def tuner(target=60, **options):
    device = SimulatedAccelerator("450KiB")
    return autobatch.AutoBatch(target_batch_size=target, device=device, **options)


class Wide(Model):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 4))


def test_report_is_completed_when_training_ends(tmp_path, capsys):
    callback, noise = tuner(), autobatch.NoiseScale(every=1, split_every=1)
    logger = pl.loggers.CSVLogger(tmp_path)
    trainer = quiet_trainer(noise, callback, logger=logger, max_epochs=30)

    trainer.fit(Wide(), loader())

    report = callback.report
    assert report.noise == noise.reading
    assert report.noise.windows > 20
    assert report.noise.batch_size == report.plan.effective_batch_size
    written = autobatch.TuningReport.read(next(tmp_path.rglob("autobatch.json")))
    assert written == report
    printed = capsys.readouterr().out
    assert printed.count("= 60 per update") == 1
    assert printed.count("what training showed") == 1


def test_short_run_prints_a_reason_and_no_table(capsys):
    callback, noise = tuner(), autobatch.NoiseScale()

    quiet_trainer(noise, callback).fit(Wide(), loader())

    _, showed = capsys.readouterr().out.split("what training showed")
    assert "it takes 100 updates or more, and there were 8" in " ".join(showed.split())
    assert "per update" not in showed
    assert len(showed.strip().splitlines()) <= 3


def test_loggers_get_the_plan_once():
    logger = Recorded()
    callbacks = (tuner(), autobatch.NoiseScale())

    quiet_trainer(*callbacks, logger=logger).fit(Wide(), loader())

    logged = [each for each in logger.hyperparameters if "autobatch/batch_size" in each]
    assert len(logged) == 1


def test_fit_without_a_plan_prints_nothing_at_its_end(capsys):
    callbacks = (tuner(), autobatch.NoiseScale())
    quiet_trainer(*callbacks).fit(Wide(), loader())
    capsys.readouterr()

    quiet_trainer(*callbacks, fast_dev_run=True).fit(Wide(), loader())

    assert "per update" not in capsys.readouterr().out


def test_trials_are_not_measured():
    class Watched(Wide):
        seen = ()

        def training_step(self, batch, batch_idx):
            type(self).seen += (any(map(bool, hooks_of(self))),)
            return super().training_step(batch, batch_idx)

    callback = tuner(120, retune_at_epochs=[1])
    noise, started = autobatch.NoiseScale(every=1), []

    def per_epoch():  # the plan of each tuning depends on timings
        return math.ceil(240 / callback.report.plan.micro_batch_size)

    class Starts(pl.Callback):
        def on_train_start(self, trainer, module):
            started.append((len(Watched.seen), per_epoch()))

    trainer = quiet_trainer(noise, callback, Starts(), max_epochs=2)
    trainer.fit(Watched(), loader())

    ((trials, first),) = started
    assert trials > 3
    assert not any(Watched.seen[:trials])
    assert all(Watched.seen[trials : trials + first])
    assert not all(Watched.seen[trials:])  # the trials of epoch 1
    assert all(Watched.seen[-per_epoch() :])


@pytest.mark.slow
def test_training_beside_autobatch_is_bit_identical():
    def trained(*callbacks):
        pl.seed_everything(1, verbose=False)
        model = Wide()
        quiet_trainer(*callbacks).fit(model, loader())
        return model.state_dict(), torch.get_rng_state()

    plan = autobatch.BatchPlan(30, 2)  # otherwise the plan depends on timings
    assert same(
        trained(tuner(plan=plan), autobatch.NoiseScale(every=1, split_every=1)),
        trained(tuner(plan=plan)),
    )
