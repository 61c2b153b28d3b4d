"""A limit on host memory is kept by the training that follows, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TRAINS_ONE_MIB_PER_SAMPLE = Path(__file__).with_name("host_limit_case.py")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_training_on_the_host_stays_within_its_memory_limit():
    done = subprocess.run(
        [sys.executable, TRAINS_ONE_MIB_PER_SAMPLE], capture_output=True, text=True, check=True
    )
    size, limit, peak = map(int, done.stdout.split())

    assert 90 <= size <= 120
    assert 0.9 * limit < peak <= 1.005 * limit
