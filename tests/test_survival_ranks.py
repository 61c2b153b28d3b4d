"""One of two ranks runs out of memory: the other does not learn of it, and nobody hangs."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from forked import forked
from sameness import same
from surviving import Trained, by_hand
from test_ranks import as_by_torchrun, free_port, results

RANK = Path(__file__).with_name("survival_rank.py")
PLACES = {
    "first": ("deterministic", 1, 0),
    "first rank": ("norm and dropout", 1, 0),
    "second": ("norm and dropout", 2, 1),
    "without sync": ("norm and dropout", 2, 0),
    "bucket view": ("deterministic", 1, 0),
    "unused": ("deterministic", 1, 0),
}
QUICK = ("first", "second")


def run(directory, cases):
    with contextlib.ExitStack() as stack:
        port = free_port()
        ranks = [
            stack.enter_context(forked(RANK, directory, *cases, env=as_by_torchrun(rank, port)))
            for rank in (0, 1)
        ]
        for done in [finish() for finish in ranks]:
            assert done.returncode == 0, done.stderr[-3000:]
    return results(directory)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return run(tmp_path_factory.mktemp("survival"), QUICK)


@pytest.fixture(scope="module")
def long_job(tmp_path_factory):
    return run(tmp_path_factory.mktemp("survival"), set(PLACES) - set(QUICK))


def mean_of_ranks(case, pieces, failing):
    """Return the gradients by hand, with the pieces of the failing rank."""
    network, accumulate, position = PLACES[case]
    of_ranks = []
    for rank in (0, 1):
        module = Trained(network, torch.optim.SGD, 0.0)
        cuts = {position: pieces} if rank == failing else {}
        of_ranks += by_hand(module, cuts, accumulate=accumulate, seed=5 + rank)[1]
    return {name: (each + of_ranks[1][name]) / 2 for name, each in of_ranks[0].items()}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(
            "job" if case in QUICK else "long_job",
            case,
            marks=[] if case in QUICK else pytest.mark.slow,
            id=case,
        )
        for case in PLACES
    ],
)
def test_rank_that_fails_forward_or_backward_hangs_nobody_and_ranks_stay_equal(name, case, request):
    one, other = (rank[case] for rank in request.getfixturevalue(name))
    failing = 0 if case == "first rank" else 1
    whole = mean_of_ranks(case, [6], failing)
    pieces = mean_of_ranks(case, [3, 3], failing)

    assert (one, other)[failing]["allocations"] == one["survived"] > 6
    assert one["survived"] == other["survived"]  # gathered at the end of fit
    assert one["sizes"] == other["sizes"]
    assert same(one["gradients"], other["gradients"])
    for gradients in one["gradients"]:
        for key, gradient in whole.items():
            found = gradients[key]
            assert torch.equal(found, gradient) or torch.equal(found, pieces[key])
    assert sum(same(gradients, pieces) for gradients in one["gradients"]) > 3
