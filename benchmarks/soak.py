"""Train random configurations through AutoBatch, and again by hand with its two numbers.

Both trainings have to agree to the bit: weights, buffers, optimizer state, the data of every step,
logged metrics, learning rates, `global_step` and the order of hooks. Prints a line for each
configuration that does not, with the seed that draws it again, and a table at the end.

    python benchmarks/soak.py --count 500
    python benchmarks/soak.py --seed 17 --count 1    (with the traceback of an exception)
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import multiprocessing
import signal
import traceback
from concurrent.futures import ProcessPoolExecutor
from enum import StrEnum
from functools import partial

import numpy as np
import torch
from pages import table
from soak_setups import draw, train

from autobatch.errors import AutobatchError


class Verdict(StrEnum):
    EQUAL = "equal to the bit"
    REFUSED = "refused in one sentence"
    ALONE = "training alone also fails"
    DIFFERENT = "different"
    RAISED = "raised"


@dataclasses.dataclass(frozen=True)
class Result:
    """The verdict on one configuration, and its reason."""

    seed: int
    verdict: Verdict
    reason: str
    drawn: str

    @property
    def failed(self):
        return self.verdict in {Verdict.DIFFERENT, Verdict.RAISED}

    def __str__(self):
        return f"seed {self.seed}: {self.verdict}: {self.reason} [{self.drawn}]"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="number of configurations")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seconds", type=int, default=120, help="limit of one configuration")
    parser.add_argument("--no-workers", action="store_true", help="no loader with worker processes")
    parser.add_argument("--refusals", action="store_true", help="print the refused ones as well")
    given = parser.parse_args(arguments)
    seeds = range(given.seed, given.seed + given.count)
    judge = partial(
        judged, seconds=given.seconds, workers=not given.no_workers, traces=given.count == 1
    )
    counts = collections.Counter()
    for result in _results(judge, seeds, given.jobs):
        counts[result.verdict] += 1
        if result.failed or (given.refusals and result.verdict is not Verdict.EQUAL):
            print(result, flush=True)
    print(table(["outcome", "configurations"], [[v, str(counts[v])] for v in Verdict]))
    return 1 if counts[Verdict.DIFFERENT] or counts[Verdict.RAISED] else 0


def judged(seed, *, seconds=120, workers=True, traces=False):
    """Train the configuration of a seed in every way that its verdict needs."""
    torch.set_num_threads(1)
    drawn = draw(seed, workers=workers)
    result = partial(Result, seed, drawn=str(drawn))
    former = signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(seconds)
    try:
        tuned, plan = train(drawn, tunes=True)
        by_hand, _ = train(drawn, plan)
    except (Exception, SystemExit) as error:
        signal.alarm(0)
        if isinstance(error, AutobatchError):
            return result(Verdict.REFUSED, str(error))
        if traces:
            traceback.print_exception(error)
        alone = _error_alone(drawn)
        reason = f"{_told(error)}; alone: {alone}"
        return result(Verdict.RAISED if alone is None else Verdict.ALONE, reason)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
    found = difference(tuned, by_hand)
    numbers = f"{plan.micro_batch_size} × {plan.accumulate_grad_batches}"
    return result(Verdict.DIFFERENT if found else Verdict.EQUAL, f"{found or ''} at {numbers}")


def difference(a, b, at=""):
    """Return the first place at which two trees differ, with the values; None if they are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{at}: keys {sorted(map(str, a.keys() ^ b.keys()))}"
        return _first(difference(a[key], b[key], f"{at}.{key}") for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        pairs = enumerate(zip(a, b, strict=False))
        found = _first(difference(x, y, f"{at}[{i}]") for i, (x, y) in pairs)
        return found or (None if len(a) == len(b) else f"{at}: {len(a)} and {len(b)} entries")
    if isinstance(a, (torch.Tensor, np.ndarray)) and type(a) is type(b):
        if _same_tensors(torch.as_tensor(a), torch.as_tensor(b)):
            return None
    elif a == b or (a != a and b != b):  # noqa: PLR0124 -- not a number
        return None
    return f"{at}: {_short(a)} and {_short(b)}"


def _same_tensors(a, b):
    """Return whether two tensors agree to the bit, where "not a number" is one value."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def _first(found):
    return next((each for each in found if each), None)


def _short(value):
    text = " ".join(str(value).split())
    return text if len(text) < 100 else f"{text[:100]} …"


def _error_alone(drawn):
    by_others = tuple(name for name in drawn.callbacks if name != "noise scale")
    try:
        train(dataclasses.replace(drawn, callbacks=by_others))
    except (Exception, SystemExit) as error:
        return _told(error)
    return None


def _told(error):
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {_short(error)} at {where.filename}:{where.lineno}"


def _out_of_time(*_):
    raise TimeoutError("the configuration took too long")


def _results(judge, seeds, jobs):
    if jobs == 1:
        yield from map(judge, seeds)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(judge, seeds)


if __name__ == "__main__":
    raise SystemExit(main())
