"""`find` with sharded modules: two or four real processes, and one as if it were two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import autobatch
from autobatch.testing import PaperDevice, SimulatedAccelerator
from sharded_cases import ALL_KINDS, CAPACITY, POINTS, found, loop_of
from sharded_models import batch, sharded
from torchrun import on_ranks

PROGRAM = Path(__file__).with_name("sharded_cases.py")
SEARCHED = ("fsdp2", "fsdp1", "tp")
ON_FOUR = "fsdp2 and tp"  # needs four ranks
ON_TWO = [kind for kind in ALL_KINDS if kind != ON_FOUR]
FAILING = [kind for kind in ON_TWO if kind != "fsdp2 kept"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Results of two ranks in all cases, one after another in the same two processes."""
    # A rank that leaves comes last: nothing but its end tells the other one
    others = ("peaks", "less", "timed", "taken", "raising", "nested", "refused", "leaving")
    return on_ranks(2, PROGRAM, tmp_path_factory.mktemp("two"), *SEARCHED, *others)


@pytest.fixture(scope="module")
def failing_job(tmp_path_factory):
    cases = [f"{kind}/failing" for kind in FAILING]
    return on_ranks(2, PROGRAM, tmp_path_factory.mktemp("failing"), *cases)


@pytest.fixture(scope="module")
def job_of_four(tmp_path_factory):
    cases = ("peaks", ON_FOUR, f"{ON_FOUR}/failing")
    return on_ranks(4, PROGRAM, tmp_path_factory.mktemp("four"), *cases)


@pytest.fixture(scope="module")
def as_if_two():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.timeout(600)  # the fixture runs all cases: minutes on a busy machine
@pytest.mark.parametrize("kind", ON_TWO)
def test_dry_collectives_take_the_memory_of_real_ones(job, kind):
    assert_same_peaks(job, kind)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_dry_collectives_take_the_memory_of_real_ones_on_four_ranks(job_of_four, kind):
    assert_same_peaks(job_of_four, kind)


def assert_same_peaks(job, kind):
    for rank in job:
        real, dry = rank["peaks"][kind]

        assert dry == real
        assert real > 1_400_000 / len(job)


@pytest.mark.parametrize("kind", SEARCHED)
def test_the_size_found_fits_for_real_and_the_next_does_not(job, kind):
    assert_exact([rank[kind] for rank in job])


@pytest.mark.slow
def test_fsdp2_with_tensor_parallelism_is_found_exactly_by_four_ranks(job_of_four):
    ranks = [rank[ON_FOUR] for rank in job_of_four]

    assert_exact(ranks)
    assert ranks[0]["plan"].world_size == 2  # two ranks of each model count once


def assert_exact(ranks):
    assert all(rank["trials"] == ranks[0]["trials"] for rank in ranks)
    assert all(rank["plan"] == ranks[0]["plan"] for rank in ranks)
    for rank in ranks:
        fits, next_one = rank["peaks"]
        assert fits <= CAPACITY < next_one
        assert rank["same"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", FAILING)
def test_out_of_memory_at_random_points_of_one_rank_changes_nothing(failing_job, kind):
    assert_survived([rank[f"{kind}/failing"] for rank in failing_job])


@pytest.mark.slow
def test_out_of_memory_at_random_points_of_one_rank_of_four_changes_nothing(job_of_four):
    assert_survived([rank[f"{ON_FOUR}/failing"] for rank in job_of_four])


def assert_survived(ranks):
    for points in zip(*ranks, strict=True):
        assert all(point["trials"] == [(2, "out_of_memory"), (1, "fit")] for point in points)
        assert all(point["same"] for point in points)
    assert len(ranks[0]) == POINTS == 20


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


def test_memory_taken_since_the_trial_fails_a_size_before_ranks_are_in_step(job):
    assert [rank["taken"] for rank in job] == [[1, 4], [1, 4]]


def test_a_rank_that_runs_out_of_memory_in_step_ends_the_others(job):
    first, second = (rank["leaving"] for rank in job)

    assert first == "AutobatchError: Rank 1 stopped: OutOfMemoryError: of another process"
    assert second == "OutOfMemoryError: of another process"


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
