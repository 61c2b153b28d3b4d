"""Two ranks on gloo, each a process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hugging_face  # noqa: F401 -- skips without transformers
from torchrun import outputs_of_ranks

PROGRAM = Path(__file__).with_name("transformers_rank.py")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_train_as_with_both_numbers_written_by_hand(kind, tmp_path):
    outputs = outputs_of_ranks(2, PROGRAM, tmp_path, kind)

    # Rank 1 has memory for 3 samples, and both came out as by hand; times choose among 3, 2 and 1
    plan = "3 x 8 x 2" if kind == "ddp" else "(?:3 x 8|2 x 12|1 x 24) x 2"
    assert len({plan_of for text in outputs for plan_of in re.findall(plan, text)}) == 1
    for rank, text in enumerate(outputs):
        assert re.search(rf"rank {rank}: {plan} \['out_of_memory", text)
        assert f"rank {rank} evaluates 5" in text
