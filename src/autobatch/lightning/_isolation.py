"""Replace loops, loggers and collectives while trials run."""

from __future__ import annotations

import importlib
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from autobatch.lightning._compat import package_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# No batch of a trial is the last of an epoch, and a module may still make an int of it
_ENDLESS: Final = 2**31


def _mute_logger(kind: type) -> Callable[[str | None], Any]:
    """A logger that writes nothing, and says it would write where the real one does."""

    class Mute(kind):  # type: ignore[misc]  # of the Lightning package in use
        def __init__(self, directory: str | None) -> None:
            super().__init__()
            self._directory = directory

        @property
        def save_dir(self) -> str | None:
            return self._directory

        log_dir = save_dir

    return Mute


def _mute_loggers(trainer: Any) -> list[Any]:
    """One that writes nothing, where there are any."""
    package = package_of(trainer)
    mute = _mute_logger(importlib.import_module(f"{package}.loggers.logger").DummyLogger)
    return [mute(trainer.log_dir)] if trainer.loggers else []


def _blind_profiler(trainer: Any) -> Any:
    profilers = importlib.import_module(f"{package_of(trainer)}.profilers")
    return profilers.PassThroughProfiler()


@contextmanager
def silenced(trainer: Any) -> Iterator[None]:
    """Keep a run from loggers and profiler, which Lightning 2.6 has write before and after any callback can look."""
    loggers, profiler = trainer.loggers, trainer.profiler
    trainer.loggers = _mute_loggers(trainer)
    trainer.profiler = _blind_profiler(trainer)
    try:
        yield
    finally:
        trainer.loggers, trainer.profiler = loggers, profiler


@contextmanager
def scratch(trainer: Any) -> Iterator[None]:
    """Run the body on loops, results, loggers, callbacks and a profiler of its own; the Trainer's see nothing of it.

    Progress, metrics and results of Lightning 2.6 live in these objects, and start afresh with new ones.
    """
    fit_loop = trainer.fit_loop
    evaluations = (trainer.validate_loop, trainer.test_loop)
    swaps: tuple[tuple[Any, str, Any], ...] = (
        (fit_loop, "epoch_loop", type(fit_loop.epoch_loop)(trainer)),
        (fit_loop, "max_batches", _ENDLESS),
        (trainer, "_logger_connector", type(trainer._logger_connector)(trainer)),
        (trainer, "_loggers", _mute_loggers(trainer)),
        (trainer, "callbacks", []),
        (trainer, "profiler", _blind_profiler(trainer)),
        (trainer, "accumulate_grad_batches", trainer.accumulate_grad_batches),
        (trainer, "should_stop", trainer.should_stop),
        *((loop, "_results", type(loop._results)(training=False)) for loop in evaluations),
        *(
            (loop, "batch_progress", type(loop.batch_progress)())
            for loop in (*evaluations, trainer.predict_loop)
        ),
    )
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in swaps]
    try:
        for owner, name, stand_in in swaps:
            setattr(owner, name, stand_in)
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


@contextmanager
def apart(trainer: Any) -> Iterator[None]:
    """While the body runs, a step of this rank is its own affair, and no other rank is waited for.

    Through `DistributedDataParallel` a rank that is out of memory would leave the others waiting for its gradients.
    Neutralised are the strategy's own collectives (`self.log(sync_dist=True)`, `self.all_gather`), SyncBatchNorm and
    the synchronisation of torchmetrics; collectives that a module calls by itself can not be seen.
    """
    if trainer.world_size == 1:
        yield
        return
    with ExitStack() as undo:
        strategy, module = trainer.strategy, trainer.lightning_module
        undo.callback(setattr, strategy, "model", strategy.model)
        strategy.model = module  # Lightning 2.6 steps whatever this is
        for name, answer in _answers(trainer.world_size).items():
            _hide(strategy, name, answer, undo)
        for part in module.modules():
            if isinstance(part, torch.nn.SyncBatchNorm):
                _hide(part, "forward", partial(_BatchNorm.forward, part), undo)
            elif _is_metric(part):
                _hide(part, "distributed_available_fn", lambda: False, undo)
                _hide(part, "dist_sync_on_step", False, undo)
        yield


def _answers(world_size: int) -> dict[str, Any]:
    """What the collectives of a strategy of Lightning 2.6 would say, if all ranks were like this one."""
    return {
        "reduce": lambda tensor, *_, **__: tensor,
        "all_gather": lambda tensor, *_, **__: torch.stack([tensor] * world_size),
        "broadcast": lambda thing, *_, **__: thing,
        "barrier": lambda *_, **__: None,
        "reduce_boolean_decision": lambda decision, *_, **__: decision,
    }


def _hide(owner: Any, name: str, stand_in: Any, undo: ExitStack) -> None:
    """Let an attribute of the instance hide what the class says, or what it said itself."""
    attributes = vars(owner)
    if name in attributes:
        undo.callback(attributes.__setitem__, name, attributes[name])
    else:
        undo.callback(attributes.pop, name, None)
    attributes[name] = stand_in


def _is_metric(part: object) -> bool:
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(part, torchmetrics.Metric)
