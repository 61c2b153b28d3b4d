"""Run a batch in pieces if memory runs out: the first failure, further ones, and the batches after it."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from autobatch._memory.oom import is_oom
from autobatch._trials.batches import NotDividedError, divisible_samples, leaves, view
from autobatch._trials.workload import free_after_failure
from autobatch.lightning._survival_limit import PieceLimit
from autobatch.lightning._survival_state import NotUndoneError, StepState

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType

    from autobatch._memory import MemoryProbe
    from autobatch.lightning._survival_merge import DonePieces
    from autobatch.lightning._survival_state import Kept


class Divisible(Protocol):
    """A batch that can be run as a whole or in pieces."""

    batch: Any
    done: DonePieces
    lost_seconds: float  # in attempts that failed

    def run_whole(self) -> Any:
        """Run it, and return its result."""

    def in_pieces(self, done: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
        """Run pieces in the body."""

    def run_piece(
        self, piece: Any, samples: int, weight: float, done: Sequence[torch.Tensor]
    ) -> None:
        """Run a piece, and add it to those done; leave out parameters that are done."""

    def undo_gradients(self) -> list[torch.Tensor]:
        """Undo the gradients of a failed attempt, and return the parameters done by it."""

    def is_sum(self, kept: Kept) -> bool | None:
        """Return True if results are sums over samples, False for means, None if not known."""

    def finish(self, *, is_sum: bool) -> Any:
        """Return the result of all pieces."""


class Repeats:
    """Batches that fail are undone and run again in two pieces; a piece that fails is halved again.

    Args:
        trainer: The Trainer.
        probe: The device, whose memory is released after a failure.
        batch_size: Samples of each batch but the last of an epoch; None if that varies.
        least: Samples of the smallest piece: BatchNorm needs 2.
    """

    def __init__(
        self, trainer: Any, probe: MemoryProbe, batch_size: int | None, least: int
    ) -> None:
        self._trainer = trainer
        self._probe = probe
        self._batch_size = batch_size
        self._least = least
        self._state = StepState(trainer)
        self._limit = PieceLimit()
        self._is_sum: bool | None = None  # the loss; None: not known yet, and taken for a mean

    def run(self, micro_batch: Divisible) -> Any:
        """Run a batch, and return its result."""
        batch = micro_batch.batch
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
        made = micro_batch.done.sizes
        if micro_batch.lost_seconds:
            self._limit.fail(-(-_nbytes(batch) * min(made) // sum(made)))
        else:
            self._limit.succeed(len(made))
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
        micro_batch: Divisible,
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

    def recover(self, micro_batch: Divisible, kept: Kept, error: Exception) -> None:
        """Free the memory of a failed attempt, and restore the state before it.

        At the first failure it tests if results are means over samples, sums, or neither.

        Raises:
            NotUndoneError: The attempt cannot be undone, or its samples must stay together.
        """
        free_after_failure(error, self._probe)
        kept.restore()
        if self._is_sum is None and not micro_batch.lost_seconds:
            self._is_sum = micro_batch.is_sum(kept)


class _Attempt:
    """A context manager that ends out of memory in its body, and undoes what the body has done.

    Other errors pass, and out of memory passes with a note that gives the reason.

    Args:
        repeats: Frees memory and restores the state.
        micro_batch: The micro-batch.
        kept: State before the attempt.
        samples: Of the piece; None for the whole micro-batch.
    """

    def __init__(
        self, repeats: Repeats, micro_batch: Divisible, kept: Kept, samples: int | None = None
    ) -> None:
        self.has_failed = False
        self.done: list[torch.Tensor] = []  # parameters, by the attempt that failed
        self._repeats = repeats
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
                error.add_note("autobatch was running a batch in pieces after out of memory")
            return False
        repeats, samples = self._repeats, self._samples
        if samples is None:
            reason = repeats.reason_against(self._kept.batch)
        else:
            reason = repeats.reason_against_halving(samples)
        reason = reason or self._undo(error)
        if reason is not None:
            error.add_note(f"autobatch did not run the batch again in pieces: {reason}.")
            return False
        self.has_failed = True
        micro_batch.lost_seconds += time.perf_counter() - self._began
        return True

    def _undo(self, error: Exception) -> str | None:
        """Undo the attempt; return the reason if that is not possible."""
        try:
            self.done = self._micro_batch.undo_gradients()
            self._repeats.recover(self._micro_batch, self._kept, error)
        except NotUndoneError as problem:
            return str(problem)
        return None


def in_words(sizes: Sequence[int]) -> str:
    """Return the pieces of a batch as words: "64 done in 2 × 32"."""
    is_even = len(set(sizes)) == 1
    pieces = f"{len(sizes)} × {sizes[0]}" if is_even else " + ".join(map(str, sizes))
    return f"{sum(sizes)} done in {pieces}"


def _cut(rows: slice, pieces: int) -> list[slice]:
    """Return slices of rows, whose lengths differ by at most one."""
    samples = rows.stop - rows.start
    ends = [rows.start + samples * index // pieces for index in range(pieces + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _nbytes(batch: Any) -> int:
    return sum(leaf.nbytes for leaf in leaves(batch) if isinstance(leaf, torch.Tensor))
