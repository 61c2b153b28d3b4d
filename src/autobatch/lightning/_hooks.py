"""Hooks of the module around the steps of a trial, and those of callbacks if a step needs them."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, Final

from autobatch._memory.oom import is_oom
from autobatch.lightning._compat import call_callback_hook, call_module_hook

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch._trials.snapshot import Snapshot
    from autobatch.lightning._trainer import Trainer

# Before the first batch of a run; those of evaluations are in `Stage`
FIT_START: Final = ("on_fit_start", "on_train_start", "on_train_epoch_start")
_NOT_USERS: Final = ("autobatch", "lightning", "pytorch_lightning")


class Hooks:
    """Calls the hooks that the loops of Lightning 2.6 call before the first and around each batch.

    Those of the user's callbacks are called too, before those of the module, once a first step has
    failed without them: a step may need what they make. Before that they are left out, because
    their effects outside of the module cannot be restored.

    Args:
        trainer: The Trainer.
        start: Hooks that are called once, in their order.
        batch: Name of the hooks around each batch, without "_start" and "_end".
        snapshot: Restores what a failed first step has changed.
    """

    def __init__(
        self, trainer: Trainer, start: Sequence[str], batch: str, snapshot: Snapshot
    ) -> None:
        self._trainer = trainer
        self._start = start
        self._batch = batch
        self._snapshot = snapshot
        self.with_callbacks = False  # those of callbacks are called as well

    def first(self, begin: Callable[[], None]) -> None:
        """Begin a trial; once more with the hooks of callbacks if it fails without them."""
        try:
            begin()
        except Exception as error:
            if is_oom(error) or self.with_callbacks or not self._are_in_callbacks:
                raise
            self._begin_with_callbacks(begin, error)

    def start(self) -> None:
        """Call the hooks before the first batch."""
        for name in self._start:
            self.call(name)

    def before_batch(self, *arguments: Any) -> Any:
        """Call the hook before a batch, and return the value of the module's."""
        return self.call(f"{self._batch}_start", *arguments)

    def after_batch(self, *arguments: Any) -> None:
        """Call the hook after a batch."""
        self.call(f"{self._batch}_end", *arguments)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a hook; return the value of the module's."""
        for callback in self._trainer.callbacks if self.with_callbacks else ():
            if _is_users(callback, name):
                with redirect_stdout(io.StringIO()):
                    call_callback_hook(self._trainer, callback, name, *arguments)
        return call_module_hook(self._trainer, name, *arguments)

    @property
    def _are_in_callbacks(self) -> bool:
        names = (*self._start, f"{self._batch}_start", f"{self._batch}_end")
        return any(_is_users(each, name) for each in self._trainer.callbacks for name in names)

    def _begin_with_callbacks(self, begin: Callable[[], None], error: Exception) -> None:
        self._snapshot.restore()
        self.with_callbacks = True
        try:
            begin()
        except Exception as second:
            if is_oom(second):
                raise
            self.with_callbacks = False
            raise error from None


def users_callbacks(trainer: Trainer) -> list[Any]:
    """Return the callbacks of a Trainer without those of this package."""
    return [
        callback
        for callback in trainer.callbacks
        if type(callback).__module__.partition(".")[0] != "autobatch"
    ]


def _is_users(callback: Any, name: str) -> bool:
    """Return True if the user wrote this hook of a callback."""
    if name in vars(callback):  # as LambdaCallback has them
        return True
    owners = (kind for kind in type(callback).__mro__ if name in vars(kind))
    owner = next(owners, None)
    return owner is not None and owner.__module__.partition(".")[0] not in _NOT_USERS
