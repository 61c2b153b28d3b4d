from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autobatch import BatchPlan, Outcome, Trial
from autobatch._trials.runner import merged
from forked import run_forked
from sameness import same
from torchrun import free_port, on_two_ranks, results

CASES = Path(__file__).with_name("ddp_cases.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

needs_lightning = pytest.mark.skipif(
    not (importlib.util.find_spec("pytorch_lightning") or importlib.util.find_spec("lightning")),
    reason="Lightning is not installed",
)


# Trials of one size, merged over ranks


def trial(peak=100, seconds=1.0, **options):
    return Trial(8, Outcome.FIT, peak, seconds, resident=40, profile=(40, peak), **options)


def test_merged_ranks_are_as_slow_as_the_slowest():
    both = merged([trial(100, 1.0), trial(90, 3.0)], budgets=[120, 120])

    assert both == trial(100, 3.0)


def test_merged_peak_keeps_the_smallest_distance_to_a_budget():
    both = merged([trial(1000), trial(100)], budgets=[1010, 120])

    assert both.fits
    assert both.peak == 110  # 10 to spare
    assert both.profile == (40 - 890, 110)


@pytest.mark.parametrize("budgets", [[90, 500], [500, 90]])
def test_a_size_fits_only_if_it_fits_every_rank(budgets):
    assert merged([trial(100), trial(100)], budgets=budgets).outcome is Outcome.OVER_BUDGET


def test_the_worst_outcome_of_any_rank_holds():
    lost = Trial(8, Outcome.OUT_OF_MEMORY, error="no room")

    assert merged([trial(), lost], budgets=[120, 120]).outcome is Outcome.OUT_OF_MEMORY
    assert merged([lost, trial()], budgets=[120, 120]).error == "no room"


def test_a_rank_that_ran_fewer_samples_bounds_the_size():
    short = Trial(5, Outcome.FIT, 50, 1.0)

    assert merged([trial(), short], budgets=[120, 120]).batch_size == 5


# Two real processes


def finish(*processes):
    """Wait for all processes; kill those that hang, and fail the test."""
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=280)[0])
        except subprocess.TimeoutExpired:
            for each in processes:
                each.kill()
            raise
    assert [process.returncode for process in processes] == [0] * len(processes), outputs


