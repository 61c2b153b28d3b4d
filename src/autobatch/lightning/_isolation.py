"""Replace loops, loggers and collectives while trials run."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from autobatch.lightning._compat import Imported, fresh_results, package, patched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from autobatch.lightning._trainer import AnyTrainer, Trainer

# No batch of a trial is the last of an epoch. Not infinity: a module may convert the number to int.
_BATCHES_PER_EPOCH: Final = 2**31


@contextmanager
def silenced(trainer: AnyTrainer) -> Iterator[None]:
    """Run the body without loggers and profiler: Lightning writes to them outside of callbacks."""
    with patched(trainer, loggers=_silent_loggers(trainer), profiler=_silent_profiler(trainer)):
        yield


@contextmanager
def on_new_loops(trainer: Trainer) -> Iterator[None]:
    """Run the body on new loops, results, loggers, callbacks and a new profiler.

    Progress, metrics and results live in these objects (Lightning 2.6), and are empty in new ones.
    """
    fit_loop: Any = trainer.fit_loop
    loops: tuple[Any, ...] = (trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    with ExitStack() as stack:
        replace = stack.enter_context
        epoch_loop = type(fit_loop.epoch_loop)(trainer)
        replace(patched(fit_loop, epoch_loop=epoch_loop, max_batches=_BATCHES_PER_EPOCH))
        replace(fresh_results(trainer, _silent_loggers(trainer)))
        replace(patched(trainer, callbacks=[], profiler=_silent_profiler(trainer)))
        # Not replaced, but changed by trials
        restored = ("accumulate_grad_batches", "should_stop")
        replace(patched(trainer, **{name: getattr(trainer, name) for name in restored}))
        for loop in loops:
            replace(patched(loop, batch_progress=type(loop.batch_progress)()))
        yield


@contextmanager
def without_collectives(trainer: Trainer) -> Iterator[None]:
    """Run the body on this rank alone: its steps wait for no other rank.

    With `DistributedDataParallel`, a rank that is out of memory would leave the others waiting for
    its gradients. Replaced are the collectives of the strategy (`self.log(sync_dist=True)`,
    `self.all_gather`), SyncBatchNorm and the synchronization of torchmetrics. Collectives that a
    module calls by itself cannot be seen.
    """
    if trainer.world_size == 1:
        yield
        return
    with ExitStack() as stack:
        module = trainer.lightning_module
        # Lightning 2.6 runs the steps of `strategy.model`
        stack.enter_context(patched(trainer.strategy, model=module))
        stack.enter_context(patched(trainer.strategy, **_local_collectives(trainer.world_size)))
        for part in module.modules():
            if isinstance(part, torch.nn.SyncBatchNorm):
                forward = partial(_BatchNorm.forward, part)
                stack.enter_context(patched(part, forward=forward))
            elif _is_metric(part):
                stack.enter_context(
                    patched(part, distributed_available_fn=lambda: False, dist_sync_on_step=False)
                )
        yield


def _silent_loggers(trainer: AnyTrainer) -> list[Any]:
    """Return one logger that writes nothing, or none if the Trainer has none."""
    return [_silent_logger(trainer)(trainer.log_dir)] if trainer.loggers else []


def _silent_logger(trainer: AnyTrainer) -> Callable[[str | None], Any]:
    """Return a class of loggers that write nothing, and name the directory of the real one."""

    class Silent(Imported.DUMMY_LOGGER.of(trainer)):  # type: ignore[misc]  # found at run time
        def __init__(self, directory: str | None) -> None:
            super().__init__()
            self._directory = directory

        @property
        def save_dir(self) -> str | None:
            return self._directory

        log_dir = save_dir

    return Silent


def _silent_profiler(trainer: AnyTrainer) -> Any:
    return package(trainer).profilers.PassThroughProfiler()


def _local_collectives(world_size: int) -> dict[str, Any]:
    """Return collectives of a strategy (Lightning 2.6), as if all ranks were like this one."""
    return {
        "reduce": lambda tensor, *_, **__: tensor,
        "all_gather": lambda tensor, *_, **__: torch.stack([tensor] * world_size),
        "broadcast": lambda thing, *_, **__: thing,
        "barrier": lambda *_, **__: None,
        "reduce_boolean_decision": lambda decision, *_, **__: decision,
    }


def _is_metric(part: object) -> bool:
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(part, torchmetrics.Metric)
