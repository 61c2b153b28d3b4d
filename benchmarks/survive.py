"""Out of memory at each allocation of a micro-batch, and the cost while nothing fails.

    python benchmarks/survive.py [--every 1] [--markdown docs/out-of-memory.md]

Networks, trainings and laws are those of `tests/surviving.py`. A micro-batch is *survived* if
training reaches its end and each gradient is, to the bit, that of the whole micro-batch or that of
its pieces, by plain PyTorch. The cost is the CPU time of a micro-batch with
`on_out_of_memory="split"` less that without AutoBatch, measured in turns within one training: the
median of pairs of micro-batches one after the other, and an interval that holds the median of
further such pairs in 95 of 100 cases.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from pages import machine, renew, table
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import autobatch
from autobatch._undo import patched
from autobatch.lightning._survival.repeats import PieceLimit
from lightning_here import pl, quiet_trainer
from surviving import (
    SPLIT,
    Trained,
    allocations,
    by_hand,
    quick_collections,
    torchmetrics,
    trained,
)
from test_survival_fits import LONG, Reader, peak_of, read

PRECISIONS = {
    "fp32": ({}, {}),
    "bf16": ({"precision": "bf16-mixed"}, {"autocast": torch.bfloat16}),
    "fp16": (
        {
            "plugins": [
                pl.plugins.precision.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
            ]
        },
        {"autocast": torch.float16, "scale": 2.0**16},
    ),
}
NETWORKS = {
    "norm and dropout": "perceptron",
    "transformer": "transformer",
    "residual": "residual network",
}
OPTIMIZERS = (torch.optim.AdamW, torch.optim.SGD)
STEPS = 600  # of a training whose time is taken


def counts(network, optimizer, precision, accumulate, every):
    """Return the refused allocations of a micro-batch, and how many were survived."""
    options, at_hand = PRECISIONS[precision]
    place = {"accumulate": accumulate, "position": accumulate // 2}
    make = partial(Trained, network, optimizer, 0.0)
    refusals = [[at] for at in range(1, allocations(make(), **place, **options) + 1, every)]
    ways = [
        by_hand(make(), {place["position"]: pieces}, accumulate=accumulate, **at_hand)[1][0]
        for pieces in ([6], [3, 3])
    ]
    found = trained(make(), refusals, **place, **options).refusing.gradients
    survived = sum(
        all(any(torch.equal(one, way[name]) for way in ways) for name, one in gradients.items())
        for gradients in found
    )
    return len(refusals), survived


class Watched(Reader):
    """Keeps the losses of its batches."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, outputs, *_):
        self.losses.append(outputs["loss"].item())


class Timed(pl.LightningModule):
    """A perceptron, which logs a metric."""

    def __init__(self, width, layers, *, norm):
        super().__init__()
        parts = []
        for layer in range(layers):
            parts += [torch.nn.Linear(width if layer else 16, width), torch.nn.ReLU()]
            parts += [torch.nn.BatchNorm1d(width)] if norm else []
        self.net = torch.nn.Sequential(*parts, torch.nn.Linear(width, 4))
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4)

    def training_step(self, batch, _):
        logits = self.net(batch[0])
        loss = torch.nn.functional.cross_entropy(logits, batch[1])
        self.accuracy(logits.detach(), batch[1])
        self.log("loss", loss)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


TIMED = {
    "perceptron, 3 layers of 64": (64, 2, False),
    "perceptron, 3 layers of 1,024": (1024, 2, False),
    "perceptron, 3 layers of 2,048": (2048, 2, False),
    "53 layers of 32 with BatchNorm": (32, 53, True),
}


class Turns(pl.Callback):
    """CPU seconds of micro-batches, every other pair of them without survival."""

    def __init__(self):
        self.seconds = {True: [], False: []}
        self.replaced = {}  # methods of Lightning, by their names
        self.began = None

    def on_train_start(self, trainer, *_):
        self.callbacks = trainer.callbacks
        self.turn(trainer, is_with=True)

    def turn(self, trainer, *, is_with):
        self.is_with = is_with
        for owner, name in (
            (trainer.fit_loop.epoch_loop.automatic_optimization, "_make_closure"),
            (trainer.precision_plugin, "backward"),
        ):
            self.replaced[name] = vars(owner).pop(name, self.replaced.get(name))
            if is_with:
                vars(owner)[name] = self.replaced[name]
        trainer.callbacks = self.callbacks if is_with else [self]
        self.began = time.process_time()

    def on_train_batch_end(self, trainer, *others):
        self.seconds[self.is_with].append(time.process_time() - self.began)
        # With, without, without, with: each comes first in turn
        self.turn(trainer, is_with=(others[-1] + 1) % 4 in (0, 3))

    def on_train_end(self, trainer, *_):
        self.turn(trainer, is_with=True)


