"""Trainings by two processes, of which one runs out of memory at each allocation.

torchrun --nproc-per-node 2 survival_rank.py DIRECTORY CASE …
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch

from autobatch.lightning._survival.repeats import PieceLimit
from lightning_here import pl
from surviving import Trained, trained
from torchrun import save_results

RANK = int(os.environ.get("RANK", "0"))
WARM_UP = 4  # windows: DistributedDataParallel rebuilds its buckets in the second


class Unused(Trained):
    """Has a layer that the loss does not depend on."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.unused = torch.nn.Linear(3, 3)


def at_each_allocation(
    network="deterministic", module=Trained, *, failing=1, skipped=0, every=3, place=None, **ddp
):
    """Refuse every n-th allocation of one micro-batch on one rank, a window for each."""
    place = place or {}
    strategy = lambda: pl.strategies.DDPStrategy(timeout=timedelta(seconds=100), **ddp)  # noqa: E731
    options = {
        "devices": 2,
        "use_distributed_sampler": False,
        "seed": 5 + RANK,
        **place,
    }
    make = lambda: module(network, torch.optim.SGD, 0.0)  # noqa: E731
    clean = trained(make(), count=WARM_UP, strategy=strategy(), **options)
    (count,) = {*clean.refusing.allocations[-2:]}
    counts = [None, None]
    torch.distributed.all_gather_object(counts, count)
    numbers = range(1 + skipped, counts[failing] + 1, every)
    refusals = [[at] if failing == RANK else [] for at in numbers]
    run = trained(make(), [[]] * WARM_UP + refusals, strategy=strategy(), **options)
    return {
        "allocations": len(refusals),
        "gradients": run.refusing.gradients[WARM_UP:],
        "survived": len(run.survived),
        "sizes": run.module.seen,
        "state": run.module.state_dict(),
    }


CASES = {
    "first": lambda: at_each_allocation(every=7),
    "first rank": lambda: at_each_allocation("norm and dropout", failing=0, skipped=2),
    "second": lambda: at_each_allocation(
        "norm and dropout", every=9, place={"accumulate": 2, "position": 1}
    ),
    "without sync": lambda: at_each_allocation(
        "norm and dropout", skipped=2, place={"accumulate": 2, "position": 0}
    ),
    "bucket view": lambda: at_each_allocation(gradient_as_bucket_view=True),
    "unused": lambda: at_each_allocation(module=Unused, find_unused_parameters=True),
}


def main(directory, *names):
    PieceLimit.pieces = lambda *_: 1  # each micro-batch begins as a whole
    save_results(directory, names, lambda name: CASES[name]())


if __name__ == "__main__":
    main(*sys.argv[1:])
