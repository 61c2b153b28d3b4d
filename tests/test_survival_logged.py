"""Logged values of a training that runs out of memory: those of one that does not."""

from __future__ import annotations

import pytest
import torch
import torchmetrics
from torch.nn import functional as F
from torch.utils.data import DataLoader

import autobatch
from lightning_here import data, pl, quiet_trainer
from surviving import SPLIT
from test_survival_fits import Logger

ROWS = 8


class LogsEverywhere(pl.LightningModule):
    """Logs in each hook of a training batch.

    Args:
        fails_at: Number of the batch, over all epochs, whose first attempt fails; None for none.
        place: Part of the step that fails: "forward" or "backward".
    """

    def __init__(self, fails_at=None, place="forward"):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(16, 4)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4, average="micro")
        self.fails_at, self.place = fails_at, place

    def on_train_batch_start(self, batch, _):
        self.log("start", float(self.trainer.global_step), on_epoch=True)

    def training_step(self, batch, _):
        inputs, labels = batch
        logits = self.net(inputs)
        loss = F.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.log("loss", loss, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        for name, size in {"loader": ROWS, "batch": len(inputs)}.items():
            self.log(f"loss_by_{name}", loss, on_epoch=True, batch_size=size)
        reduced = {"sum": float(len(inputs)), "max": inputs.max(), "min": inputs.min()}
        for name, value in reduced.items():
            self.log(name, value, on_step=True, on_epoch=True, reduce_fx=name)
        if self.trainer.global_step == self.fails_at and len(inputs) == ROWS:
            if self.place == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            logits.register_hook(run_out)
        return loss

    def on_before_zero_grad(self, _):
        self.log("zero", float(self.trainer.global_step), on_step=True, on_epoch=True)

    def on_before_backward(self, loss):
        self.log("begins", float(self.trainer.global_step), on_step=True, on_epoch=True)

    def on_after_backward(self):
        self.log("after", self.net.weight.grad.norm(), on_step=True, on_epoch=True)

    def on_before_optimizer_step(self, _):
        self.log_dict(pl.utilities.grad_norm(self, 2))

    def on_train_batch_end(self, outputs, *_):
        self.log("end", outputs["loss"], on_step=True, on_epoch=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run_out(_):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def logged(*arguments):
    """Return the failures of two epochs of three batches, the last one short, and what they log."""
    callback, logger = autobatch.AutoBatch(**SPLIT), Logger()
    trainer = quiet_trainer(callback, max_epochs=2, logger=logger, log_every_n_steps=1)
    trainer.fit(LogsEverywhere(*arguments), DataLoader(data(20), batch_size=ROWS))
    values = {(name, step): value for name, value, step in logger.scalars}
    return len(callback.survived), {
        key: float(value) for key, value in values.items() if not key[0].startswith("autobatch/")
    }


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("fails_at", [0, 1, 3], ids=["first", "second", "first of epoch 2"])
def test_values_of_all_hooks_are_those_of_a_run_that_never_failed(fails_at, place):
    failures, found = logged(fails_at, place)
    none, expected = logged()

    assert (failures, none) == (1, 0)
    assert found == pytest.approx(expected, rel=1e-5)
    assert {"loss_epoch", "zero_epoch", "end_step"} < {name for name, _ in expected}
