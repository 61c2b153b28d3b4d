"""Steps that projects have reported about batch sizes, in small; trained by hand as well."""

from __future__ import annotations

import csv
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import autobatch
from by_hand import PAIRS, Recorded, X, compared
from lightning_here import pl, quiet_trainer

# Only the choice depends on the time of steps, and not what is trained
UNTIMED = {"timing_seconds": 0.0}


def plain(batch_size, **options):
    return DataLoader(PAIRS, batch_size, shuffle=True, **options)


class Adversarial(Recorded):
    """Two networks that take turns, the second one every third time."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        self.sizes.append(len(batch[1]))
        self.seen.append(batch[0].double().sum().item())
        generate, criticize = self.optimizers()
        self.toggle_optimizer(criticize)
        loss = self.critic(self.net(batch[0]).detach()).square().mean()
        self._update(criticize, loss)
        self.untoggle_optimizer(criticize)
        if batch_idx % 3 == 2:
            self._update(generate, -self.critic(self.net(batch[0])).mean())

    def _update(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        modules = (self.net, self.critic)
        return [torch.optim.Adam(each.parameters(), 1e-3) for each in modules]


class Truncated(Adversarial):
    """Several updates for each batch, one for each part of its sequences."""

    def training_step(self, batch, batch_idx):
        self.sizes.append(len(batch[1]))
        self.seen.append(batch[0].double().sum().item())
        hidden = torch.zeros(len(batch[1]), 4)
        for part in batch[0].split(8, dim=1):
            hidden = self.net(torch.cat([part, part], 1)) + hidden.detach()
            self._update(self.optimizers(), F.cross_entropy(hidden, batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), 1e-3)


class Contrasts(Recorded):
    """A queue of keys with a pointer, and an encoder that follows the other slowly."""

    def __init__(self):
        super().__init__()
        self.key = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 4))
        self.key.requires_grad_(False)
        self.register_buffer("queue", torch.randn(4, 240))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        query, key = self.net(batch[0]), self.key(batch[0] + 0.1)
        scores = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone()], 1)
        at, count = int(self.pointer), len(key)
        self.queue[:, at : at + count] = key.T
        self.pointer[0] = (at + count) % 240
        return F.cross_entropy(scores, torch.zeros(count, dtype=torch.long))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        for slow, fast in zip(self.key.parameters(), self.net.parameters(), strict=True):
            slow.lerp_(fast.detach(), 0.1)


class Carries(Recorded):
    """Keeps its hidden state from one batch to the next."""

    hidden = None

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        logits = self.net(batch[0])
        if self.hidden is not None:
            logits = logits + 0.1 * self.hidden
        self.hidden = logits.detach()
        return F.cross_entropy(logits, batch[1])

    def on_train_epoch_end(self):
        self.hidden = None


class Skips(Recorded):
    """Has no loss for some batches."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 3 == 1 else loss


class Quasi(Recorded):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=2)


class Weighs(Recorded):
    """Asks the loader of the Trainer for its length and its data, and a callback for its folder."""

    def training_step(self, batch, batch_idx):
        loader = self.trainer.train_dataloader
        assert self.trainer.checkpoint_callback.dirpath
        loss = super().training_step(batch, batch_idx)
        return loss * (1 + batch_idx / len(loader)) + 1 / len(loader.dataset)


class Measures(Recorded):
    """Keeps a metric, and writes into the logger itself."""

    def __init__(self):
        super().__init__()
        from torchmetrics import MeanMetric

        self.mean = MeanMetric()
        self.means = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.logger.log_metrics({"own": loss.item()}, step=self.global_step)
        return loss

    def on_train_epoch_end(self):
        self.means.append(self.trainer.callback_metrics["mean_epoch"].item())


class OfTask(Recorded):
    """Its batch size belongs to a task that it holds."""

    def __init__(self):
        super().__init__()
        self.task = type("Task", (), {"batch_size": 5})()

    def train_dataloader(self):
        return plain(self.task.batch_size)


# The module accumulates itself
LARGEST = {"target_batch_size": None, "prefer": "largest"}
STEPS = {
    "two networks in turns": (Adversarial, LARGEST),
    "truncated sequences": (Truncated, LARGEST),
    "queue and slow encoder": (Contrasts, {}),
    "hidden state": (Carries, {}),
    "skipped batches": (Skips, {}),
    "second-order optimizer": (Quasi, {}),
    "asks the Trainer": (Weighs, {}),
}


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("name", STEPS)
def test_steps_of_projects_train_as_by_hand(name, tmp_path):
    module, options = STEPS[name]

    both = compared(
        partial(plain, drop_last=True),
        module,
        trainer={"max_epochs": 1, "enable_checkpointing": True, "default_root_dir": tmp_path},
        **{**UNTIMED, **options},
    )

    both.check()


def test_metric_and_rows_that_a_step_writes_are_those_by_hand(tmp_path):
    loggers = [pl.loggers.CSVLogger(tmp_path, version=name) for name in ("tuned", "by hand")]
    rest = iter(loggers)

    class Takes(Measures):
        def setup(self, stage):
            self.trainer.loggers = [next(rest)]

    both = compared(plain, Takes, trainer={"log_every_n_steps": 1}, **UNTIMED)

    both.check()
    assert both.tuned.means == both.by_hand.means
    paths = [tmp_path / "lightning_logs" / each.version / "metrics.csv" for each in loggers]
    rows = [list(csv.DictReader(path.read_text().splitlines())) for path in paths]
    own = [[row["own"] for row in each if row["own"]] for each in rows]
    assert own[0] == own[1]
    assert len(own[0]) == len(both.by_hand.sizes)


def test_size_that_belongs_to_an_object_of_the_module_stays_there():
    module, callback = (
        OfTask(),
        autobatch.AutoBatch(target_batch_size=24, device="simulated:900KiB", **UNTIMED),
    )

    quiet_trainer(callback, max_epochs=1).fit(module)

    assert module.task.batch_size == 5
    assert max(module.sizes) == callback.report.plan.micro_batch_size
    assert sum(module.sizes) == len(X)
