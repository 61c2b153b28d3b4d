"""Run a batch of validation or testing again in pieces when memory runs out."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._memory.oom import is_oom
from autobatch._trials.batches import divisible_samples, view
from autobatch._undo import patched
from autobatch.lightning._compat import is_synchronized_in_step, logged_results
from autobatch.lightning._survival_loss import few
from autobatch.lightning._survival_merge import DonePieces, show_piece
from autobatch.lightning._survival_repeats import Repeats, in_words
from autobatch.lightning._survival_state import NotUndoneError, is_metric

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from autobatch._memory import MemoryProbe
    from autobatch.lightning._survival_state import Kept
    from autobatch.lightning._trainer import Trainer

_log = logging.getLogger("autobatch")

# Share of the norm by which results of halves may differ: of 16 bits, and of others
_ROUNDING: Final = {2: 0.03, 4: 1e-3, 8: 1e-6}


class EvaluationSurvival:
    """Survival of out of memory in the steps of validation and testing.

    Args:
        trainer: The Trainer.
        probe: The device, whose memory is released after a failure.
    """

    def __init__(self, trainer: Trainer, probe: MemoryProbe) -> None:
        self._trainer = trainer
        self._repeats = Repeats(trainer, probe, batch_size=None, least=1)
        strategy = trainer.strategy
        names = ("validation_step", "test_step")
        steps = {name: partial(self._run, name, getattr(strategy, name)) for name in names}
        self._patch = patched(strategy, **steps)

    def start(self) -> None:
        """Survive until `end`."""
        self._patch.apply()

    def end(self) -> None:
        """Restore the steps of the strategy."""
        self._patch.restore()

    def _run(self, name: str, step: Callable[..., Any], batch: Any, *arguments: Any) -> Any:
        run = _EvaluationBatch(self._trainer, lambda piece: step(piece, *arguments), batch)
        output = self._repeats.run(run)
        if run.lost_seconds:
            _log.warning("%s: out of memory, batch %s", name, in_words(run.done.sizes))
        return output


class _EvaluationBatch:
    """A batch of validation or testing, whose outputs and logged values are merged.

    Args:
        trainer: The Trainer.
        step: Runs the step of the strategy with a batch.
        batch: The batch.
    """

    def __init__(self, trainer: Trainer, step: Callable[[Any], Any], batch: Any) -> None:
        self.batch = batch
        self.done = DonePieces()
        self.lost_seconds = 0.0
        self._trainer = trainer
        self._step = step
        self._is_mapping = False  # the output

    def run_whole(self) -> Any:
        return self._step(self.batch)

    def in_pieces(self, _: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
        return nullcontext()

    def run_piece(self, piece: Any, samples: int, *_: Any) -> None:
        show_piece(self._trainer, piece)
        output = self._step(piece)
        self._is_mapping = isinstance(output, dict)
        self.done.add(samples, output if self._is_mapping else {"": output}, self._trainer)

    def undo_gradients(self) -> list[torch.Tensor]:
        """Return no parameters: there are no gradients."""
        trainer = self._trainer
        if trainer.strategy.model is not trainer.lightning_module:
            raise NotUndoneError("other ranks wait for each pass")
        if trainer.world_size > 1 and is_synchronized_in_step(trainer):
            raise NotUndoneError("self.log of the step communicates with other ranks")
        return []

    def is_sum(self, kept: Kept) -> bool | None:
        """Compare the results of a few samples with those of their halves; False if equal.

        None if memory is too short for that.

        Raises:
            NotUndoneError: They differ, so that those of pieces would not be those of the batch.
        """
        samples = divisible_samples(kept.batch)
        for count in few(samples):
            ways = [[slice(0, count)], [slice(0, count // 2), slice(count // 2, count)]]
            try:
                whole, halves = (self._results_of(kept, samples, rows) for rows in ways)
                break
            except Exception as error:
                if not is_oom(error):
                    raise
                kept.restore()
        else:
            return None
        is_same = len(whole) == len(halves) and all(map(_is_near, whole, halves))
        if not is_same:
            raise NotUndoneError(
                f"outputs or logged values of {count} samples are not means, sums or rows of those "
                "of their halves"
            )
        return False

    def _results_of(self, kept: Kept, samples: int, cuts: Sequence[slice]) -> list[Any]:
        """Return outputs and logged values of rows, and restore the state."""
        trial = _EvaluationBatch(self._trainer, self._step, None)
        for rows in cuts:
            trial.run_piece(view(kept.batch, samples, rows), rows.stop - rows.start)
        outputs = list(trial.done.merged().values())
        trial.done.merge_logged(self._trainer)
        metrics = [
            *self._trainer.lightning_module.modules(),
            *logged_results(self._trainer).values(),
        ]
        states = [
            torch.cat([part.flatten() for part in parts])  # a copy: restoring writes in place
            for metric in metrics
            if is_metric(metric)
            for state in metric.metric_state.values()
            if not isinstance(state, dict)  # of a metric within a collection, which comes by itself
            if (parts := state if isinstance(state, list) else [state])
        ]
        kept.restore()
        return [*outputs, *states]

    def finish(self, *, is_sum: bool) -> Any:
        outputs = self.done.merged()
        self.done.merge_logged(self._trainer)
        return outputs if self._is_mapping else outputs[""]


def _is_near(one: Any, other: Any) -> bool:
    if one is None and other is None:
        return True
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    if one.shape != other.shape:
        return False
    rounding = _ROUNDING[max(2, min(8, one.element_size()))] if one.is_floating_point() else 0
    one, other = one.double(), other.double()
    return bool((one - other).norm() <= rounding * one.norm())
