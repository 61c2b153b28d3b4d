"""AutoBatch.estimate: what fits on a GPU that is not here, from a Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import autobatch
from autobatch.errors import AutobatchError
from lightning_here import Model, data, pl, quiet_trainer
from sameness import same


class Wide(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(16, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 4)
        )

    def training_step(self, batch, _):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def estimated(module, *, target=None, trainer=None, **options):
    trainer = trainer or quiet_trainer(precision="bf16-mixed")
    tuner = autobatch.AutoBatch(target_batch_size=target, memory_limit="512MiB", verbose=False)
    return tuner.estimate(trainer, module, DataLoader(data(), 4), device="H100", **options)


def test_an_estimate_of_a_trainer_is_that_of_its_step():
    module = Wide()
    module.log = lambda *_: None

    estimate = estimated(Wide())
    by_hand = autobatch.estimate(
        module,
        lambda module, batch: module.training_step(batch, 0),
        next(iter(DataLoader(data(), 4))),
        precision="bf16-mixed",
        device="H100",
        memory_limit="512MiB",
    )

    assert estimate.subject == by_hand.subject == "Wide · AdamW · bf16-mixed"
    # In a Trainer gradients are zeroed after the forward pass, in which the parameters are small
    assert abs(estimate.largest - by_hand.largest) <= by_hand.largest / 50
    assert [change.change for change in estimate.changes()] == [
        "SGD with momentum",
        "8-bit optimizer state",
        "2 micro-batches per update",
        "expandable segments",
    ]


def test_a_trainer_in_half_precision_is_estimated_in_it():
    class MakesTensors(Wide):
        def training_step(self, batch, index):
            assert torch.zeros(1).dtype == batch[0].dtype == torch.bfloat16
            return super().training_step(batch, index)

    half = estimated(MakesTensors(), trainer=quiet_trainer(precision="bf16-true"))

    assert half.subject == "MakesTensors · AdamW · bf16-true"
    assert half.at(64).held["gradients"] == estimated(Wide()).at(64).held["gradients"] / 2


def test_a_target_beyond_one_micro_batch_accumulates():
    parameters = sum(parameter.nbytes for parameter in Wide().parameters())
    alone, within = estimated(Wide()), estimated(Wide(), target=64)
    beyond = estimated(Wide(), target=10**6)

    assert within.largest == alone.largest
    assert alone.at(64).held["gradients"] < beyond.at(64).held["gradients"] == parameters
    assert "2 micro-batches per update" not in {c.change for c in beyond.changes()}


def test_the_trainer_the_module_and_the_loader_stay_as_they_are():
    module, trainer, loader = Model(batch_size=4), quiet_trainer(), DataLoader(data(), 4)
    before = copy.deepcopy((module.state_dict(), dict(module.hparams), torch.get_rng_state()))
    tuner = autobatch.AutoBatch(verbose=False)

    estimate = tuner.estimate(trainer, module, loader, device="T4")

    assert estimate.largest > 4
    assert tuner.reports == {}
    assert same((module.state_dict(), dict(module.hparams), torch.get_rng_state()), before)
    assert (loader.batch_size, trainer.callbacks, trainer.global_step) == (4, [], 0)


def test_a_step_that_is_not_modelled_is_refused():
    class Manual(Wide):
        automatic_optimization = False

    with pytest.raises(AutobatchError, match="cannot be estimated: the module optimizes by itself"):
        estimated(Manual())
    with pytest.raises(ValueError, match="device='H300' is not a known GPU"):
        autobatch.AutoBatch().estimate(
            quiet_trainer(), Wide(), DataLoader(data(), 4), device="H300"
        )
