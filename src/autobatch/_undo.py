"""Undo changes, whatever interrupts them."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable


class Undo(ExitStack):
    """Undoes changes on leaving, the latest first; each is registered before it is made.

    Ctrl-C may come at any line. Every undo is therefore called twice: the second call completes one
    that was interrupted, and has to change nothing otherwise. The lines in between are those of
    `ExitStack`, which calls the others after an exception in one. A subclass makes its changes in
    `start`.
    """

    def __enter__(self) -> Self:
        try:
            self.start()
            return self  # noqa: TRY300 -- an interrupt may come here as well
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Make the changes of this object."""

    def add(self, undo: Callable[[], object]) -> None:
        """Register an undo before the change is made."""
        self.callback(undo)
        self.callback(undo)

    def hook(self, register: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        """Register a hook of torch, and remove it on leaving."""
        handles: list[Any] = []
        self.add(partial(_remove_all, handles))
        handles.append(register(*arguments, **keywords))


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
