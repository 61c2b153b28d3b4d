"""One of two ranks of a Trainer with DistributedDataParallel on gloo: `python transformers_rank.py FOLDER`.

Rank 1 has less memory. Both print whether training came out as with the numbers written by hand.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from autobatch import _settings
from autobatch.testing import SimulatedAccelerator
from hugging_face import compared

torch.set_num_threads(1)

_settings.TIMING_SECONDS = 0.0
rank = int(os.environ["RANK"])
device = SimulatedAccelerator("64MiB" if rank == 0 else "650KiB")
options = {"target_batch_size": 48, "max_micro_batch_size": 24, "device": device}
pair = compared(Path(sys.argv[1]) / str(rank), tune=options, ddp_find_unused_parameters=False)
pair.check()
plan = pair.report.plan
fits = [trial.outcome.value for trial in pair.report.trials]
print(
    f"rank {rank}: {plan.micro_batch_size} x {plan.accumulate_grad_batches} x {plan.world_size} {fits}"
)
