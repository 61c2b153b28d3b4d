"""Two ranks on gloo, each a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hugging_face  # noqa: F401 -- skips without transformers


@pytest.mark.timeout(200)
def test_two_ranks_train_as_with_both_numbers_written_by_hand(tmp_path):
    script = Path(__file__).with_name("transformers_rank.py")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]

    run = subprocess.run(
        [*launch, "--master-port", "0", script, tmp_path],
        capture_output=True,
        text=True,
        timeout=180,
    )

    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)
    assert run.stdout.count("rank") == 2
