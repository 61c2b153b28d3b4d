"""Count optimizer steps and backward passes, and time the steps."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from autobatch._undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch


class OptimizerWatch(Undo):
    """Counts the optimizer steps of this thread, and times them, by torch's global hooks.

    In updates within `watching` it also compares them with the backward passes.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self.steps = 0
        self.has_seen_gradients = False  # in a module given to look_at
        # Whether the workload should step an optimizer: it trains something
        self.expected = False
        self._clock = clock
        self._thread = threading.get_ident()
        self._backwards = _BackwardCounter()
        self._steps_by_optimizer: Counter[int] = Counter()
        # Whether an optimizer stepped after each backward pass, for each update that should have
        # had several micro-batches
        self._stepped_every_pass: set[bool] = set()
        self._is_timing = False
        self._depth = 0  # of a step within a step: an optimizer may wrap another one
        self._began = 0.0
        self._seconds = 0.0

    def start(self) -> None:
        from torch.optim.optimizer import (
            register_optimizer_step_post_hook,
            register_optimizer_step_pre_hook,
        )

        self.hook(register_optimizer_step_pre_hook, self._before)
        self.hook(register_optimizer_step_post_hook, self._after)

    @property
    def never_stepped(self) -> bool:
        """True if gradients were computed, and no optimizer of torch has stepped."""
        return self.has_seen_gradients and not self.steps

    @property
    def steps_every_pass(self) -> bool:
        """True if optimizers stepped after each backward pass, in all updates.

        A single whole update disproves it: the end of the data may cut others short.
        """
        return self._stepped_every_pass == {True}

    def look_at(self, *things: Any) -> None:
        """Count backward passes through all modules among these, in updates within `watching`."""
        from torch.nn import Module

        for thing in things:
            if isinstance(thing, Module):
                self._backwards.add(thing)

    @contextlib.contextmanager
    def watching(self, accumulate: int) -> Iterator[None]:
        """Compare steps with backward passes in one update of so many micro-batches."""
        self._steps_by_optimizer.clear()
        with self._backwards.counting():
            yield
        passes = self._backwards.passes
        if passes and not self.has_seen_gradients:
            self.has_seen_gradients = self.expected = True
        # Of several optimizers the one that steps least: a critic may step more often than the
        # network it judges
        steps = min(self._steps_by_optimizer.values(), default=0)
        if accumulate > 1 and min(passes, steps) > 0:
            self._stepped_every_pass.add(passes == steps)

    @contextlib.contextmanager
    def timing(self) -> Iterator[Callable[[], float]]:
        """Time the optimizers in the block.

        Yields a function that returns their seconds since its last call. The clock waits for
        queued work.
        """
        self._is_timing, self._depth, self._seconds = True, 0, 0.0
        try:
            yield self._take_seconds
        finally:
            self._is_timing = False

    def _take_seconds(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _before(
        self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._is_timing or threading.get_ident() != self._thread:
            return None
        self._depth += 1
        if self._depth > 1:
            return None
        self._began = self._clock()
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._excluded(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # the first is the optimizer itself
            return (args[0], self._excluded(args[1]), *args[2:]), kwargs
        return None

    def _after(self, optimizer: object, *_: object) -> None:
        if threading.get_ident() != self._thread:
            return
        self.steps += 1
        self._steps_by_optimizer[id(optimizer)] += 1
        if not self._is_timing:
            return
        self._depth -= 1
        if self._depth == 0:
            self._seconds += self._clock() - self._began

    def _excluded(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Wrap a closure: its forward and backward pass are not the optimizer's time."""

        def timed() -> Any:
            began = self._clock()
            try:
                return closure()
            finally:
                self._seconds -= self._clock() - began

        return timed


class _BackwardCounter:
    """Counts backward passes through modules, by hooks on their parameters.

    The hooks exist within `counting` only: they would slow down updates that are timed.
    """

    def __init__(self) -> None:
        self._modules: list[weakref.ref[torch.nn.Module]] = []
        self._handles: dict[int, Any] | None = None  # of hooks, by id of the parameter
        self._passes: Counter[int] = Counter()  # by id of the parameter

    @property
    def passes(self) -> int:
        """Backward passes in the latest block, by the parameter that had most."""
        return max(self._passes.values(), default=0)

    def add(self, module: torch.nn.Module) -> None:
        """Count passes through one more module, also in the current block."""
        self._modules.append(weakref.ref(module))
        if self._handles is not None:
            self._hook(module, self._handles)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count backward passes in the block."""
        self._passes.clear()
        with Undo() as undo:
            undo.add(self._remove_hooks)
            self._handles = {}
            for module in [one for ref in self._modules if (one := ref()) is not None]:
                self._hook(module, self._handles)
            yield

    def _remove_hooks(self) -> None:
        for handle in (self._handles or {}).values():
            handle.remove()
        self._handles = None

    def _hook(self, module: torch.nn.Module, handles: dict[int, Any]) -> None:
        from torch.nn.parameter import is_lazy

        for each in module.parameters():
            if id(each) in handles or is_lazy(each) or not each.requires_grad:
                continue
            handles[id(each)] = each.register_hook(partial(self._count, id(each)))

    def _count(self, key: int, _: object) -> None:
        """Count a pass; the gradient of a parameter comes once, however often it is used."""
        self._passes[key] += 1
