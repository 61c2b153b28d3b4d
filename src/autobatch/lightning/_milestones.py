"""Calls back at the start of some epochs, once every hook of the epoch's start has run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Milestones", "checked_epochs"]


def checked_epochs(epochs: Iterable[int]) -> frozenset[int]:
    """The epochs, or a ValueError that says what they should be."""
    whole = not isinstance(epochs, (str, bytes)) and hasattr(epochs, "__iter__")
    if not whole or any(type(epoch) is not int or epoch < 1 for epoch in epochs):
        raise ValueError(
            f"retune_at_epochs={epochs!r} is not a list of epochs; give whole numbers of 1 or more, such as [5]: "
            "epoch 0 is tuned before it starts."
        )
    return frozenset(epochs)


class Milestones:
    """Watches a Trainer begin its epochs.

    A callback would be too early: the module's own `on_train_epoch_start` comes after those of all callbacks.
    """

    def __init__(self, epochs: frozenset[int]) -> None:
        self._epochs = epochs
        self._loop: Any = None

    def watch(self, trainer: Any, reached: Callable[[], None]) -> None:
        """Call `reached` before such an epoch asks for its first batch, not where a checkpoint lies within it."""
        if not self._epochs:
            return
        self._loop = loop = trainer.fit_loop
        advance = loop.advance

        def look_and_advance() -> None:
            goes_on = loop.restarted_mid_epoch or loop.restarted_on_epoch_end
            if trainer.current_epoch in self._epochs and not goes_on:
                reached()
            advance()

        # The instance's attribute hides the method of Lightning 2.6's `_FitLoop`
        loop.advance = look_and_advance

    def forget(self) -> None:
        """Let the Trainer's loop be what it was."""
        if self._loop is not None:
            vars(self._loop).pop("advance", None)
            self._loop = None
