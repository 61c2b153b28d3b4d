"""Random configurations train through AutoBatch as they do by hand."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import lightning_here  # noqa: F401 -- skips without Lightning

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")

# Lightning and torch warn of some combinations of arguments
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def soak():
    sys.path.insert(0, BENCHMARKS)
    yield importlib.import_module("soak")
    sys.path.remove(BENCHMARKS)


def judged(soak, seeds, *, workers):
    results = [soak.judged(seed, workers=workers) for seed in seeds]
    failed = [str(result) for result in results if result.failed]
    equal = [result for result in results if result.verdict is soak.Verdict.EQUAL]
    return failed, len(equal)


def test_some_random_configurations_train_as_by_hand(soak):
    failed, equal = judged(soak, range(6), workers=False)

    assert failed == []
    assert equal >= 4


@pytest.mark.slow
def test_many_random_configurations_train_as_by_hand(soak):
    failed, equal = judged(soak, range(1000, 1054), workers=True)
    without_workers = judged(soak, range(6, 12), workers=False)

    assert (failed, without_workers[0]) == ([], [])
    assert equal + without_workers[1] >= 40


def test_another_weight_is_a_difference(soak):
    setups = importlib.import_module("soak_setups")
    drawn = setups.draw(1, workers=False)
    record, _ = setups.train(drawn)
    again, _ = setups.train(drawn)

    assert soak.difference(record, again) is None

    again["weights"]["net.0.weight"].view(-1)[0] += 1e-7
    assert soak.difference(record, again).startswith(".weights.")


@pytest.mark.parametrize(
    ("a", "b", "place"),
    [
        ({"x": [1, 2]}, {"x": [1, 3]}, ".x[1]: 2 and 3"),
        ({"x": [1, 2]}, {"x": [1]}, ".x: 2 and 1 entries"),
        ({"x": 1}, {"y": 1}, ": keys ['x', 'y']"),
        (float("nan"), float("nan"), None),
        (1, 1.5, ": 1 and 1.5"),
    ],
)
def test_difference_names_the_first_place(soak, a, b, place):
    assert soak.difference(a, b) == place
