"""Measure the cost of the noise scale, and of AutoBatch in the training it has tuned, as ratios of CPU time.

    python benchmarks/noise_scale.py [--quick]

Both sides of a ratio run in turns, in pairs, in this process and on one thread. The output is the median of the pairs'
ratios and their quartiles, in CPU time of the process, which other processes change little.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import statistics
import time
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import autobatch

try:
    pl = importlib.import_module("pytorch_lightning")
except ModuleNotFoundError:
    pl = importlib.import_module("lightning.pytorch")

MICRO_BATCH = 32
ACCUMULATE = 8


class Mlp(nn.Sequential):
    shape = (256,)

    def __init__(self):
        super().__init__(
            nn.Linear(256, 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )


class Cnn(nn.Sequential):
    shape = (3, 16, 16)

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )


class Transformer(nn.Module):
    shape = (16, 32)

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    32, 4, 128, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(2)
            )
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.layers(x).mean(1))


MODELS = {"MLP": Mlp, "CNN": Cnn, "transformer": Transformer}


def batch(kind, size=MICRO_BATCH):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, *kind.shape, generator=generator)
    return x, torch.randint(0, 10, (size,), generator=generator)


def seconds(run):
    """CPU time of a call."""
    began = time.process_time()
    run()
    return time.process_time() - began


def ratios(with_it, without, pairs):
    """Of both in turns; which of them goes first changes from pair to pair."""
    found = []
    with_it(), without()  # warm
    for pair in range(pairs):
        order = (with_it, without) if pair % 2 else (without, with_it)
        took = {run: run() for run in order}
        found.append(took[with_it] / took[without])
    return found


def print_ratio(name, found):
    low, middle, high = statistics.quantiles(found, n=4)
    print(
        f"  {name:<52} {middle - 1:+7.1%}   {low - 1:+6.1%} to {high - 1:+6.1%}",
        flush=True,
    )


# Of a window


def windows(kind, pairs):
    """The ratios of updates of one plain loop that are measured to their neighbours that are not."""
    model = kind()
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = batch(kind)

    def update():
        for _ in range(ACCUMULATE):
            (F.cross_entropy(model(x), y) / ACCUMULATE).backward()
        optimizer.step()
        optimizer.zero_grad()

    # The first update is measured, the second is not, the third is, ...
    with autobatch.noise_scale(model, micro_batch_size=MICRO_BATCH, every=2):
        took = [seconds(update) for _ in range(2 * pairs + 6)][6:]
    return [one / other for one, other in zip(took[::2], took[1::2], strict=True)]


# Of a training


class Module(pl.LightningModule):
    def __init__(self, kind):
        super().__init__()
        self.net = kind()
        self.seconds = 0.0

    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

    def on_train_start(self):
        self.seconds = -time.process_time()

    def on_train_end(self):
        self.seconds += time.process_time()


def training(kind, callbacks, *, accumulate, updates=20, size=MICRO_BATCH):
    """CPU time from the start of training to its end; tuning comes before."""
    model = Module(kind)
    data = TensorDataset(*batch(kind, MICRO_BATCH * accumulate * updates))
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, size))
    return model.seconds


def tuner():
    """The plan that the other side of the ratio has written by hand, verified by one trial."""
    plan = autobatch.BatchPlan(MICRO_BATCH, 2)
    return autobatch.AutoBatch(plan=plan, memory_limit=1.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the MLP, few pairs")
    is_quick = parser.parse_args().quick
    models = {"MLP": Mlp} if is_quick else MODELS
    pairs = 2 if is_quick else 7
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    autobatch_sinks = importlib.import_module("autobatch.sinks")
    autobatch_sinks.console = lambda _: None  # the report is not the point here
    began = time.monotonic()
    print(f"{'':54} {'median':>7}   {'quartiles':>16}")
    print(f"A measured window, {ACCUMULATE} micro-batches of {MICRO_BATCH}")
    for name, kind in models.items():
        print_ratio(name, windows(kind, pairs=6 if is_quick else 60))
    for accumulate, how in (
        (ACCUMULATE, "one update in 5"),
        (1, "one in 20, by halves"),
    ):
        print(f"Training with NoiseScale(), accumulate {accumulate} ({how})")
        for name, kind in models.items():
            updates = 10 if accumulate > 1 else 60
            print_ratio(
                name,
                ratios(
                    lambda kind=kind, k=accumulate, n=updates: training(
                        kind, [autobatch.NoiseScale()], accumulate=k, updates=n
                    ),
                    lambda kind=kind, k=accumulate, n=updates: training(
                        kind, [], accumulate=k, updates=n
                    ),
                    pairs=pairs,
                ),
            )
    print(f"Training after AutoBatch, {MICRO_BATCH} × accumulate 2, against the same by hand")
    for name, kind in models.items():
        print_ratio(
            name,
            ratios(
                lambda kind=kind: training(kind, [tuner()], accumulate=2, size=8),
                lambda kind=kind: training(kind, [], accumulate=2),
                pairs=pairs,
            ),
        )
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
