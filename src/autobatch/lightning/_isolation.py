"""Replace loops, collectives and all that writes anything while trials run."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import torch

from autobatch._undo import patched
from autobatch.lightning._compat import fresh_results, new_epoch_loop, new_epoch_progress
from autobatch.lightning._package import Imported, package

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from autobatch.lightning._trainer import Trainer

# Values of a logger's experiment that a step may read, such as its folder or id
_PLAIN: Final = (str, int, float, Path)


@contextmanager
def on_new_loops(trainer: Trainer) -> Iterator[None]:
    """Run the body on new loops and results, and without effects of callbacks and loggers.

    Progress, metrics and results live in these objects (Lightning 2.6). Progress starts as training
    has it, and results are empty. Callbacks and loggers are there, with their attributes, which
    steps may read: no hook is called, and nothing is logged, saved or stopped.
    """
    fit_loop: Any = trainer.fit_loop
    loops: tuple[Any, ...] = (trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    with ExitStack() as stack:
        replace = stack.enter_context
        progress = new_epoch_progress(trainer)
        replace(patched(fit_loop, epoch_loop=new_epoch_loop(trainer), epoch_progress=progress))
        replace(fresh_results(trainer))
        replace(silenced(trainer))
        replace(_without_callback_hooks(trainer))
        kept = {"callbacks": list(trainer.callbacks), "should_stop": trainer.should_stop}
        replace(patched(trainer, save_checkpoint=_do_nothing, **kept))
        replace(patched(trainer.strategy, save_checkpoint=_do_nothing))
        for loop in loops:
            replace(patched(loop, batch_progress=type(loop.batch_progress)()))
        yield


def local_collectives(trainer: Trainer) -> patched:
    """Return a patch for collectives of the strategy, as if all ranks were like this one.

    Lightning 2.6 decides by a sum over ranks, and reads the sizes of received tensors: dry
    collectives sum over one rank, and receive nothing. `reduce` stays: `self.log` compares it with
    that of its last call.
    """
    world_size = trainer.world_size
    return patched(
        trainer.strategy,
        all_gather=lambda tensor, *_, **__: torch.stack([tensor] * world_size),
        broadcast=lambda thing, *_, **__: thing,
        reduce_boolean_decision=lambda decision, *_, **__: decision,
    )


@contextmanager
def silenced(trainer: Trainer) -> Iterator[None]:
    """Run the body without loggers and profiler: Lightning writes to them outside of callbacks."""
    loggers = [_SilentLogger(logger) for logger in trainer.loggers]
    profiler = package(trainer).profilers.PassThroughProfiler()
    with patched(trainer, loggers=loggers, profiler=profiler):
        yield


@contextmanager
def _without_callback_hooks(trainer: Trainer) -> Iterator[None]:
    """Let the loops of this Trainer call no hook of a callback while the body runs."""
    path, name = Imported.CALL_CALLBACK_HOOKS.rsplit(".", 1)
    owner = attrgetter(path)(package(trainer))
    hooks = getattr(owner, name)
    if not isinstance(hooks, _HooksOfOthers):
        hooks = _HooksOfOthers(hooks)
    try:
        hooks.silent.append(trainer)
        setattr(owner, name, hooks)
        yield
    finally:
        hooks.silent = [each for each in hooks.silent if each is not trainer]
        if not hooks.silent and getattr(owner, name) is hooks:
            setattr(owner, name, hooks.original)


class _HooksOfOthers:
    """The function by which loops call the hooks of callbacks, without effect for some Trainers.

    Trainers of several threads may share it, and leave it in any order.
    """

    def __init__(self, original: Callable[..., None]) -> None:
        self.original = original
        self.silent: list[Trainer] = []

    def __call__(self, trainer: Trainer, *arguments: Any, **keywords: Any) -> None:
        if not any(each is trainer for each in self.silent):
            self.original(trainer, *arguments, **keywords)


def _do_nothing(*_: Any, **__: Any) -> None:
    pass


class _SilentLogger:
    """A logger with the class and the values of another one, whose methods do nothing."""

    def __init__(self, real: Any) -> None:
        self._real = real

    @property  # type: ignore[misc]  # as unittest.mock does
    def __class__(self) -> Any:
        """Class of the logger: steps and Lightning 2.6 look for loggers of a class."""
        return self._real.__class__

    @property
    def experiment(self) -> Any:
        # Lightning's own loggers keep it here once it is made
        return _Silent(vars(self._real).get("_experiment"))

    def __getattr__(self, name: str) -> Any:
        if name == "_real":  # of a copy that is being made
            raise AttributeError(name)
        value = getattr(self._real, name)
        return _Silent(None) if callable(value) else value


class _Silent:
    """An object whose calls, items and attributes do nothing, but for plain values of another."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_real":
            raise AttributeError(name)
        value = getattr(self._real, name, None)
        return value if isinstance(value, _PLAIN) else _Silent(None)

    def __call__(self, *_: Any, **__: Any) -> _Silent:
        return _Silent(None)

    def __getitem__(self, _: Any) -> _Silent:
        return _Silent(None)

    def __setitem__(self, *_: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
