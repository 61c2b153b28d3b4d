"""Run a batch in pieces if memory runs out: the first failure, further ones, and the batches after it."""

from __future__ import annotations

import itertools
import math
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from autobatch._memory.oom import is_oom
from autobatch._trials.batches import NotDividedError, divisible_samples, leaves, view
from autobatch._trials.workload import free_after_failure
from autobatch.lightning._survival.pieces import Pieces
from autobatch.lightning._survival.state import NotUndoneError, StepState

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from autobatch._memory import MemoryProbe
    from autobatch.lightning._survival.state import Kept

# Batches in pieces that have to succeed before pieces of twice the size are tried
_FIRST_WAIT: Final = 32


class Divisible(Protocol):
    """A batch that can be run as a whole or in pieces."""

    batch: Any

    def run_whole(self) -> Any:
        """Run it, and return its result."""

    def in_pieces(self, done: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
        """Run pieces in the body."""

    def run_piece(self, piece: Any, weight: float, done: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Run a piece, and return its outputs; leave out parameters that are done."""

    def undo(self) -> list[torch.Tensor]:
        """Undo the gradients of a failed attempt, and return the parameters done by it."""

    def is_sum(self, kept: Kept) -> bool | None:
        """Return True if the loss is a sum over samples, False for a mean, None if not known."""

    def finish(self, outputs: dict[str, Any], pieces: Pieces) -> Any:
        """Return the result of all pieces."""


class Repeats:
    """Batches that fail are undone and run again in two pieces; a piece that fails is halved again.

    Args:
        trainer: The Trainer.
        probe: The device, whose memory is released after a failure.
    """

    def __init__(self, trainer: Any, probe: MemoryProbe) -> None:
        self._trainer = trainer
        self._probe = probe
        self._limit = PieceLimit()
        self._has_failed = False
        self._is_sum: bool | None = None  # the loss; None: not known yet, and taken for a mean

    def begin_epoch(self, batch_size: int | None, least: int) -> None:
        """Look at the module anew, which hooks may have changed.

        Args:
            batch_size: Samples of each batch but the last of an epoch; None if that varies.
            least: Samples of the smallest piece: BatchNorm needs 2.
        """
        self._batch_size = batch_size
        self._least = least
        self._state = StepState(self._trainer)

    def run(self, whole: Divisible) -> Any:
        """Run a batch, and return its result."""
        if self._has_failed and (count := self._pieces_at_first(whole.batch)) > 1:
            return self._run_in_pieces(whole, whole.batch, count, [], Pieces(self._trainer))
        kept, began = self._state.keep(whole.batch), time.perf_counter()
        try:
            return whole.run_whole()
        except Exception as error:
            pieces = Pieces(self._trainer)
            done = self._undo(whole, kept, error, pieces)
            if done is None:
                raise
        self._has_failed = True
        pieces.lost_seconds += time.perf_counter() - began
        return self._run_in_pieces(whole, kept.batch, 2, done, pieces)

    def _pieces_at_first(self, batch: Any) -> int:
        try:
            samples = self._divisible(batch)
        except NotUndoneError:
            return 1
        return self._limit.pieces(_nbytes(batch), samples // self._least)

    def _divisible(self, batch: Any) -> int:
        """Return the samples of a batch; `NotUndoneError` if it cannot be divided."""
        try:
            samples = divisible_samples(batch)
        except NotDividedError as error:
            raise NotUndoneError(str(error)) from None
        size = self._batch_size
        if size in (None, samples) or (self._trainer.is_last_batch and samples < (size or 0)):
            self._check_halving(samples)
            return samples
        raise NotUndoneError(f"its tensors have {samples} rows, and a batch has {size} samples")

    def _check_halving(self, samples: int) -> None:
        if samples == 1:
            raise NotUndoneError("a single sample does not fit")
        if samples < 2 * self._least:
            raise NotUndoneError(f"{samples} samples do not fit, and BatchNorm needs {self._least}")

    def _run_in_pieces(
        self, whole: Divisible, batch: Any, count: int, done: list[torch.Tensor], pieces: Pieces
    ) -> Any:
        cuts = _cut(slice(0, divisible_samples(batch)), count)
        with whole.in_pieces(done):
            self._run_rows(whole, batch, cuts, done, pieces)
        made = pieces.sizes
        if pieces.lost_seconds:
            self._limit.fail(-(-_nbytes(batch) * min(made) // sum(made)))
        else:
            self._limit.succeed(len(made))
        outputs = pieces.merged(sums={"loss"} if self._is_sum else set())
        return whole.finish(outputs, pieces)

    def _run_rows(
        self,
        whole: Divisible,
        batch: Any,
        cuts: Sequence[slice],
        done: list[torch.Tensor],
        pieces: Pieces,
    ) -> None:
        """Run rows of a batch one after the other, and in halves those that do not fit."""
        total = divisible_samples(batch)
        for rows in cuts:
            samples = rows.stop - rows.start
            weight = 1.0 if self._is_sum else samples / total
            kept, began = self._state.keep(batch), time.perf_counter()
            try:
                pieces.add(samples, whole.run_piece(view(batch, total, rows), weight, done))
            except Exception as error:
                more = self._undo(whole, kept, error, pieces, samples)
                if more is None:
                    raise
            else:
                continue
            pieces.lost_seconds += time.perf_counter() - began
            self._run_rows(whole, batch, _cut(rows, 2), [*done, *more], pieces)

    def _undo(
        self,
        whole: Divisible,
        kept: Kept,
        error: Exception,
        pieces: Pieces,
        samples: int | None = None,
    ) -> list[torch.Tensor] | None:
        """Undo a failed attempt, free its memory, and return the parameters done by it.

        At the first failure it tests if results are means over samples, sums, or neither.

        Args:
            whole: The batch.
            kept: State before the attempt.
            error: The failure.
            pieces: Done before.
            samples: Of the piece that failed; None for the whole batch.

        Returns:
            None if the error passes: another one, or out of memory with a note that gives the reason.
        """
        if not is_oom(error):
            if samples is not None:
                error.add_note("autobatch was running a batch in pieces after out of memory")
            return None
        try:
            self._divisible(kept.batch) if samples is None else self._check_halving(samples)
            done = whole.undo()
            free_after_failure(error, self._probe)
            kept.restore()
            if self._is_sum is None and not pieces.lost_seconds:
                self._is_sum = whole.is_sum(kept)
                kept.check_unwritten()  # steps of this test have run to their end
        except NotUndoneError as problem:
            error.add_note(f"autobatch did not run the batch again in pieces: {problem}.")
            return None
        return done


class PieceLimit:
    """The largest piece that a batch begins with, in bytes of its tensors.

    A batch with longer samples is cut into more pieces than others. After a failure the limit is
    the piece that succeeded. It doubles after a number of batches in pieces, and that number
    doubles with each further failure: a size that never fits is tried less and less.
    """

    def __init__(self) -> None:
        self._most: int | None = None  # bytes; None before the first failure
        self._good = 0  # batches in pieces since the last change
        self._wait = _FIRST_WAIT

    def pieces(self, nbytes: int, samples: int) -> int:
        """Return the number of pieces for a batch."""
        return 1 if self._most is None else min(samples, math.ceil(nbytes / self._most))

    def fail(self, nbytes: int) -> None:
        """Take the bytes of the piece that a failed batch was done in."""
        if self._most is not None:
            self._wait *= 2
        self._most, self._good = max(1, nbytes), 0

    def succeed(self, pieces: int) -> None:
        """Count a batch without a failure."""
        if self._most is None or pieces == 1:
            return
        self._good += 1
        if self._good >= self._wait:
            self._most, self._good = 2 * self._most, 0


def _cut(rows: slice, pieces: int) -> list[slice]:
    """Return slices of rows, whose lengths differ by at most one."""
    samples = rows.stop - rows.start
    ends = [rows.start + samples * index // pieces for index in range(pieces + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _nbytes(batch: Any) -> int:
    return sum(leaf.nbytes for leaf in leaves(batch) if isinstance(leaf, torch.Tensor))
