"""One of two ranks of a Trainer with DistributedDataParallel on gloo: `python transformers_rank.py FOLDER`.

Rank 1 has less memory, and evaluates up to 5 samples. Both print whether training came out as with the numbers written by hand.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import autobatch
from autobatch import _settings
from autobatch.testing import SimulatedAccelerator
from hugging_face import Recorded, Sequences, compared

torch.set_num_threads(1)

_settings.TIMING_SECONDS = 0.0
rank = int(os.environ["RANK"])
device = SimulatedAccelerator("64MiB" if rank == 0 else "650KiB")


class RunsOut(Recorded):
    def prediction_step(self, model, inputs, *arguments, **keywords):
        if rank and len(inputs["input_ids"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().prediction_step(model, inputs, *arguments, **keywords)


def shape(predictions):
    return {"sum": float(predictions.predictions.sum()), "samples": len(predictions.label_ids)}


keywords = {"eval_dataset": Sequences(21), "compute_metrics": shape}
options = {"target_batch_size": 48, "max_micro_batch_size": 24, "device": device}
pair = compared(
    Path(sys.argv[1]) / str(rank),
    kind=RunsOut,
    keywords=keywords,
    tune=options,
    ddp_find_unused_parameters=False,
)
pair.check()
plan = pair.report.plan
fits = [trial.outcome.value for trial in pair.report.trials]
print(
    f"rank {rank}: {plan.micro_batch_size} x {plan.accumulate_grad_batches} x {plan.world_size} {fits}"
)

evaluation = autobatch.transformers.tune_evaluation(
    pair.tuned, device="simulated:64MiB", prefer="largest", verbose=False
)
pair.by_hand.args.per_device_eval_batch_size = 5
metrics = [trainer.evaluate() for trainer in (pair.tuned, pair.by_hand)]
assert metrics[0]["eval_sum"] == metrics[1]["eval_sum"]
assert metrics[0]["eval_samples"] == 21
print(f"rank {rank} evaluates {evaluation.plan.micro_batch_size}")
