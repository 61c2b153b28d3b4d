"""Run a micro-batch again in pieces when memory runs out in training."""

from __future__ import annotations

import itertools
import logging
import time
from typing import TYPE_CHECKING, Any, Self

import torch

from autobatch._accumulation import batch_norms
from autobatch._distributed import current_ranks
from autobatch._memory.oom import is_oom
from autobatch._plan import BatchPlan
from autobatch._report.notes import survived
from autobatch._report.result import Survived
from autobatch._trials.batches import NotDividedError, divisible_samples, leaves, view
from autobatch._trials.workload import free_after_failure
from autobatch.lightning._compat import (
    batches_that_stepped,
    data_parallel_size,
    replacing_closures,
    should_accumulate,
)
from autobatch.lightning._survival_limit import PieceLimit
from autobatch.lightning._survival_loss import is_sum
from autobatch.lightning._survival_pieces import MicroBatch
from autobatch.lightning._survival_state import NotUndoneError, StepState

if TYPE_CHECKING:
    from collections import OrderedDict
    from collections.abc import Sequence
    from types import TracebackType

    from autobatch._memory import MemoryProbe
    from autobatch._undo import patched
    from autobatch.lightning._survival_state import Kept

_log = logging.getLogger("autobatch")


class Survival:
    """Survival of out of memory in the training steps of a Trainer.

    A micro-batch that fails is undone and run again in two pieces, whose losses are weighted by
    their samples; a piece that fails is halved again. The optimizer steps once, after it.

    Args:
        trainer: The Trainer.
        probe: The device, whose memory is released after a failure.
        batch_size: Samples of each micro-batch but the last of an epoch; None if that varies.
    """

    def __init__(self, trainer: Any, probe: MemoryProbe, batch_size: int | None) -> None:
        self.events: list[Survived] = []
        self._trainer = trainer
        self._probe = probe
        self._batch_size = batch_size
        norms = batch_norms(trainer.lightning_module.modules())
        self._least = 2 if norms else 1  # samples of a piece
        self._state = StepState(trainer)
        self._limit = PieceLimit()
        self._stepping_at: int | None = None  # step that follows the last micro-batch
        self._is_sum: bool | None = None  # the loss; None: not known yet, and taken for a mean

    def patch(self) -> patched:
        """Return the change to the training loop."""

        def make(arguments: OrderedDict[str, Any], optimizer: Any, index: int) -> _Closure:
            return _Closure(self, arguments, optimizer, index)

        return replacing_closures(self._trainer, make)

    def run(self, arguments: OrderedDict[str, Any], optimizer: Any, index: int) -> Any:
        """Run a micro-batch, and return its `ClosureResult`."""
        self._stepping_at = None
        result = self._run(arguments, optimizer, index)
        self._stepping_at = self._trainer.global_step
        return result

    def end(self, plan: BatchPlan | None) -> tuple[Survived, ...]:
        """Return the events of all ranks by their steps, and log a note on them.

        `plan` is the one that was tuned, if any.
        """
        trainer = self._trainer
        with current_ranks() as ranks:
            of_ranks = ranks.gather(tuple(self.events))
        events = tuple(sorted(itertools.chain(*of_ranks), key=lambda event: event.step))
        note = survived(events, plan or self._own_plan)
        if note and trainer.is_global_zero:
            _log.warning("%s", note)
        return events

    def note_half_step(self, error: BaseException) -> None:
        """Add a note to an error of the optimizer's step that means out of memory."""
        trainer = self._trainer
        is_stepping = not should_accumulate(trainer.fit_loop.epoch_loop)
        if not is_stepping or self._stepping_at != trainer.global_step or not is_oom(error):
            return
        saver = trainer.checkpoint_callback
        path = saver and (getattr(saver, "last_model_path", "") or saver.best_model_path)
        good = f"The last good checkpoint is {path}" if path else "No checkpoint was written before"
        error.add_note(
            "Memory ran out in the step of the optimizer: weights and optimizer state may be half "
            f"updated, also in a checkpoint written on this exception. {good}."
        )

    def _run(self, arguments: OrderedDict[str, Any], optimizer: Any, index: int) -> Any:
        micro_batch = MicroBatch(self._trainer, arguments, optimizer, index)
        batch = arguments["batch"]
        pieces, done = self._pieces_at_first(batch), []
        if pieces == 1:
            attempt = _Attempt(self, micro_batch, kept := self._state.keep(batch))
            with attempt:
                return micro_batch.run_whole()
            batch, pieces, done = kept.batch, 2, attempt.done
        cuts = _cut(slice(0, divisible_samples(batch)), pieces)
        with micro_batch.in_pieces(done):
            self._run_pieces(micro_batch, batch, cuts, done)
        result = micro_batch.finish(is_sum=bool(self._is_sum))
        self._end(micro_batch, _nbytes(batch))
        return result

    def _pieces_at_first(self, batch: Any) -> int:
        if not self._limit.is_set or self.reason_against(batch) is not None:
            return 1
        return self._limit.pieces(_nbytes(batch), divisible_samples(batch) // self._least)

    def reason_against(self, batch: Any) -> str | None:
        """Return a reason not to divide a batch."""
        try:
            samples = divisible_samples(batch)
        except NotDividedError as error:
            return str(error)
        is_whole = self._batch_size in (None, samples)
        if is_whole or (self._trainer.is_last_batch and samples < (self._batch_size or 0)):
            return self.reason_against_halving(samples)
        return f"its tensors have {samples} rows, and a batch has {self._batch_size} samples"

    def reason_against_halving(self, samples: int) -> str | None:
        if samples >= 2 * self._least:
            return None
        if samples == 1:
            return "a single sample does not fit"
        return f"{samples} samples do not fit, and BatchNorm needs {self._least}"

    def _run_pieces(
        self,
        micro_batch: MicroBatch,
        batch: Any,
        cuts: Sequence[slice],
        done: Sequence[torch.Tensor],
    ) -> None:
        """Run rows of a batch one after the other, and in halves those that do not fit."""
        total = divisible_samples(batch)
        for rows in cuts:
            samples = rows.stop - rows.start
            attempt = _Attempt(self, micro_batch, self._state.keep(batch), samples)
            weight = 1.0 if self._is_sum else samples / total
            with attempt:
                micro_batch.run_piece(view(batch, total, rows), samples, weight, done)
            if attempt.has_failed:
                self._run_pieces(micro_batch, batch, _cut(rows, 2), [*done, *attempt.done])

    def recover(self, micro_batch: MicroBatch, kept: Kept, error: Exception) -> None:
        """Free the memory of a failed attempt, and restore the state before it.

        At the first failure it tests if the loss is a mean over samples, a sum, or neither.

        Raises:
            NotUndoneError: The attempt cannot be undone, or its samples must stay together.
        """
        free_after_failure(error, self._probe)
        kept.restore()
        if self._is_sum is None and not micro_batch.lost_seconds:
            samples, weights = divisible_samples(kept.batch), micro_batch.parameters
            index = micro_batch.index
            self._is_sum = is_sum(self._trainer, kept.batch, samples, index, weights)

    @property
    def _own_plan(self) -> BatchPlan:
        """The plan of a Trainer that was not tuned, if micro-batches have one size."""
        size = self._batch_size or max((each.samples for each in self.events), default=1)
        return BatchPlan(
            size, self._trainer.accumulate_grad_batches, data_parallel_size(self._trainer)
        )

    def _end(self, micro_batch: MicroBatch, nbytes: int) -> None:
        """Count a micro-batch that was done in pieces, and log a failure."""
        trainer, made = self._trainer, micro_batch.pieces
        samples = sum(made)
        if not micro_batch.lost_seconds:
            self._limit.succeed(len(made))
            return
        self._limit.fail(-(-nbytes * min(made) // samples))
        step, epoch = trainer.global_step, trainer.current_epoch
        lost = micro_batch.lost_seconds
        self.events.append(Survived(step, epoch, samples, len(made), min(made), lost))
        is_even = len(set(made)) == 1
        words = f"{len(made)} × {made[0]}" if is_even else " + ".join(map(str, made))
        _log.warning("step %d: out of memory, micro-batch %d done in %s", step, samples, words)
        if trainer.is_global_zero:
            at = batches_that_stepped(trainer.fit_loop.epoch_loop)
            for logger in trainer.loggers:
                logger.log_metrics({"autobatch/out_of_memory": len(self.events)}, step=at)


class _Attempt:
    """A context manager that ends out of memory in its body, and undoes what the body has done.

    Other errors pass, and out of memory passes with a note that gives the reason.

    Args:
        survival: Frees memory and restores the state.
        micro_batch: The micro-batch.
        kept: State before the attempt.
        samples: Of the piece; None for the whole micro-batch.
    """

    def __init__(
        self, survival: Survival, micro_batch: MicroBatch, kept: Kept, samples: int | None = None
    ) -> None:
        self.has_failed = False
        self.done: list[torch.Tensor] = []  # parameters, by the attempt that failed
        self._survival = survival
        self._micro_batch = micro_batch
        self._kept = kept
        self._samples = samples
        self._began = 0.0

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        return self

    def __exit__(self, _: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        micro_batch = self._micro_batch
        if not isinstance(error, Exception):
            return False
        if not is_oom(error):
            if micro_batch.lost_seconds:
                error.add_note("autobatch was running a micro-batch in pieces after out of memory")
            return False
        survival, samples = self._survival, self._samples
        if samples is None:
            reason = survival.reason_against(self._kept.batch)
        else:
            reason = survival.reason_against_halving(samples)
        reason = reason or self._undo(error)
        if reason is not None:
            error.add_note(f"autobatch did not run the micro-batch again in pieces: {reason}.")
            return False
        self.has_failed = True
        micro_batch.lost_seconds += time.perf_counter() - self._began
        return True

    def _undo(self, error: Exception) -> str | None:
        """Undo the attempt; return the reason if that is not possible."""
        try:
            self.done = self._micro_batch.undo_gradients()
            self._survival.recover(self._micro_batch, self._kept, error)
        except NotUndoneError as problem:
            return str(problem)
        return None


class _Closure:
    """Closure that automatic optimization calls, as `Closure` of Lightning 2.6.

    It does not refer to itself, and so frees its batch at once.
    """

    def __init__(self, survival: Survival, *arguments: Any) -> None:
        self._survival = survival
        self._arguments = arguments
        self._result: Any = None

    def __call__(self, *_: Any, **__: Any) -> Any:
        self._result = self._survival.run(*self._arguments)
        return self._result.loss

    def consume_result(self) -> Any:
        """Return the result, and drop it."""
        result, self._result = self._result, None
        return result


def _cut(rows: slice, pieces: int) -> list[slice]:
    """Return slices of rows, whose lengths differ by at most one."""
    samples = rows.stop - rows.start
    ends = [rows.start + samples * index // pieces for index in range(pieces + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _nbytes(batch: Any) -> int:
    return sum(leaf.nbytes for leaf in leaves(batch) if isinstance(leaf, torch.Tensor))
