"""Run a batch of validation or testing again in pieces when memory runs out."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from autobatch._memory.oom import is_oom
from autobatch._trials.batches import divisible_samples, view
from autobatch._undo import patched
from autobatch.lightning._compat import is_synchronized_in_step, logged_results
from autobatch.lightning._survival.halves import (
    few,
    is_near,
    metric_states,
    telling_samples,
)
from autobatch.lightning._survival.pieces import Pieces, shown
from autobatch.lightning._survival.repeats import Repeats
from autobatch.lightning._survival.state import NotUndoneError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    import torch

    from autobatch._memory import MemoryProbe
    from autobatch.lightning._survival.state import Kept
    from autobatch.lightning._trainer import Trainer

_log = logging.getLogger("autobatch")


class EvaluationSurvival:
    """Survival of out of memory in the steps of validation and testing.

    Args:
        trainer: The Trainer.
        probe: The device, whose memory is released after a failure.
    """

    def __init__(self, trainer: Trainer, probe: MemoryProbe) -> None:
        self._trainer = trainer
        self._probe = probe
        self._repeats: dict[Any, Repeats] = {}  # by the step and the number of the loader
        strategy = trainer.strategy
        names = ("validation_step", "test_step")
        steps = {name: partial(self._run, name, getattr(strategy, name)) for name in names}
        self._patch = patched(strategy, **steps)

    def start(self) -> None:
        """Survive until `end`."""
        for repeats in self._repeats.values():
            repeats.begin_epoch(batch_size=None, least=1)
        self._patch.apply()

    def end(self) -> None:
        """Restore the steps of the strategy."""
        self._patch.restore()

    def _run(self, name: str, step: Callable[..., Any], batch: Any, *arguments: Any) -> Any:
        pass_on = lambda piece: step(piece, *arguments)  # noqa: E731
        # The step may do something else for each loader
        key = (name, logged_results(self._trainer).dataloader_idx)
        if key not in self._repeats:
            self._repeats[key] = Repeats(self._trainer, self._probe)
            self._repeats[key].begin_epoch(batch_size=None, least=1)
        return self._repeats[key].run(_EvaluationBatch(self._trainer, name, pass_on, batch))


class _EvaluationBatch:
    """A batch of validation or testing, whose outputs and logged values are merged.

    Args:
        trainer: The Trainer.
        name: Of the step.
        step: Runs the step of the strategy with a batch.
        batch: The batch.
    """

    def __init__(self, trainer: Trainer, name: str, step: Callable[[Any], Any], batch: Any) -> None:
        self.batch = batch
        self._trainer = trainer
        self._name = name
        self._step = step
        self._is_mapping = False  # the output

    def run_whole(self) -> Any:
        return self._step(self.batch)

    def in_pieces(self, _: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
        return nullcontext()

    def run_piece(self, piece: Any, *_: Any) -> dict[str, Any]:
        with shown(self._trainer, self.batch, piece):  # hooks after it log for the whole
            output = self._step(piece)
        self._is_mapping = isinstance(output, dict)
        return output if self._is_mapping else {"": output}

    def undo(self) -> list[torch.Tensor]:
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
        for count in few(divisible_samples(kept.batch)):
            ways = [[slice(0, count)], [slice(0, count // 2), slice(count // 2, count)]]
            try:
                samples = telling_samples(kept.batch, count)
                whole, halves = (self._results_of(kept, samples, count, cuts) for cuts in ways)
                break
            except Exception as error:
                if not is_oom(error):
                    raise
                kept.restore()
        else:
            return None
        is_same = len(whole) == len(halves) and all(map(is_near, whole, halves))
        if not is_same:
            raise NotUndoneError(
                f"outputs or logged values of {count} samples are not means, sums or rows of those "
                "of their halves"
            )
        return False

    def _results_of(self, kept: Kept, samples: Any, count: int, cuts: Sequence[slice]) -> list[Any]:
        """Return outputs and logged values of samples, and restore the state."""
        pieces = Pieces(self._trainer)
        for rows in cuts:
            pieces.add(rows.stop - rows.start, self.run_piece(view(samples, count, rows)))
        outputs = list(pieces.merged().values())
        logged = logged_results(self._trainer).items()
        states = metric_states([*self._trainer.lightning_module.named_modules(), *logged])
        kept.restore()
        return [*outputs, *states.values()]

    def finish(self, outputs: dict[str, Any], pieces: Pieces) -> Any:
        if pieces.lost_seconds:
            _log.warning("%s: out of memory, batch %s", self._name, pieces)
        return outputs if self._is_mapping else outputs[""]
