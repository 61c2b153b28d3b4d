"""Run a micro-batch again in pieces when memory runs out in training."""

from __future__ import annotations

import itertools
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from autobatch._accumulation import batch_norms
from autobatch._distributed import current_ranks
from autobatch._memory.oom import is_oom
from autobatch._plan import BatchPlan
from autobatch._report.notes import survived
from autobatch._report.result import Survived
from autobatch._undo import patched
from autobatch.lightning._compat import batches_that_stepped, data_parallel_size, replacing_closures
from autobatch.lightning._hooks import overrides
from autobatch.lightning._survival.micro_batch import MicroBatch
from autobatch.lightning._survival.repeats import Repeats

if TYPE_CHECKING:
    from autobatch._memory import MemoryProbe
    from autobatch.lightning._survival.gradients import LocalGradients
    from autobatch.lightning._survival.pieces import Pieces

_log = logging.getLogger("autobatch")


class Survival:
    """Survival of out of memory in the training steps of a Trainer.

    The optimizer steps once, after the last piece.

    Args:
        trainer: The Trainer.
        probe: The device, whose memory is released after a failure.
    """

    def __init__(self, trainer: Any, probe: MemoryProbe) -> None:
        self.events: list[Survived] = []
        self._trainer = trainer
        self._repeats = Repeats(trainer, probe)
        self._epoch: int | None = None  # in which `_repeats` has looked at the module
        wrapper = trainer.strategy.model
        self._wrapper = wrapper if isinstance(wrapper, DistributedDataParallel) else None
        self._clears = _clears(trainer)
        module, plugin = trainer.lightning_module, trainer.precision_plugin
        self._backward = plugin.backward
        self._has_own_backward = overrides(module, "backward") or overrides(plugin, "backward")
        self._gradients: LocalGradients | None = None  # of the micro-batch that runs
        self._has_gradient = False  # the last micro-batch has run

    def patches(self) -> list[patched]:
        """Return the changes to the training loop and its backward pass."""
        return [
            replacing_closures(self._trainer, partial(_Closure, self)),
            patched(self._trainer.precision_plugin, backward=self._run_backward),
        ]

    def run(self, *arguments: Any) -> Any:
        """Run a micro-batch, and return its `ClosureResult`."""
        self._has_gradient = False
        if self._trainer.current_epoch != self._epoch:
            self._begin_epoch()
        micro_batch = MicroBatch(self._trainer, self._wrapper, self._clears, *arguments)
        self._gradients = micro_batch.gradients
        result = self._repeats.run(micro_batch)
        if (pieces := micro_batch.pieces) is not None and pieces.lost_seconds:
            self._count(pieces)
        self._gradients = None
        self._has_gradient = True
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
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        steps = loop.optim_progress.optimizer.step.current
        if steps.ready == steps.completed or not self._has_gradient or not is_oom(error):
            return
        saver = trainer.checkpoint_callback
        path = saver and (getattr(saver, "last_model_path", "") or saver.best_model_path)
        good = f"The last good checkpoint is {path}" if path else "No checkpoint was written before"
        error.add_note(
            "Memory ran out after the backward pass, which autobatch does not repeat: in a hook, in "
            "clipping, or in the step of the optimizer. Within that step weights and optimizer state "
            f"may be half updated, also in a checkpoint written on this exception. {good}."
        )

    @property
    def _own_plan(self) -> BatchPlan:
        """The plan of a Trainer that was not tuned, if micro-batches have one size."""
        largest = max((each.samples for each in self.events), default=1)
        size = _batch_size(self._trainer) or largest
        return BatchPlan(
            size, self._trainer.accumulate_grad_batches, data_parallel_size(self._trainer)
        )

    def _run_backward(self, loss: Any, *arguments: Any, **options: Any) -> None:
        """Run a backward pass, and note gradients when it begins."""
        # Hooks before it, which may scale gradients, have run; what a `backward` of the user does
        # before autograd begins has not
        if self._gradients is not None:
            if self._has_own_backward and loss.requires_grad:
                loss.register_hook(self._gradients.note)
            else:
                self._gradients.note()
        try:
            self._backward(loss, *arguments, **options)
        except Exception:
            if self._gradients is not None:
                self._gradients.fail(loss, is_own=self._has_own_backward)
            raise

    def _begin_epoch(self) -> None:
        """Look at the module and its loader once the hooks of an epoch have run."""
        self._epoch = self._trainer.current_epoch
        least = 2 if batch_norms(self._trainer.lightning_module.modules()) else 1
        self._repeats.begin_epoch(_batch_size(self._trainer), least)

    def _count(self, pieces: Pieces) -> None:
        """Count a micro-batch that failed, and log it."""
        trainer, made = self._trainer, pieces.sizes
        step, epoch = trainer.global_step, trainer.current_epoch
        lost = pieces.lost_seconds
        self.events.append(Survived(step, epoch, sum(made), len(made), min(made), lost))
        _log.warning("step %d: out of memory, micro-batch %s", step, pieces)
        if trainer.is_global_zero:
            at = batches_that_stepped(trainer.fit_loop.epoch_loop)
            for logger in trainer.loggers:
                logger.log_metrics({"autobatch/out_of_memory": len(self.events)}, step=at)


def _batch_size(trainer: Any) -> int | None:
    """Return the samples of each training batch but the last; None if that varies."""
    loader = trainer.train_dataloader
    size = getattr(loader, "batch_size", None)
    if isinstance(getattr(loader, "dataset", None), IterableDataset) and loader.num_workers > 1:
        return None  # the last batch of each worker may be smaller
    return size if isinstance(size, int) else None


def _clears(trainer: Any) -> bool:
    """Return True if zero_grad leaves no gradient, and no hook after it can make one."""
    module = trainer.lightning_module
    return (
        all(
            getattr(each.zero_grad, "__func__", None) is Optimizer.zero_grad
            for each in trainer.optimizers
        )
        and not overrides(module, "optimizer_zero_grad")
        and not any(overrides(each, "on_before_backward") for each in (module, *trainer.callbacks))
    )


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
