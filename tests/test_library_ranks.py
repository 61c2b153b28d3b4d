"""Loops of Fabric and accelerate on two ranks, one with less memory."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from sameness import same
from torchrun import on_two_ranks

PROGRAM = Path(__file__).with_name("library_ranks.py")
HAS = {
    "fabric": find_spec("lightning") or find_spec("lightning_fabric"),
    "accelerate": find_spec("accelerate"),
}
CASES = ("fabric", "accelerate bf16")


def is_installed(case):
    return bool(HAS[case.split()[0]])


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Results of two ranks in all cases, one after another in the same two processes."""
    return on_two_ranks(PROGRAM, tmp_path_factory.mktemp("ranks"), *filter(is_installed, CASES))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_the_plan_by_hand(job, case):
    if not is_installed(case):
        pytest.skip(f"{case} is not installed")
    first, second = (rank[case] for rank in job)

    assert first["same"]
    assert second["same"]
    assert first["plan"] == second["plan"]
    assert first["trials"] == second["trials"]
    micro, accumulate, world_size = first["plan"]
    assert micro * accumulate * world_size == 160
    assert world_size == 2
    assert accumulate > 1
    assert same(first["weights"], second["weights"])
    assert first["passes"] >= 8
