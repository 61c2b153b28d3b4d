"""Two ranks on gloo, each a process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hugging_face  # noqa: F401 -- skips without transformers


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_train_as_with_both_numbers_written_by_hand(kind, tmp_path):
    script = Path(__file__).with_name("transformers_rank.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    run = subprocess.run(
        [*launch, script, tmp_path, kind], capture_output=True, text=True, timeout=180, check=False
    )

    assert run.returncode == 0, run.stderr[-3000:]
    # Rank 1 has memory for 3 samples, and both came out as by hand; times choose among 3, 2 and 1
    plan = "3 x 8 x 2" if kind == "ddp" else "(?:3 x 8|2 x 12|1 x 24) x 2"
    assert len(set(re.findall(plan, run.stdout))) == 1
    assert sorted(re.findall(rf"rank (\d): {plan} \['out_of_memory", run.stdout)) == ["0", "1"]
    assert sorted(re.findall(r"rank (\d) evaluates 5", run.stdout)) == ["0", "1"]