def start(*command):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    }
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Results of two ranks in several cases, one after another in the same two processes."""
    where = tmp_path_factory.mktemp("ranks")
    cases = (
        "passed",
        "hook",
        "less memory",
        "aborting",
        "failing",
        "synchronised",
        "exploding",
        "splitting",
        "standalone",
        "answering",
        "everything",
        "noise",
        "uneven",
        "refusing",
    )
    importlib.import_module("torchmetrics")  # once, for both
    return on_two_ranks(CASES, where, *cases)


def assert_as_by_hand(ranks):
    for rank in ranks:
        tuned, by_hand = rank["tuned"], rank["by hand"]
        assert [name for name in by_hand if not same(tuned[name], by_hand[name])] == []
        assert len(by_hand["record"]) > 5
    assert ranks[0]["plan"] == ranks[1]["plan"]
    assert ranks[0]["trials"] == ranks[1]["trials"]
    seen = [index for rank in ranks for index in rank["tuned"]["record"][0][0]]
    micro, _, world_size = ranks[0]["plan"]
    assert len(seen) == len(set(seen)) == micro * world_size


@needs_lightning
@pytest.mark.timeout(900)  # the fixture runs all cases: minutes on a busy machine
@pytest.mark.parametrize("case", ["passed", "hook", "less memory"])
def test_two_ranks_train_bit_identically_after_tuning(job, case):
    ranks = [rank[case] for rank in job]

    assert_as_by_hand(ranks)
    micro, accumulate, world_size = ranks[0]["plan"]
    assert micro * accumulate * world_size == 240
    assert micro > 4


@needs_lightning
def test_the_rank_with_less_memory_decides(job):
    plenty, scarce = (
        max(size for size, outcome in job[0][case]["trials"] if outcome == "fit")
        for case in ("passed", "less memory")
    )

    assert scarce < plenty
    assert job[0]["less memory"]["budget"] == int(330 * 1024 * 0.9)


@needs_lightning
def test_out_of_memory_on_one_rank_hangs_no_other(job):
    first, second = (rank["failing"] for rank in job)

    assert len(first) == 3
    for allocation, found in first.items():
        assert found["trials"][0] == (4, "out_of_memory")
        assert found["plan"] == second[allocation]["plan"]
        assert found["trials"] == second[allocation]["trials"]


@needs_lightning
def test_synchronizing_steps_do_not_wait_in_trials(job):
    first, second = (rank["synchronised"] for rank in job)

    assert first == second
    assert len(first["trials"]) > 2


@needs_lightning
def test_an_error_on_one_rank_is_raised_on_all(job):
    first, second = (rank["exploding"] for rank in job)

    assert first["error"] == "AutobatchError: Rank 1 stopped: ZeroDivisionError: mine"
    assert second["error"] == "ZeroDivisionError: mine"
    assert first["unchanged"]
    assert second["unchanged"]


@needs_lightning
def test_ranks_with_different_shards_choose_one_plan(job):
    first, second = (rank["uneven"] for rank in job)
    plan, notes = first

    assert first == second
    assert plan.effective_batch_size == 230
    assert notes == ["Largest fit not sought: an epoch of 230 samples on 2 ranks has no more."]


@needs_lightning
def test_a_rank_that_fails_while_the_plan_is_applied_ends_the_others(job):
    first, second = (rank["refusing"] for rank in job)

    assert first == "AutobatchError: Rank 1 stopped: ZeroDivisionError: mine"
    assert second == "ZeroDivisionError: mine"


@needs_lightning
@pytest.mark.slow
def test_a_callback_on_one_rank_alone_ends_in_one_sentence(tmp_path):
    ranks = on_two_ranks(CASES, tmp_path, "missing")

    assert ranks[0]["missing"] == (
        "Rank 1 has not come to tune within 2 seconds: all ranks tune together. Give every rank "
        "the same callbacks and arguments."
    )


@needs_lightning
def test_a_rank_that_fails_between_two_gathers_releases_the_others(job):
    first, second = (rank["aborting"] for rank in job)

    assert first == {
        "in a gather": "DoesNotFitError: Rank 1 stopped: no room",
        "between gathers": "AutobatchError: Rank 1 stopped: ZeroDivisionError: mine",
        "after the last gather": "AutobatchError: Rank 1 stopped: ZeroDivisionError: mine",
        "nested": ["DoesNotFitError: Rank 1 stopped: no room", (0, 1)],
        "afterwards": (0, 1),
    }
    assert second == {
        "in a gather": "DoesNotFitError: no room",
        "between gathers": "ZeroDivisionError: mine",
        "after the last gather": "ZeroDivisionError: mine",
        "nested": ["DoesNotFitError: no room", (0, 1)],
        "afterwards": (0, 1),
    }


@needs_lightning
def test_one_rank_decides_for_all_if_a_batch_can_be_split(job):
    first, second = (rank["splitting"] for rank in job)

    assert first == second
    assert [
        any("Splitting a batch of 16" in note for note in first[unable]) for unable in (0, 1)
    ] == [False, True]


@needs_lightning
def test_find_agrees_on_ranks(job):
    first, second = (rank["standalone"] for rank in job)

    assert first == second
    assert first["effective"] == 2000
    # 120 on each rank, of which the second refuses all but powers of two
    assert first["selective"] == BatchPlan(8, 15, 2)


@needs_lightning
def test_the_slowest_rank_decides_on_latency(job):
    first, second = (rank["answering"] for rank in job)

    assert first == second
    within = [each for each in first["latencies"] if each.at_percentile_seconds <= 0.0101]
    assert within[-1].batch_size == 50
    assert first["plan"] == (1, 1, 2)  # any size gives as much
    assert first["latencies"][0].p50_seconds == pytest.approx(2e-4)


@needs_lightning
def test_validation_loggers_checkpoints_and_second_fit_work_on_ranks(job):
    ranks = [rank["everything"] for rank in job]

    assert_as_by_hand(ranks)
    assert ranks[0]["validation"] == ranks[1]["validation"] < 300
    assert ranks[0]["saved"] == ranks[0]["plan"][0]
    assert ranks[0]["trials of the second fit"] == 1
    assert {"autobatch.json", "autobatch.md", "hparams.yaml"} <= set(ranks[0]["files"])


@needs_lightning
@pytest.mark.slow
def test_a_second_process_started_by_lightning_agrees(tmp_path):
    ran = run_forked(CASES, tmp_path, "launched")

    assert ran.returncode == 0, ran.stderr
    assert_as_by_hand([rank["launched"] for rank in results(tmp_path)])


@needs_lightning
@pytest.mark.slow
def test_two_nodes_agree(tmp_path):
    where = ("--master-addr", "127.0.0.1", "--master-port", free_port())
    nodes = ("--nnodes", 2, "--nproc-per-node", 1)

    finish(
        *(
            start(*TORCHRUN, *nodes, *where, "--node-rank", n, CASES, tmp_path, "hook")
            for n in (0, 1)
        )
    )

    assert_as_by_hand([rank["hook"] for rank in results(tmp_path)])


@needs_lightning
def test_the_noise_scale_is_measured_across_ranks(job):
    one, other = (rank["noise"] for rank in job)

    assert same(one["weights"], other["weights"])
    for name, batch_size in (("ranks", 16), ("accumulated", 32), ("plain", 16)):
        assert one[name] == other[name]
        assert one[name].state == "ok"
        assert one[name].batch_size == batch_size
        assert one[name].samples == pytest.approx(4, rel=0.3)
    assert same(one["weights"]["accumulated"], one["weights"]["unwatched"])
    assert "around the model" in one["unwrapped"].reason
