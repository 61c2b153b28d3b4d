"""Capture and restore modules, optimizers, loaders and random state."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import ChainedScheduler, OneCycleLR, SequentialLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autobatch._distributed.sharding import bring_to_rest, is_sharded, local_part, register_hooks
from autobatch._memory.ledger import eager, unobserved
from autobatch._memory.storages import tensors_of
from autobatch._trials.captured import (
    Memo,
    Scope,
    save_all,
    save_large_by_entries,
    save_small_values,
    save_without_data,
)
from autobatch._trials.reachable import has_state
from autobatch._trials.saved import SavedGenerator, global_generators
from autobatch._undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from autobatch._trials.reachable import Reached
    from autobatch._trials.saved import Saved

_logger = logging.getLogger(__name__)


class Snapshot(Undo):
    """Capture objects, and restore all of them on request and on leaving, whatever happens.

    Copies are kept on the host. Objects are referenced weakly: a model that a workload builds for
    itself may die, and is then forgotten. The random state of torch, CUDA, NumPy and Python is
    captured at once. Sharded modules are brought to rest before they are restored, which every rank
    has to do.
    """

    def __init__(self) -> None:
        super().__init__()
        self._memo = Memo()
        self._random = {id(each): SavedGenerator(each) for each in global_generators()}
        self._undo = contextlib.ExitStack()
        self._modules: list[weakref.ref[torch.nn.Module]] = []  # captured with all their parts
        self._names: dict[int, str] = {}  # of objects that nobody asked to restore, by id
        self.has_sharded = False  # whether parameters of a module are divided among ranks
        self.unrestored: set[str] = set()  # those whose state could not be saved or loaded
        self.push(self._leave)
        self.push(self._leave)  # completes the first if that was interrupted

    def _leave(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self.restore()
        except Exception as failure:
            self.forget()
            if error is None:
                raise
            # The first error counts: a GPU that has failed for good cannot be restored either
            error.add_note(f"autobatch could not restore everything: {failure!r}")
        else:
            self.forget()

    def forget(self) -> None:
        """Drop everything captured without restoring it."""
        self._undo.close()
        self._memo.clear()
        self._random.clear()
        self._modules.clear()

    @staticmethod
    def bytes_of(*things: Any) -> int:
        """Bytes that `capture` copies: parameters, gradients, buffers and optimizer state."""
        found = map(local_part, tensors_of(things))
        tensors = {id(tensor): tensor for tensor in found}
        # The size of a sparse tensor does not follow from its shape, and a lazy one has none yet
        return sum(
            tensor.numel() * tensor.element_size()
            for tensor in tensors.values()
            if not (tensor.is_meta or is_lazy(tensor)) and tensor.layout is torch.strided
        )

    def capture(self, *things: Any) -> None:
        """Capture objects in their present state; an earlier capture of an object remains valid.

        Schedulers that end may be stepped past their end until the snapshot is left.
        """
        modules = [thing for thing in things if isinstance(thing, torch.nn.Module)]
        self._modules += map(weakref.ref, modules)
        for module in modules:
            self.has_sharded |= is_sharded(module)
            register_hooks(module)
        for scheduler in _ending(things):
            self._undo.enter_context(_endless(scheduler))
        with self._saving(Scope(save_all)) as memo:
            for part in _parts_of(things):
                memo.add(part)

    def capture_if_possible(self, reached: Iterable[Reached]) -> None:
        """Capture objects that a workload reaches; failures are kept in `unrestored`.

        Of objects without a state of their own, values in attributes are captured.
        """
        for each in reached:
            self._names[id(each.value)] = each.name
            capture = self.capture if has_state(each.value) else self.capture_values
            try:
                capture(each.value)
            except Exception:  # of the user's state_dict
                _logger.debug("The state of %s cannot be saved", each.name, exc_info=True)
                self.unrestored.add(each.name)

    def capture_small_values(self, *things: Any) -> None:
        """Capture small attributes, such as counters and generators, but no data."""
        with self._saving(Scope(save_small_values, objects=False)) as memo:
            for thing in things:
                memo.add_attributes(thing)

    def capture_values(self, *things: Any) -> None:
        """Capture attributes with the values in them, in any number, but no other objects."""
        with self._saving(Scope(save_without_data, objects=False)) as memo:
            for thing in things:
                memo.add_attributes(thing)

    def capture_beside_parameters(self, module: torch.nn.Module) -> None:
        """Capture a module but for parameters and gradients, which a forward pass cannot change."""
        register_hooks(module)
        with self._saving(Scope(save_large_by_entries, parameters=False)) as memo:
            for part in module.modules():
                memo.add_attributes(part)

    @contextlib.contextmanager
    def _saving(self, scope: Scope) -> Iterator[Memo]:
        self._memo.scope = scope
        self._memo.forget_dead_tensors()
        with unobserved(), torch.no_grad():
            yield self._memo
            self._memo.add_found()

    def restore(self) -> None:
        """Restore everything; the first failure is raised after all other objects are restored."""
        failure: BaseException | None = None
        self._memo.restores += 1
        alive = [module for reference in self._modules if (module := reference()) is not None]
        try:
            bring_to_rest(alive)
        except Exception as error:  # the rest must still be restored
            failure = error
        with _uninterrupted(), unobserved(), torch.no_grad():
            everything: dict[int, Saved] = {**self._memo.objects, **self._random}
            for key, saved in everything.items():
                try:
                    saved.restore()
                except BaseException as error:  # the rest must still be restored
                    if key in self._names and isinstance(error, Exception):
                        self.unrestored.add(self._names[key])
                    else:
                        failure = failure or error
        if failure is not None:
            raise failure

    @contextlib.contextmanager
    def at_first_forward(self, touched: Callable[[object], None]) -> Iterator[None]:
        """In the body, capture every module before its first forward, and pass it to `touched`.

        Modules are seen by torch's global hook, those of other threads too, which are left alone:
        restoring would undo their training. Compiled modules stay eager meanwhile, since a hook
        would break their graphs.
        """
        thread = threading.get_ident()

        def hook(module: object, _: object) -> None:
            if id(module) not in self._memo.objects and threading.get_ident() == thread:
                self.capture(module)
                touched(module)

        with Undo() as undo:
            undo.hook(register_module_forward_pre_hook, hook)
            with eager(), warnings.catch_warnings():
                # A hook that runs once more for a compiled module does no harm
                warnings.filterwarnings("ignore", message=r".*global hooks on modules")
                yield

    @contextlib.contextmanager
    def at_first_step(self, touched: Callable[[object], None]) -> Iterator[None]:
        """In the body, capture every optimizer before its first step, and pass it to `touched`.

        Parameters not captured before carry the gradients of this very step: they are restored
        without any.
        """
        thread = threading.get_ident()

        def hook(optimizer: object, *_: object) -> None:
            if id(optimizer) not in self._memo.objects and threading.get_ident() == thread:
                with self._saving(Scope(save_all, gradients=False)) as memo:
                    memo.add(optimizer)
                touched(optimizer)

        with Undo() as undo:
            undo.hook(register_optimizer_step_pre_hook, hook)
            yield

    @property
    def alive(self) -> list[Any]:
        """Captured objects that have not died."""
        owners = (saved.reference() for saved in self._memo.objects.values())
        return [owner for owner in owners if owner is not None]

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Parameters of captured objects, also those that no module has registered."""
        found = (reference() for reference in self._memo.parameters.values())
        return [parameter for parameter in found if parameter is not None]


