"""Memory that callbacks hold beside a step is in the budget, or is reported before it runs out."""

from __future__ import annotations

import contextlib
import copy
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import Model, data, pl, quiet_trainer


class Wide(Model):
    def __init__(self, batch_size=4):
        super().__init__(batch_size)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(16, 1400), torch.nn.ReLU(), torch.nn.Linear(1400, 4)
        )
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0][:, 0].tolist())
        return super().training_step(batch, batch_idx)


class Scaled(Wide):
    """Reads the batch size for the learning rate, and the length of training for the schedule."""

    def __init__(self, batch_size):
        super().__init__(batch_size)
        self.rates = []

    def training_step(self, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-4 * self.hparams.batch_size)
        rates = torch.optim.lr_scheduler
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = rates.LinearLR(optimizer, 1, 0.1, total_iters=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Average(pl.Callback):
    """Clones the weights where training starts."""

    def on_train_start(self, trainer, module):
        self.shadow = {name: value.clone() for name, value in module.state_dict().items()}


class LateAverage(pl.Callback):
    """Clones the weights after the first step."""

    shadow = None

    def on_train_batch_end(self, trainer, module, *_):
        if self.shadow is None:
            self.shadow = [value.clone() for value in module.state_dict().values()]


class Capacity(pl.Callback):
    """Lets the device refuse what training asks for beyond its capacity."""

    def __init__(self, device):
        self.device, self.held = device, contextlib.ExitStack()

    def on_train_start(self, trainer, module):
        self.device.attach(module, *trainer.optimizers)
        self.held.enter_context(self.device.limited(self.device.capacity))

    def on_train_end(self, trainer, module):
        self.held.close()

    def on_exception(self, trainer, module, error):
        self.held.close()


class Annealed(pl.callbacks.StochasticWeightAveraging):
    """Replaces the schedule where the first epoch starts."""

    def __init__(self):
        super().__init__(1e-3, swa_epoch_start=1)


def fit(
    *others,
    module=Wide,
    size=4,
    generator=None,
    workers=0,
    callback=None,
    capacity="900KiB",
    **options,
):
    """Return the model and what the callback reports; by hand without a callback."""
    pl.seed_everything(1, verbose=False)
    model, device = module(size), SimulatedAccelerator(capacity)
    callbacks = []
    if callback is not None:
        callback = callback(device=device)
        callbacks = [callback, Capacity(device)]
    generator = generator and torch.Generator().manual_seed(generator)
    persistent = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = DataLoader(data(), size, shuffle=True, generator=generator, **persistent)
    quiet_trainer(*callbacks, *others, **options).fit(model, loader)
    return model, callback and callback.report


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@pytest.mark.parametrize(
    ("module", "others", "options"),
    [
        (Wide, (), {}),
        (Scaled, (), {"generator": 3}),
        (Wide, (), {"workers": 1}),
        (Scaled, (Annealed,), {"capacity": "1100KiB"}),
    ],
    ids=["plain", "schedule", "persistent workers", "schedule replaced by a callback"],
)
def test_memory_made_at_the_start_of_training_is_searched_with_from_the_first_batch(
    module, others, options
):
    average = [Average(), *(other() for other in others)]
    model, report = fit(*average, module=module, callback=autobatch.AutoBatch, **options)
    plan = report.plan
    by_hand, _ = fit(
        *(other() for other in others),
        module=module,
        size=plan.micro_batch_size,
        accumulate_grad_batches=plan.accumulate_grad_batches,
        **options,
    )

    (note,) = [note for note in report.notes if "Tuned again at epoch 0" in note]
    assert "Average 115 KiB" in note
    assert set(model.sizes[:5]) == {plan.micro_batch_size}
    assert model.seen == by_hand.seen
    assert vars(model).get("rates") == vars(by_hand).get("rates")
    assert all(map(torch.equal, model.state_dict().values(), by_hand.state_dict().values()))


def test_memory_that_fits_beside_the_peak_changes_nothing():
    callback = partial(autobatch.AutoBatch, target_batch_size=20, max_micro_batch_size=20)
    _, report = fit(Average(), callback=callback, capacity="8MiB")
    _, alone = fit(callback=callback, capacity="8MiB")

    assert report.plan.effective_batch_size == alone.plan.effective_batch_size == 20
    assert not any("Tuned again" in note for note in report.notes)


def test_memory_made_after_the_first_step_is_reported_and_the_next_epoch_tuned(caplog):
    kind = type("Lenient", (Capacity,), {"on_train_start": lambda *_: None})
    device = SimulatedAccelerator("900KiB")
    callback = autobatch.AutoBatch(device=device)
    model = Wide()

    quiet_trainer(callback, kind(device), LateAverage()).fit(model, DataLoader(data(), 4))

    (warning,) = [r.message for r in caplog.records if "Callbacks hold" in r.message]
    assert "LateAverage 115 KiB" in warning
    notes = " ".join(callback.report.notes)
    assert "Tuned again at epoch 1" in notes
    first, last = model.sizes[0], callback.report.plan.micro_batch_size
    assert last < first
    assert model.sizes[-2] == last


def test_an_average_that_lightning_makes_in_setup_is_in_the_peak():
    averaging = pytest.importorskip(pl.__name__ + ".callbacks").WeightAveraging

    _, alone = fit(callback=autobatch.AutoBatch)
    _, report = fit(averaging(), callback=autobatch.AutoBatch)

    largest = max(trial.batch_size for trial in report.trials if trial.fits)
    assert largest < max(trial.batch_size for trial in alone.trials if trial.fits)
    assert not any("Tuned again" in note for note in report.notes)


class Lazy(Wide):
    """Copies its network in a hook after its first step, out of sight of the module."""

    def on_train_batch_end(self, *_):
        if not hasattr(self, "average"):
            object.__setattr__(self, "average", copy.deepcopy(self.net))


class Views(Wide):
    """Puts two more views of each sample into the batch, in a hook before the step."""

    def on_train_batch_start(self, batch, batch_idx):
        batch[0] = torch.cat([batch[0], batch[0] + 0.1, batch[0] - 0.1])
        batch[1] = batch[1].repeat(3)


@pytest.mark.parametrize("module", [Lazy, Views])
def test_memory_that_hooks_of_the_module_make_is_in_the_peak(module):
    largest = partial(autobatch.AutoBatch, prefer="largest", timing_seconds=0.0)

    _, alone = fit(callback=largest, max_epochs=1)
    _, report = fit(module=module, callback=largest, max_epochs=1)

    assert report.plan.micro_batch_size < alone.plan.micro_batch_size
