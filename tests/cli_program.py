"""A LightningCLI with AutoBatch; it prints the plan and the arguments that reached the callback.

python cli_program.py PACKAGE BUILT_IN fit ARGUMENTS
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings

import torch
from torch.utils.data import DataLoader, TensorDataset

import autobatch

warnings.simplefilter("ignore")
package, built_in, *sys.argv[1:] = sys.argv[1:]
pl = importlib.import_module(package)
LightningCLI = importlib.import_module(package + ".cli").LightningCLI


class Model(pl.LightningModule):
    def __init__(self, batch_size: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(8, 1)
        self.sizes = []

    def training_step(self, batch, _):
        self.sizes.append(len(batch[0]))
        return self.net(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(640, 8)), self.hparams.batch_size)


class Own(LightningCLI):
    def add_arguments_to_parser(self, parser):
        if built_in == "True":
            parser.add_lightning_class_args(autobatch.AutoBatch, "autobatch")


cli = Own(Model, save_config_callback=None)
(callback,) = (c for c in cli.trainer.callbacks if type(c).__name__ == "AutoBatch")
result = {
    "sizes": sorted(set(cli.model.sizes)),
    "effective": callback.report.plan.effective_batch_size,
    "settings": callback.report.settings.model_dump(),
    "search": type(callback._arguments.search).__name__,
    "epochs": sorted(callback._arguments.retune_at_epochs),
    "total": callback.report.device.total,
    "evaluates": callback._arguments.evaluates,
}
print("RESULT", json.dumps(result))
