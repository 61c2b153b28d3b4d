"""Out of memory at each allocation of a micro-batch, and the cost while nothing fails.

    python benchmarks/survive.py [--every 1] [--rounds 5]

Networks, trainings and laws are those of `tests/surviving.py`. A micro-batch is *survived* if
training reaches its end and each gradient is, to the bit, that of the whole micro-batch or that of
its pieces, by plain PyTorch. The overhead is the time of the fit with `on_out_of_memory="split"` over
that without, for trainings in turns; the least of each is taken.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from pages import table
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import autobatch
from autobatch.lightning._survival_limit import PieceLimit
from lightning_here import pl, quiet_trainer
from surviving import SPLIT, Trained, allocations, by_hand, quick_collections, trained

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
STEPS = 60  # of a training whose time is taken


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


class Timed(pl.LightningModule):
    """A perceptron of a width; wider ones have longer steps."""

    def __init__(self, width):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(16, width),
            torch.nn.BatchNorm1d(width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, 4),
        )

    def training_step(self, batch, _):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def seconds(width, callbacks):
    """Return the CPU seconds of a training."""
    torch.manual_seed(0)
    batch = (torch.randn(256, 16), torch.randint(0, 4, (256,)))
    trainer = quiet_trainer(*callbacks, max_epochs=1)
    module, loader = Timed(width), DataLoader([batch] * STEPS, batch_size=None)
    began = time.process_time()
    trainer.fit(module, loader)
    return time.process_time() - began


def overhead(width, rounds):
    """Return the least seconds of a training without and with survival, in turns."""
    pairs = [
        (seconds(width, []), seconds(width, [autobatch.AutoBatch(**SPLIT)])) for _ in range(rounds)
    ]
    return min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1, help="refuse every n-th allocation")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "autobatch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    costs = []
    for width in (64, 512, 2048):
        without, with_survival = overhead(width, arguments.rounds)
        more = (with_survival - without) / STEPS
        step = f"{1e3 * without / STEPS:.1f}"
        costs.append([step, f"{with_survival / without:.3f}", f"{1e3 * more:.2f}"])
    print(table(["ms per step", "ratio", "ms more"], costs))
    PieceLimit.pieces = lambda *_: 1  # each micro-batch begins as a whole
    rows = []
    with quick_collections():
        for network in ("norm and dropout", "transformer", "residual"):
            for accumulate in (1, 4):
                for precision in PRECISIONS:
                    for optimizer in (torch.optim.AdamW, torch.optim.SGD):
                        refused, survived = counts(
                            network, optimizer, precision, accumulate, arguments.every
                        )
                        what = [network, accumulate, precision, optimizer.__name__]
                        rows.append([*map(str, what), str(refused), str(survived)])
    print(table(["network", "accumulate", "precision", "optimizer", "refused", "survived"], rows))


if __name__ == "__main__":
    main()
