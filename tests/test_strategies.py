"""Strategies that shard, and DDP, with two or four real processes that talk by gloo."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from autobatch import BatchPlan
from forked import run_forked
from sameness import same
from torchrun import on_ranks, results

CASES = Path(__file__).with_name("strategy_cases.py")

pytestmark = [
    pytest.mark.skipif(
        not (
            importlib.util.find_spec("pytorch_lightning") or importlib.util.find_spec("lightning")
        ),
        reason="Lightning is not installed",
    ),
    pytest.mark.timeout(
        400
    ),  # the fixture runs all cases; a rank that hangs ends after 300 seconds
]


def run(size, where, *cases):
    """Return the results of all ranks in several cases, in the same processes."""
    importlib.import_module("torchmetrics")  # once, for all
    return on_ranks(size, CASES, where, *cases)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    cases = (
        "fsdp2/scarce",
        "tp/tuned",
        "fsdp1/tuned",
        "ddp gathers/scarce",
        "fsdp2/failing",
        "fsdp2/exploding",
        "fsdp2/resumed",
        "ddp static/refused",
    )
    return run(2, tmp_path_factory.mktemp("sharded"), *cases)


@pytest.fixture(scope="module")
def long_job(tmp_path_factory):
    failing = (f"{kind}/failing" for kind in ("tp", "fsdp1", "ddp"))
    return run(2, tmp_path_factory.mktemp("long"), "fsdp2 bf16/scarce", *failing)


@pytest.fixture(scope="module")
def launched_job(tmp_path_factory):
    """Results of a script whose Trainer starts the other rank."""
    where = tmp_path_factory.mktemp("launched")
    ended = run_forked(CASES, where, "fsdp2/tuned", "fsdp1/tuned")
    assert ended.returncode == 0, ended.stderr
    return results(where)


def assert_as_by_hand(ranks):
    for rank in ranks:
        assert rank["plan"] == ranks[0]["plan"]
        assert rank["trials"] == ranks[0]["trials"]
        assert rank["validation"] == ranks[0]["validation"] is not None
        tuned, by_hand = rank["tuned"], rank["by hand"]
        assert [name for name in by_hand if not same(tuned[name], by_hand[name])] == []
        assert len(by_hand["record"]) > 3


@pytest.mark.parametrize("case", ["fsdp2/scarce", "tp/tuned", "fsdp1/tuned", "ddp gathers/scarce"])
def test_sharded_training_is_bit_identical_to_the_plan_by_hand(job, case):
    ranks = [rank[case] for rank in job]

    assert_as_by_hand(ranks)
    fitting = (size for size, outcome, _ in ranks[0]["trials"] if outcome == "fit")
    assert max(fitting) > 4  # the size of the loader
    assert ranks[0]["budget"] == (95_000 if case == "ddp gathers/scarce" else ranks[1]["budget"])


def test_a_target_is_divided_by_the_data_parallel_ranks_alone(job):
    for case, replicas in (("fsdp2/scarce", 2), ("fsdp1/tuned", 2), ("tp/tuned", 1)):
        micro, accumulate, ranks = job[0][case]["plan"]
        assert ranks == replicas
        assert micro * accumulate * replicas == 64
        sizes = [size for size, *_ in job[0][case]["tuned"]["record"]]
        assert sizes[:accumulate] == [micro] * accumulate
        assert job[0][case]["tuned"]["global_step"] == 2  # 128 samples


def test_sizes_of_a_sharded_module_are_timed_by_all_ranks_in_step(job):
    first, second = (rank["fsdp2/scarce"] for rank in job)

    assert first["curve"] == second["curve"]
    assert first["curve"]


def test_one_process_shows_a_trainer_what_fits_on_each_of_eight_devices():
    cases = importlib.import_module("strategy_cases")
    sharded = cases.pl.strategies.ModelParallelStrategy(8, 1)
    options = {"devices": 1, "num_nodes": 8, "strategy": sharded}
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        # Lightning leaves rank and address in the environment, which other libraries read
        with warnings.catch_warnings(), mock.patch.dict(os.environ):
            warnings.simplefilter("ignore")
            fitted = cases.trainer("fsdp2", **options)
            report = cases.tuner(85_000).tune(fitted, cases.model("fsdp2"), cases.loader())
    finally:
        dist.destroy_process_group()

    assert report.plan == BatchPlan(8, 1, 8)
    assert report.as_if
    assert "not run on 8 devices" in str(report)
    assert not report.curve
    assert report.guide is None  # the trace of a step knows no shards


def test_out_of_memory_on_one_sharded_rank_hangs_and_changes_nothing(job):
    assert_survived([rank["fsdp2/failing"] for rank in job])


def assert_survived(ranks):
    assert_as_by_hand(ranks)
    assert ranks[0]["trials"][0] == (4, "out_of_memory", None)


def test_an_error_on_one_sharded_rank_is_raised_on_all(job):
    first, second = (rank["fsdp2/exploding"] for rank in job)

    assert first["error"] == "AutobatchError: Rank 1 stopped: ZeroDivisionError: mine"
    assert second["error"] == "ZeroDivisionError: mine"
    assert "autobatch was trying batch_size=4" in second["notes"][0]
    assert first["steps"] == second["steps"] == 4


def test_a_sharded_run_resumes_with_the_plan_of_its_checkpoint(job):
    ranks = [rank["fsdp2/resumed"] for rank in job]

    assert_as_by_hand(ranks)
    assert ranks[0]["first"] == ranks[0]["plan"]
    assert len(ranks[0]["trials"]) == 1
    assert ranks[0]["tuned"]["global_step"] == 4


def test_a_static_graph_of_ddp_is_refused(job):
    assert "static_graph=True makes DistributedDataParallel count" in job[0]["ddp static/refused"]


@pytest.mark.slow
def test_mixed_precision_of_fsdp2_is_tuned(long_job):
    assert_as_by_hand([rank["fsdp2 bf16/scarce"] for rank in long_job])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tp", "fsdp1", "ddp"])
def test_out_of_memory_on_one_rank_of_any_strategy_changes_nothing(long_job, kind):
    assert_survived([rank[f"{kind}/failing"] for rank in long_job])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_ranks_that_the_trainer_starts_train_the_plan_by_hand(launched_job, kind):
    assert_as_by_hand([rank[f"{kind}/tuned"] for rank in launched_job])


@pytest.mark.slow
def test_fsdp2_with_tensor_parallelism_is_tuned_on_four_ranks(tmp_path):
    ranks = [rank["fsdp2 and tp/scarce"] for rank in run(4, tmp_path, "fsdp2 and tp/scarce")]

    assert_as_by_hand(ranks)
    micro, accumulate, data_parallel = ranks[0]["plan"]
    assert (micro * accumulate * data_parallel, data_parallel) == (64, 2)
    assert ranks[0]["tuned"]["global_step"] == 2  # 128 samples
    assert ranks[0]["curve"]  # timed by all four in step
