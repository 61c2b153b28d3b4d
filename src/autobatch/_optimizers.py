"""Optimizer steps as they really happen: counted and timed, through torch's global hooks."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["OptimizerWatch"]


class OptimizerWatch:
    """Counts the optimizer steps that really happen, and times them, through torch's global hooks."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.steps = 0
        # Whether the workload should step one: it trains something
        self.expected = False
        self._clock = clock
        self._timing = False
        self._depth = 0  # of a step within a step, where an optimizer extends another's
        self._began = 0.0
        self._seconds = 0.0

    def __enter__(self) -> Self:
        from torch.optim.optimizer import (
            register_optimizer_step_post_hook,
            register_optimizer_step_pre_hook,
        )

        self._hooks = (
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def timing(self) -> Iterator[Callable[[], float]]:
        """Within it the clock, which waits for queued work, is read around optimizers; gives seconds since last asked."""
        self._timing, self._depth, self._seconds = True, 0, 0.0
        try:
            yield self._take
        finally:
            self._timing = False

    def _take(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _before(
        self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._timing:
            return None
        self._depth += 1
        if self._depth > 1:
            return None
        self._began = self._clock()
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._without(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # the first is the optimizer itself
            return (args[0], self._without(args[1]), *args[2:]), kwargs
        return None

    def _after(self, *_: object) -> None:
        self.steps += 1
        if not self._timing:
            return
        self._depth -= 1
        if self._depth == 0:
            self._seconds += self._clock() - self._began

    def _without(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, whose forward and backward pass are not the optimizer's time."""

        def timed() -> Any:
            began = self._clock()
            try:
                return closure()
            finally:
                self._seconds -= self._clock() - began

        return timed