def cost(width, layers, norm):
    """Return the seconds of a micro-batch without survival, and those that it adds.

    The latter are the median between the ends of its interval.
    """
    torch.manual_seed(0)
    batch = (torch.randn(128, 16), torch.randint(0, 4, (128,)))
    trainer = quiet_trainer(autobatch.AutoBatch(**SPLIT), turns := Turns(), max_epochs=1)
    loader = DataLoader([batch] * STEPS, batch_size=None)
    trainer.fit(Timed(width, layers, norm=norm), loader)
    with_survival, without = (turns.seconds[which][STEPS // 20 :] for which in (True, False))
    more = sorted(one - other for one, other in zip(with_survival, without, strict=True))
    reach = round(0.98 * math.sqrt(len(more)))  # ranks around the median, of a binomial
    middle = len(more) // 2
    return statistics.median(without), [more[middle + each] for each in (-reach, 0, reach)]


def costs():
    """Return the table of costs."""
    rows = []
    for name, network in TIMED.items():
        seconds, (low, more, high) = cost(*network)
        spread = f"{1e3 * low:.2f} to {1e3 * high:.2f}"
        row = [f"{1e3 * seconds:.1f}", f"{1e3 * more:.2f}", spread, f"{1 + more / seconds:.3f}"]
        rows.append([name, *row])
    return table(["network", "ms of a micro-batch", "ms more", "interval", "ratio"], rows)


def losses(lengths, limit):
    """Return the failures of a training on sequences, and its losses at ten steps."""
    module, callback, _, _ = read(lengths, limit, Watched())
    return len(callback.survived), [module.losses[at] for at in range(24, 250, 25)]


def curves():
    """Return the table of trainings short of memory, beside those with memory to spare."""
    usual = [20] * 252
    long = [20 * LONG if at == 100 else 20 for at in range(252)]
    peak = peak_of([20])
    rows = []
    for name, lengths, limit in (
        ("one sample 20 times as long", long, lambda _: int(1.3 * peak)),
        (
            "a neighbour takes half for 100 steps",
            usual,
            lambda at: int((0.7 if 20 <= at < 120 else 1.3) * peak),
        ),
    ):
        failures, found = losses(lengths, limit)
        _, expected = losses(lengths, lambda _: None)
        apart = max(abs(one - other) for one, other in zip(found, expected, strict=True))
        row = [f"{loss:.6f}" for loss in (found[0], expected[0], found[-1], expected[-1])]
        rows.append([name, str(failures), *row, f"{apart:.0e}"])
    heads = ["failures", "loss at step 25", "with memory", "at step 250", "with memory", "apart"]
    return table(["training of 252 steps", *heads], rows)


WAYS = list(itertools.product(PRECISIONS, OPTIMIZERS))


def survivals(every):
    """Return a row for each network and accumulation: survived micro-batches in each way."""
    begins_whole = patched(PieceLimit, pieces=lambda *_: 1)
    rows = []
    with begins_whole, quick_collections():
        for network, accumulate in itertools.product(NETWORKS, (1, 4)):
            row = [NETWORKS[network], str(accumulate)]
            for precision, optimizer in WAYS:
                refused, survived = counts(network, optimizer, precision, accumulate, every)
                row.append(f"{survived} of {refused}")
            print(row, flush=True)
            rows.append(row)
    return rows


def page(every, rows, curve_table, cost_table):
    """Return what is measured, as a part of a page."""
    names = [f"{precision}, {optimizer.__name__}" for precision, optimizer in WAYS]
    pairs = [map(int, cell.split(" of ")) for row in rows for cell in row[2:]]
    survived, refused = map(sum, zip(*pairs, strict=True))
    return (
        f"Out of memory at {'each' if every == 1 else f'every {every}th'} allocation of the "
        f"forward and backward pass of a micro-batch: {survived:,} of {refused:,} were survived, "
        "with gradients that are to the bit those of the whole or of the pieces.\n\n"
        f"{table(['network', 'accumulate', *names], rows)}\n\n"
        "The loss of trainings short of memory beside the loss with memory to spare; *apart* is the "
        f"largest difference at ten steps:\n\n{curve_table}\n\n"
        "CPU time of a micro-batch without survival, and what survival adds while nothing fails "
        f"({machine()}; load average {os.getloadavg()[0]:.0f}):\n\n{cost_table}"
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1, help="refuse every n-th allocation")
    parser.add_argument("--markdown", type=Path, help="page to renew")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "autobatch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    text = page(arguments.every, survivals(arguments.every), curves(), costs())
    print(text)
    if arguments.markdown is not None:
        renew(arguments.markdown, "survive.py", text)


if __name__ == "__main__":
    main()
