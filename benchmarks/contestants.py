"""The searches, each through its public entry point and as its users run it, and their cost."""

from __future__ import annotations

import contextlib
import importlib
import logging
import tempfile
from dataclasses import dataclass, field
from functools import partial

import pytorch_lightning as pl
from accelerate.utils import find_executable_batch_size
from pytorch_lightning.tuner import Tuner
from toma import toma

import autobatch

STEPS = 3  # of a trial; the default of autobatch and of Lightning's finder
START = 8  # batch size of the user's loader; find() starts there by default


@dataclass
class Log:
    """Count of starts and samples, and the sizes at which steps ended or failed."""

    begun: int = 0
    failures: int = 0
    samples: int = 0
    ran: set = field(default_factory=set)
    failed: set = field(default_factory=set)

    @contextlib.contextmanager
    def step(self, size, passes=1):
        self.samples += size * passes
        try:
            yield
        except RuntimeError:
            self.failures += 1
            self.failed.add(size)
            raise
        self.ran.add(size)


@dataclass(frozen=True)
class Result:
    """Result of a search.

    Args:
        found: The size it returns, if any.
        trials: Sizes it began.
        unfit: Trials that were out of memory or over the budget.
        samples: In all steps of the search.
        seconds: Of the search.
        further_samples: In measuring the throughput curve after the search.
        further_seconds: Of it.
        is_tested: Whether the size it returns ran a step, and none of its steps failed.
        error: The exception it raised instead.
    """

    found: int | None
    trials: int
    unfit: int
    samples: int
    seconds: float
    further_samples: int = 0
    further_seconds: float = 0.0
    is_tested: bool = False
    error: str = ""


@dataclass(frozen=True)
class Contestant:
    """A way to search.

    Args:
        name: What tables call it.
        search: Given a work it names a size, or raises.
        budget_share: Share of its device that it uses by default.
        has_trainer: Whether it searches in a Trainer.
    """

    name: str
    search: object
    budget_share: float = 1.0
    has_trainer: bool = False

    def run(self, work):
        """The result, whatever happens."""
        with _Marks(work) as marks:
            found, error = None, ""
            began = work.clock()
            try:
                answer = self.search(work)
            except Exception as raised:  # as a user would see it
                answer, error = None, f"{type(raised).__name__}: {raised}"[:120]
            seconds = work.clock() - began
        log = work.log
        if isinstance(answer, autobatch.TuningReport) or marks.trials:
            searched, at = marks.last
            found = answer and answer.plan.micro_batch_size
            return Result(
                found,
                marks.trials,
                marks.unfit,
                searched,
                at - began,
                log.samples - searched,
                seconds - (at - began),
                found is not None and found <= max(log.ran),
                error,
            )
        found = answer
        # A larger size that ran suffices, for searches that return a share of it
        tested = found is not None and any(
            size >= min(found, work.ends) for size in log.ran - log.failed
        )
        return Result(
            found,
            log.begun,
            log.failures,
            log.samples,
            seconds,
            is_tested=tested,
            error=error,
        )


class _Marks(logging.Handler):
    """Reads autobatch's log, which has a line for every trial of a search as it ends."""

    def __init__(self, work):
        super().__init__(logging.DEBUG)
        self._work = work
        self._logger = logging.getLogger("autobatch")
        self.trials = self.unfit = 0
        self.last = (0, 0.0)

    def emit(self, record):
        line = record.getMessage()
        if line.startswith("batch_size="):
            self.trials += 1
            self.unfit += " fits" not in line
            self.last = (self._work.log.samples, self._work.clock())

    def __enter__(self):
        self._logger.addHandler(self)
        self._logger.setLevel(logging.DEBUG)
        return self

    def __exit__(self, *_):
        self._logger.removeHandler(self)


# autobatch


def find(work, **options):
    options = {"device": work.probe, "dataset_size": work.ends, "prefer": "largest"} | options
    return autobatch.find(work.train, **options)


def in_a_trainer(work):
    tuner = autobatch.AutoBatch(device=work.probe, prefer="largest")
    return tuner.tune(trainer(), work.module(), work.loader(START))


def trainer(**options):
    """Return a Trainer that prints and writes nothing."""
    return pl.Trainer(
        **{"max_epochs": 1, **options},
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
    )


# The others


def _lightning(mode, **options):
    def search(work):
        module = work.module()
        with work.as_a_device():
            return Tuner(trainer()).scale_batch_size(module, mode=mode, **options)

    return search


def _steps(work, batch_size):
    work.start()
    steps = work.train(batch_size)
    for _ in range(STEPS):
        next(steps)
    return batch_size


def _accelerate(starting):
    def search(work):
        train = find_executable_batch_size(starting_batch_size=starting)(
            lambda batch_size: _steps(work, batch_size)
        )
        with work.as_a_device():
            return train()

    return search


def _toma(starting):
    def search(work):
        # A new function each time, since toma caches its result by caller
        train = toma.batch(
            lambda batchsize: _steps(work, batchsize),
            initial_batchsize=starting,
            context=object(),
        )
        with work.as_a_device():
            return train()

    return search


SHARE = 0.9
IN_A_TRAINER = Contestant("AutoBatch in a Trainer", in_a_trainer, SHARE, has_trainer=True)
BINSEARCH = Contestant("Lightning, binsearch", _lightning("binsearch"), has_trainer=True)
OURS = (
    Contestant("find", find, SHARE),
    Contestant("find, memory_limit=1.0", partial(find, memory_limit=1.0)),
    Contestant("find, Bisection()", partial(find, search=autobatch.Bisection()), SHARE),
    IN_A_TRAINER,
)
THEIRS = (
    Contestant("Lightning, power", _lightning("power"), has_trainer=True),
    BINSEARCH,
    Contestant(
        "Lightning, binsearch, max_val=100,000",
        _lightning("binsearch", max_val=100_000),
        has_trainer=True,
    ),
    Contestant("accelerate, from 128", _accelerate(128)),
    Contestant("accelerate, from 16,384", _accelerate(16_384)),
    Contestant("toma, from 512", _toma(512)),
    Contestant("toma, from 16,384", _toma(16_384)),
)


def quiet():
    """Discard the output of a search."""
    importlib.import_module("autobatch.sinks").console = lambda _: None
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
