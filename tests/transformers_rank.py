"""One of two ranks of a Trainer on gloo: `torchrun … transformers_rank.py FOLDER ddp` or `fsdp2`.

Rank 1 has less memory, and evaluates up to 5 samples. Both print whether training came out as with the numbers written by hand.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel
from transformers.distributed.configuration_utils import DistributedConfig

import autobatch
from accelerate_loops import reset
from autobatch import _settings
from autobatch._distributed.sharding import is_sharded
from autobatch.testing import SimulatedAccelerator
from hugging_face import Recorded, Sequences, compared, language_model

torch.set_num_threads(1)
reset()  # of the process that this one was forked from

folder, kind = Path(sys.argv[1]) / os.environ["RANK"], sys.argv[2]
rank = int(os.environ["RANK"])
device = SimulatedAccelerator("64MiB" if rank == 0 else "650KiB")
_settings.TIMING_SECONDS = 0.0


class RunsOut(Recorded):
    def prediction_step(self, model, inputs, *arguments, **keywords):
        if rank and len(inputs["input_ids"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().prediction_step(model, inputs, *arguments, **keywords)


def sharded():
    """Return the model as transformers shards it, which reads its weights from a folder."""
    language_model().save_pretrained(folder)
    plan = {"transformer.h.*": "free_full_weight"}
    config = DistributedConfig(fsdp_size=2, fsdp_plan=plan)
    return GPT2LMHeadModel.from_pretrained(folder, distributed_config=config)


def shape(predictions):
    return {"sum": float(predictions.predictions.sum()), "samples": len(predictions.label_ids)}


keywords = {"eval_dataset": Sequences(21), "compute_metrics": shape}
options = {"target_batch_size": 48, "max_micro_batch_size": 24, "device": device}
if kind == "fsdp2":
    options["timing_seconds"] = 10.0  # by all ranks in step, also on a busy machine
    # The last evaluation leaves parameters gathered, of which `state_dict` still has shards
    arguments = {"eval_strategy": "epoch", "per_device_eval_batch_size": 4}
else:
    arguments = {"ddp_find_unused_parameters": False}
pair = compared(
    folder,
    model=sharded if kind == "fsdp2" else language_model,
    kind=RunsOut,
    keywords=keywords,
    tune=options,
    **arguments,
)
pair.check()
plan = pair.report.plan
fits = [trial.outcome.value for trial in pair.report.trials]
assert bool(pair.report.curve) == is_sharded(pair.tuned.model) == (kind == "fsdp2")
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
