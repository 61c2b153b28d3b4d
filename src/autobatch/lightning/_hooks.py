"""Hooks of the module around the steps of a trial, and those of callbacks if a step needs them."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from autobatch._memory.oom import is_oom
from autobatch.lightning._compat import call_callback_hook, call_module_hook

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from autobatch._trials.snapshot import Snapshot
    from autobatch.lightning._trainer import Trainer

# Before the first batch of a run; those of evaluations are in `Stage`
FIT_START: Final = ("on_fit_start", "on_train_start", "on_train_epoch_start")
_NOT_USERS: Final = ("autobatch", "lightning", "pytorch_lightning")


@dataclass(eq=False)
class Hooks:
    """Calls the hooks that the loops of Lightning 2.6 call before the first and around each batch.

    Those of the user's callbacks are called too, before those of the module, once a first step has
    failed without them: a step may need what they make. Before that they are left out, because
    their effects outside of the module cannot be restored.
    """

    trainer: Trainer
    start_hooks: Sequence[str]  # called once, in their order
    batch_hooks: str  # name of the hooks around each batch, without "_start" and "_end"
    snapshot: Snapshot  # restores what a failed first step has changed
    with_callbacks: bool = False  # those of callbacks are called as well

    def attempts(self) -> Iterator[Attempt]:
        """Yield a block for the first step of a trial, and one with hooks of callbacks if it fails.

        If that fails too, the first error counts, unless memory ran out.
        """
        first = Attempt(is_last=self.with_callbacks or not self._are_in_callbacks)
        yield first
        if first.error is None:
            return
        error, first.error = first.error, None  # its frames hold the tensors of the step
        self.snapshot.restore()
        self.with_callbacks = True
        yield (second := Attempt(is_last=False))
        if second.error is not None:
            self.with_callbacks = False
            raise error from None

    def start(self) -> None:
        """Call the hooks before the first batch."""
        for name in self.start_hooks:
            self.call(name)

    def before_batch(self, *arguments: Any) -> Any:
        """Call the hook before a batch, and return the value of the module's."""
        return self.call(f"{self.batch_hooks}_start", *arguments)

    def after_batch(self, *arguments: Any) -> None:
        self.call(f"{self.batch_hooks}_end", *arguments)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a hook; return the value of the module's."""
        for callback in self.trainer.callbacks if self.with_callbacks else ():
            if overrides(callback, name):
                with redirect_stdout(io.StringIO()):
                    call_callback_hook(self.trainer, callback, name, *arguments)
        return call_module_hook(self.trainer, name, *arguments)

    @property
    def _are_in_callbacks(self) -> bool:
        names = (*self.start_hooks, f"{self.batch_hooks}_start", f"{self.batch_hooks}_end")
        return any(overrides(each, name) for each in self.trainer.callbacks for name in names)


class Attempt:
    """A block for a first step; it keeps an error other than out of memory unless it is the last."""

    def __init__(self, *, is_last: bool) -> None:
        self.error: Exception | None = None
        self._is_last = is_last

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if self._is_last or not isinstance(error, Exception) or is_oom(error):
            return False
        self.error = error
        return True


def users_callbacks(trainer: Trainer) -> list[Any]:
    """Return the callbacks of a Trainer without those of this package."""
    own = "autobatch."
    return [each for each in trainer.callbacks if not type(each).__module__.startswith(own)]


def overrides(thing: Any, method: str) -> bool:
    """Return True if a module, datamodule or callback has a method that the user wrote."""
    if method in getattr(thing, "__dict__", ()):  # as LambdaCallback has them
        return True
    owner = next((kind for kind in type(thing).__mro__ if method in vars(kind)), None)
    return owner is not None and owner.__module__.partition(".")[0] not in _NOT_USERS
