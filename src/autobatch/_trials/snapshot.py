"""Capture and restore modules, optimizers, loaders and random state."""

from __future__ import annotations

import contextlib
import signal
import threading
import warnings
import weakref
from collections import deque
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autobatch._memory.ledger import eager, unobserved
from autobatch._trials.captured import (
    Restore,
    SavedTensor,
    is_array,
    is_generator,
    keep_generator,
    keep_random_state,
    keep_tuple,
    refill,
    rewrite,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

# What has nothing inside that a trial could change
_PLAIN: Final = frozenset({int, float, complex, bool, str, bytes, type(None)})
_MANY: Final = 1000  # entries of a container that is data rather than state


def restorable(thing: object) -> bool:
    """Whether a snapshot knows how to give this object its state back."""
    stateful = hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")
    return stateful or isinstance(thing, torch.Tensor) or is_generator(thing)


class Snapshot:
    """Captures objects as they are, and gives all of it back: on request, and on leaving, whatever happened.

    Copies are kept on the host. Captured objects are held weakly: a model that a workload builds for itself may die,
    and is then forgotten. The random state of torch, CUDA, numpy and python belongs to it from the start.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[Callable[[], Any], Restore]] = {}
        self._tensors: dict[int, SavedTensor] = {}
        self._generators: dict[int, tuple[Any, Restore]] = {}
        self._passes = 0
        self._with_gradients = True
        self._random: Restore = lambda: None

    def __enter__(self) -> Self:
        self._random = keep_random_state()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.restore()
        except Exception as refusal:
            if error is None:
                raise
            # What came first is what has to be told: a GPU that failed for good takes nothing back
            error.add_note(f"autobatch could not give everything back: {refusal!r}")
        finally:
            self.forget()

    def forget(self) -> None:
        """Let go of everything, and give nothing back."""
        self._held.clear()
        self._tensors.clear()
        self._generators.clear()

    @staticmethod
    def bytes_of(*things: Any) -> int:
        """Bytes of what `capture` would copy of modules and optimizers: parameters, gradients, buffers and state."""
        tensors = {id(tensor): tensor for tensor in _tensors_of(things)}
        # What is sparse has no size that its shape would tell
        return sum(
            tensor.numel() * tensor.element_size()
            for tensor in tensors.values()
            if tensor.layout is torch.strided and not tensor.is_meta
        )

    def capture(self, *things: Any) -> None:
        """Remember how these are now; what was captured before keeps its first state."""
        self._capture_all(things, with_gradients=True)

    def _capture_all(self, things: Iterable[Any], *, with_gradients: bool) -> None:
        self._with_gradients = with_gradients
        self._tensors = {key: kept for key, kept in self._tensors.items() if not kept.is_dead}
        with unobserved(), torch.no_grad():
            for thing in things:
                parts = thing.modules() if isinstance(thing, torch.nn.Module) else [thing]
                for part in parts:
                    self._capture(part)

    def capture_light(self, *things: Any) -> None:
        """Remember the small attributes of these, such as counters and generators, but not the data they hold."""
        self._with_gradients = True
        for thing in things:
            if id(thing) not in self._held and hasattr(thing, "__dict__"):
                ref = self._reference(thing)
                attributes = self._keep_attributes(thing, ref, self._keep_light)
                self._held[id(thing)] = (ref, attributes)

    def capture_beside_parameters(self, module: torch.nn.Module) -> None:
        """Remember what a forward pass may change of a module, where its parameters and gradients stay as they are.

        Of long containers only their entries are kept, not what these hold.
        """
        self._with_gradients = False
        with unobserved(), torch.no_grad():
            for part in module.modules():
                if id(part) not in self._held:
                    ref = self._reference(part)
                    own = part._parameters  # noqa: SLF001 -- what torch calls them
                    keep = partial(self._keep_beside, own)
                    attributes = self._keep_attributes(part, ref, keep)
                    self._held[id(part)] = (ref, attributes)

    def _keep_beside(self, left: object, value: Any) -> Restore:
        if value is left or type(value) in _PLAIN:
            return partial(_same, value)
        if isinstance(value, (list, deque)) and len(value) > _MANY:
            return partial(refill, value, value.extend, value.copy())
        if isinstance(value, (dict, set)) and len(value) > _MANY:
            return partial(refill, value, value.update, value.copy())
        return self._keep(value)

    def restore(self) -> None:
        """Give everything back; one object that refuses keeps no other from its own, and is raised at the end."""
        failure: BaseException | None = None
        self._passes += 1
        with _uninterrupted(), unobserved(), torch.no_grad():
            gives = [give_back for _, give_back in self._held.values()]
            for give_back in (*gives, self._random):
                try:
                    give_back()
                except BaseException as error:  # the rest must still be restored
                    failure = failure or error
        if failure is not None:
            raise failure

    @contextlib.contextmanager
    def at_first_forward(self, touched: Callable[[object], None]) -> Iterator[None]:
        """While the body runs, capture every module when its forward runs, and tell `touched` of it the first time.

        It is torch's global hook that sees them; compiled modules stay eager meanwhile, since a hook would break
        their graphs.
        """

        def see(module: object, _: object) -> None:
            if id(module) not in self._held:
                self.capture(module)
                touched(module)

        hook = register_module_forward_pre_hook(see)
        try:
            with eager(), warnings.catch_warnings():
                # That a hook fires once more for a compiled module does no harm here
                warnings.filterwarnings("ignore", message=r".*global hooks on modules")
                yield
        finally:
            hook.remove()

    @contextlib.contextmanager
    def at_first_step(self, touched: Callable[[object], None]) -> Iterator[None]:
        """While the body runs, capture every optimizer when it steps, and tell `touched` of it the first time.

        Parameters that are first seen here carry the gradients of this very step: they are given back without.
        """

        def see(optimizer: object, *_: object) -> None:
            if id(optimizer) not in self._held:
                self._capture_all([optimizer], with_gradients=False)
                touched(optimizer)

        hook = register_optimizer_step_pre_hook(see)
        try:
            yield
        finally:
            hook.remove()

    @property
    def alive(self) -> list[Any]:
        """What was captured and has not died."""
        return [thing for ref, _ in self._held.values() if (thing := ref()) is not None]

    def _capture(self, thing: Any) -> None:
        key = id(thing)
        if key in self._held:
            return
        if isinstance(thing, torch.Tensor) or is_generator(thing):
            self._held[key] = (lambda: thing, self._keep(thing))
            return
        ref = self._reference(thing)
        self._held[key] = (ref, self._keep_object(thing, ref))

    def _reference(self, thing: Any) -> Callable[[], Any]:
        """A weak reference, by which what dies is forgotten; a firm one to what knows no weak ones."""
        key = id(thing)
        try:
            return weakref.ref(thing, lambda _: self._held.pop(key, None))
        except TypeError:
            return lambda: thing

    def _keep_object(self, thing: Any, ref: Callable[[], Any]) -> Restore:
        attributes = self._keep_attributes(thing, ref, self._keep)
        if isinstance(thing, (torch.nn.Module, torch.optim.Optimizer)):
            return attributes
        state = self._keep(thing.state_dict()) if hasattr(thing, "state_dict") else None

        def give_back() -> None:
            owner = ref()
            if owner is not None and state is not None:
                owner.load_state_dict(state())
            attributes()  # last: what the state leaves out, such as a GradScaler's half-done step

        return give_back

    def _keep_attributes(
        self,
        thing: Any,
        ref: Callable[[], Any],
        keep: Callable[[Any], Restore],
    ) -> Restore:
        """Every attribute by name: torch keeps parameters, buffers, modes, hooks and state in attributes too."""
        kept = {name: keep(value) for name, value in getattr(thing, "__dict__", {}).items()}

        def give_back() -> None:
            owner = ref()
            if owner is None:
                return
            for name in owner.__dict__.keys() - kept.keys():
                del owner.__dict__[name]
            failure = None
            for name, value in kept.items():
                try:
                    owner.__dict__[name] = value()
                except Exception as error:  # the others must still be restored
                    failure = failure or error
            if failure is not None:
                raise failure

        return give_back

    def _keep_light(self, value: Any) -> Restore:
        return self._keep(value) if _is_light(value) else partial(_same, value)

    def _keep(self, value: Any, inside: frozenset[int] = frozenset()) -> Restore:
        if isinstance(value, torch.Tensor):
            return self._keep_tensor(value)
        if is_generator(value):
            # Held in several places, it keeps the first state that was seen
            known = self._generators.setdefault(id(value), (value, keep_generator(value)))
            return known[1]
        if id(value) in inside:  # a container that holds itself
            return lambda: value
        inside |= {id(value)}
        if isinstance(value, torch.optim.Optimizer):
            self._capture(value)
            return lambda: value
        if _is_stateful(value):
            return self._keep_state(value)
        if isinstance(value, dict):
            items = {key: self._keep(item, inside) for key, item in value.items()}
            return lambda: refill(value, value.update, {key: item() for key, item in items.items()})
        if isinstance(value, list) and all(type(item) in _PLAIN for item in value):
            numbers = value.copy()
            return lambda: refill(value, value.extend, numbers)
        if isinstance(value, (list, deque)):
            elements = [self._keep(item, inside) for item in value]
            return lambda: refill(value, value.extend, [item() for item in elements])
        if isinstance(value, set):
            members = value.copy()
            return lambda: refill(value, value.update, members)
        if isinstance(value, tuple):
            return keep_tuple(value, [self._keep(item, inside) for item in value])
        if is_array(value):
            array = value.copy()
            return lambda: rewrite(value, array)
        return lambda: value

    def _keep_state(self, thing: Any) -> Restore:
        """What an object says of itself: schedulers, scalers, averages of weights that are no modules."""
        state = self._keep(thing.state_dict())

        def give_back() -> Any:
            thing.load_state_dict(state())
            return thing

        return give_back

    def _keep_tensor(self, tensor: torch.Tensor) -> Restore:
        known = self._tensors.get(id(tensor))
        if known is not None and known.keeps(tensor):
            return known
        if tensor.is_meta or torch.nn.parameter.is_lazy(tensor):  # nothing to copy yet
            return lambda: tensor
        kept = SavedTensor(tensor, lambda: self._passes, with_gradient=self._with_gradients)
        self._tensors[id(tensor)] = kept
        return kept


def _tensors_of(things: Iterable[Any]) -> Iterator[torch.Tensor]:
    for thing in things:
        owned: list[torch.Tensor] = []
        if isinstance(thing, torch.nn.Module):
            owned = [*thing.parameters(), *thing.buffers()]
        elif isinstance(thing, torch.optim.Optimizer):
            owned = [each for group in thing.param_groups for each in group["params"]]
            values = chain.from_iterable(map(dict.values, thing.state.values()))
            yield from (each for each in values if isinstance(each, torch.Tensor))
        for tensor in owned:
            if torch.nn.parameter.is_lazy(tensor):
                continue
            yield tensor
            if tensor.is_leaf and tensor.grad is not None:
                yield tensor.grad


def _same(value: Any) -> Any:
    return value


def _is_stateful(value: object) -> bool:
    # A loader that knows its state would start its workers to tell it
    if isinstance(value, (torch.nn.Module, torch.utils.data.DataLoader, type)):
        return False
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the body is done: half a restore would be worse than a late stop."""
    former = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or former is None:
        yield
        return
    held: list[Any] = []
    signal.signal(signal.SIGINT, lambda *call: held.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
        if held and callable(former):
            former(*held[0])


def _is_light(value: object) -> bool:
    if isinstance(value, torch.Tensor) or is_array(value):
        return False
    return not isinstance(value, (dict, list, set, tuple, deque)) or len(value) <= _MANY
