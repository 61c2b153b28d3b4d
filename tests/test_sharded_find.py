"""`find` with sharded modules: two real processes, and one as if it were two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import autobatch
from autobatch.testing import PaperDevice, SimulatedAccelerator
from sharded_cases import CAPACITY, SEARCHED, found, loop_of
from sharded_models import KINDS, batch, sharded
from torchrun import on_two_ranks

PROGRAM = Path(__file__).with_name("sharded_cases.py")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Results of two ranks in all cases, one after another in the same two processes."""
    return on_two_ranks(PROGRAM, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def as_if_two():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.timeout(600)  # the fixture runs all cases: minutes on a busy machine
@pytest.mark.parametrize("kind", [*KINDS[:-1], "ddp"])
def test_dry_collectives_take_the_memory_of_real_ones(job, kind):
    for rank in job:
        real, dry = rank["peaks"][kind]

        assert dry == real
        assert real > 700_000


@pytest.mark.parametrize("kind", SEARCHED)
def test_the_size_found_fits_for_real_and_the_next_does_not(job, kind):
    first, second = (rank[kind] for rank in job)

    assert first["trials"] == second["trials"]
    assert first["size"] == second["size"]
    for rank in (first, second):
        fits, next_one = rank["peaks"]
        assert fits <= CAPACITY < next_one
        assert rank["same"]


def test_tensor_parallel_ranks_count_once_in_the_effective_batch(job):
    assert job[0]["tp"]["plan"].world_size == 1
    assert job[0]["fsdp2"]["plan"].world_size == 2


def test_the_sharded_rank_with_less_memory_decides(job):
    first, second = (rank["less"] for rank in job)

    assert first["size"] == second["size"] < job[0]["fsdp2"]["size"]
    assert second["peaks"][0] <= CAPACITY - 300_000 < second["peaks"][1]
    assert first["same"]
    assert second["same"]


def test_proven_sizes_are_timed_by_all_ranks_in_step(job):
    first, second = (rank["timed"] for rank in job)

    assert first == second
    assert first["sizes"] == [1, 2, 4]


def test_a_sharded_rank_that_raises_ends_the_others(job):
    first, second = (rank["raising"] for rank in job)

    assert first == "AutobatchError: Rank 1 stopped: ZeroDivisionError: mine"
    assert second == "ZeroDivisionError: mine"


def test_a_nested_ddp_and_a_collective_of_the_step_wait_for_nobody(job):
    first, second = (rank["nested"] for rank in job)

    assert first["plan"] == second["plan"]
    assert first["outcomes"] == {"fit", "out_of_memory"}
    assert first["same"]
    assert second["same"]


def test_a_group_made_in_the_step_and_latency_of_sharded_modules_are_refused(job):
    for rank in job:
        grouping, latency = rank["refused"]

        assert grouping.startswith("The step makes a new process group")
        assert latency.startswith("latency_limit=0.1 is about time")


def test_one_process_as_if_two_finds_what_two_find(job, as_if_two):
    report, *_ = found("fsdp2", CAPACITY)

    assert report.plan == job[0]["fsdp2"]["plan"]
    assert (report.devices, report.as_if) == (2, True)
    assert report.sizes == ()
    assert "not run on 2 devices" in str(report)
    assert "buffers of NCCL, is not counted" in " ".join(str(report).split())
    assert autobatch.TuningReport.from_json(report.to_json()) == report


def test_the_target_is_divided_among_ranks_that_train_on_different_data(as_if_two):
    targets = {"target_batch_size": 6, "device": SimulatedAccelerator(CAPACITY), "verbose": False}

    plans = {
        kind: autobatch.find(loop_of(*sharded(kind)), **targets).plan for kind in ("fsdp2", "tp")
    }
    given = autobatch.find(loop_of(*sharded("tp")), data_parallel_size=2, **targets).plan

    assert {kind: plan.world_size for kind, plan in plans.items()} == {"fsdp2": 2, "tp": 1}
    assert {plan.effective_batch_size for plan in [*plans.values(), given]} == {6}
    assert given.world_size == 2


def test_a_module_that_first_ran_in_a_trial_still_saves_shards(as_if_two):
    network, optimizer = sharded("fsdp2")

    autobatch.find(loop_of(network, optimizer), device="simulated:64MiB", max_micro_batch_size=2)

    with torch.no_grad():  # leaves the root gathered
        network(batch(2, 0)[0])
    assert {type(each) for each in network.state_dict().values()} == {DTensor}


@pytest.mark.parametrize("wrong", [0, 3, 1.0, True])
def test_a_data_parallel_size_that_does_not_divide_the_ranks_is_refused(as_if_two, wrong):
    paper = PaperDevice("1GiB", fixed=2**28, per_sample=2**21)

    with pytest.raises(ValueError, match=r"data_parallel_size=.* does not divide the 2 ranks"):
        autobatch.find(paper.workload, device=paper, data_parallel_size=wrong)


def test_latency_is_not_measured_as_if_on_several_devices(as_if_two):
    paper = PaperDevice("1GiB", fixed=2**28, per_sample=2**21)

    with pytest.raises(ValueError, match="cannot measure for 2 devices"):
        autobatch.find(paper.workload, device=paper, latency_limit=0.1)
