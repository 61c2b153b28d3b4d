"""Count the steps of optimizers, and time them."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch


class OptimizerWatch:
    """Counts the optimizer steps that really happen, and times them, through torch's global hooks.

    Beside them it counts backward passes, in updates that are not timed: by hooks on the parameters of modules that it
    is told of, which stay no longer than the update.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.steps = 0
        # Whether a backward pass has reached a module that it was told of
        self.has_seen_gradients = False
        # Whether the workload should step one: it trains something
        self.expected = False
        self._clock = clock
        self._timing = False
        self._depth = 0  # of a step within a step, where an optimizer extends another's
        self._began = 0.0
        self._seconds = 0.0
        self._modules: list[weakref.ref[torch.nn.Module]] = []
        self._handles: dict[int, Any] | None = None  # of hooks on parameters, by id
        self._passes: Counter[int] = Counter()  # by parameter
        self._stepped: Counter[int] = Counter()  # by optimizer
        # Whether it stepped after each backward pass, in each update that should have been of several micro-batches
        self._at_each_pass: set[bool] = set()

    @property
    def never_stepped(self) -> bool:
        """Whether gradients were computed, and no optimizer of torch's has stepped."""
        return self.has_seen_gradients and not self.steps

    @property
    def steps_every_pass(self) -> bool:
        """Whether no update of several micro-batches was one: optimizers stepped after each backward pass.

        One that the end of the data cut short is no sign of that, where another was whole.
        """
        return self._at_each_pass == {True}

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

    def look_at(self, *things: Any) -> None:
        """Count backward passes through those that are modules, in every update that is watched from now on."""
        from torch.nn import Module

        for module in (each for each in things if isinstance(each, Module)):
            self._modules.append(weakref.ref(module))
            if self._handles is not None:
                self._hook(module, self._handles)

    @contextlib.contextmanager
    def watching(self, accumulate: int) -> Iterator[None]:
        """See what the one update within is made of, which should be so many micro-batches."""
        self._passes.clear()
        self._stepped.clear()
        self._handles = {}
        try:
            for module in [one for ref in self._modules if (one := ref()) is not None]:
                self._hook(module, self._handles)
            yield
        finally:
            for handle in self._handles.values():
                handle.remove()
            self._handles = None
        passes = max(self._passes.values(), default=0)
        if passes and not self.has_seen_gradients:
            self.has_seen_gradients = self.expected = True
        # Of several optimizers the one that steps least: a critic may step more often than what it judges
        steps = min(self._stepped.values(), default=0)
        if accumulate > 1 and min(passes, steps) > 0:
            self._at_each_pass.add(passes == steps)

    def _hook(self, module: torch.nn.Module, handles: dict[int, Any]) -> None:
        from torch.nn.parameter import is_lazy

        for each in module.parameters():
            if id(each) in handles or is_lazy(each) or not each.requires_grad:
                continue
            handles[id(each)] = each.register_hook(partial(self._see, id(each)))

    def _see(self, key: int, _: object) -> None:
        """Count a pass: whatever uses a parameter in it, the gradient comes once."""
        self._passes[key] += 1

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

    def _after(self, optimizer: object, *_: object) -> None:
        self.steps += 1
        self._stepped[id(optimizer)] += 1
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
