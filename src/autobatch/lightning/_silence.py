"""Stand-ins that write nothing for loggers, profiler, checkpoints and hooks of callbacks."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from autobatch._undo import patched
from autobatch.lightning._compat import package, without_callback_hooks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch.lightning._trainer import AnyTrainer, Trainer

# Values of a logger's experiment that a step may read, such as its folder or id
_PLAIN: Final = (str, int, float, Path)


@contextmanager
def silenced(trainer: AnyTrainer) -> Iterator[None]:
    """Run the body without loggers and profiler: Lightning writes to them outside of callbacks."""
    loggers = [_SilentLogger(logger) for logger in trainer.loggers]
    profiler = package(trainer).profilers.PassThroughProfiler()
    with patched(trainer, loggers=loggers, profiler=profiler):
        yield


@contextmanager
def without_effects(trainer: Trainer) -> Iterator[None]:
    """Run the body without hooks of callbacks, logging, checkpoints and a stop of training.

    Callbacks and loggers are there, with their attributes: steps may read them.
    """
    with (
        silenced(trainer),
        without_callback_hooks(trainer),
        patched(
            trainer,
            callbacks=list(trainer.callbacks),
            save_checkpoint=_do_nothing,
            should_stop=trainer.should_stop,
        ),
        patched(trainer.strategy, save_checkpoint=_do_nothing),
    ):
        yield


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
