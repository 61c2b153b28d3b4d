"""Loops of Fabric and accelerate on two ranks, tuned and with the same numbers written by hand.

torchrun --nproc-per-node 2 library_ranks.py DIRECTORY CASE …
"""

from __future__ import annotations

import importlib
import os
import sys

import autobatch
from autobatch.testing import SimulatedAccelerator
from sameness import same
from torchrun import save_results

RANK = int(os.environ["RANK"])
MEMORY = (150_000, 120_000)  # bytes of the device of each rank


def fabric():
    loops = importlib.import_module("fabric_loops")
    return loops.Loop("32-true", devices=2, strategy="ddp")


def accelerate():
    loops = importlib.import_module("accelerate_loops")
    loops.reset()
    return loops.Loop("bf16")


def compared(make):
    loop = make()
    report = autobatch.find(
        loop.train,
        target_batch_size=160,
        device=SimulatedAccelerator(MEMORY[RANK]),
        timing_seconds=0.2,
        verbose=False,
    )
    plan = report.plan
    trained = loop.result(plan, updates=8)
    by_hand = make().result(plan, updates=8)
    return {
        "plan": (plan.micro_batch_size, plan.accumulate_grad_batches, plan.world_size),
        "trials": [(trial.batch_size, trial.outcome) for trial in report.trials],
        "passes": len(trained[0]),
        "weights": trained[1],
        "same": same(trained, by_hand),
    }


CASES = {
    "fabric": fabric,
    "accelerate bf16": accelerate,
}


if __name__ == "__main__":
    directory, *names = sys.argv[1:]
    save_results(directory, names, lambda name: compared(CASES[name]))