def _ending(things: Iterable[Any]) -> Iterator[OneCycleLR]:
    """Yield schedulers that raise past their last step, also those inside others."""
    for thing in things:
        if isinstance(thing, OneCycleLR):
            yield thing
        elif isinstance(thing, (SequentialLR, ChainedScheduler)):
            yield from _ending(thing._schedulers)  # noqa: SLF001 -- has no public name


@contextlib.contextmanager
def _endless(scheduler: OneCycleLR) -> Iterator[None]:
    """In the body, let a scheduler begin again after its last step, where it would raise.

    Trials take more steps than training may have: the timing of a size has no fixed number.
    """
    kind = type(scheduler)

    def get_lr(self: OneCycleLR) -> Any:
        if self.last_epoch > self.total_steps:
            self.last_epoch = 0
        return kind.get_lr(self)

    try:
        scheduler.__class__ = type(kind.__name__, (kind,), {"get_lr": get_lr})
        yield
    finally:
        scheduler.__class__ = kind


def _parts_of(things: Iterable[Any]) -> Iterator[Any]:
    """Yield the modules of each module, and everything else itself."""
    for thing in things:
        yield from thing.modules() if isinstance(thing, torch.nn.Module) else [thing]


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the body is done: half a restore is worse than a late stop."""
    former = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or former is None:
        yield
        return
    received: list[Any] = []
    try:
        signal.signal(signal.SIGINT, lambda *signal_and_frame: received.append(signal_and_frame))
        yield
    finally:
        signal.signal(signal.SIGINT, former)
        if received and callable(former):
            former(*received[0])
