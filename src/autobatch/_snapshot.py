"""What a trial may change, captured and given back: modules, optimizers, generators, random state."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
import warnings
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, overload

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import TensorWeakRef

from autobatch._ledger import eager, unobserved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

__all__ = ["Snapshot", "restorable"]

# What has nothing inside that a trial could change
_PLAIN: Final = frozenset({int, float, complex, bool, str, bytes, type(None)})
_MANY: Final = 1000  # entries of a container that is data rather than state

GiveBack: TypeAlias = "Callable[[], Any]"  # puts a value back as it was, in place where it can, and returns it


def restorable(thing: object) -> bool:
    """Whether a snapshot knows how to give this object its state back."""
    stateful = hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")
    return stateful or isinstance(thing, torch.Tensor) or _is_generator(thing)


class Snapshot:
    """Captures objects as they are, and gives all of it back: on request, and on leaving, whatever happened.

    Copies are kept on the host. Captured objects are held weakly: a model that a workload builds for itself may die,
    and is then forgotten. The random state of torch, CUDA, numpy and python belongs to it from the start.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[Callable[[], Any], GiveBack]] = {}
        self._tensors: dict[int, _KeptTensor] = {}
        self._generators: dict[int, tuple[Any, GiveBack]] = {}
        self._passes = 0
        self._with_gradients = True
        self._random: GiveBack = lambda: None

    def __enter__(self) -> Self:
        self._random = _keep_random_state()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.restore()
        finally:
            self.forget()

    def forget(self) -> None:
        """Let go of everything, and give nothing back."""
        self._held.clear()
        self._tensors.clear()
        self._generators.clear()

    def capture(self, *things: Any) -> None:
        """Remember how these are now; what was captured before keeps its first state."""
        self._capture_all(things, with_gradients=True)

    def _capture_all(self, things: Iterable[Any], *, with_gradients: bool) -> None:
        self._with_gradients = with_gradients
        self._tensors = {
            key: kept for key, kept in self._tensors.items() if not kept.is_dead
        }
        with unobserved(), torch.no_grad():
            for thing in things:
                parts = (
                    thing.modules() if isinstance(thing, torch.nn.Module) else [thing]
                )
                for part in parts:
                    self._capture(part)

    def capture_light(self, *things: Any) -> None:
        """Remember the small attributes of these, such as counters and generators, but not the data they hold."""
        self._with_gradients = True
        for thing in things:
            if id(thing) not in self._held and hasattr(thing, "__dict__"):
                ref = _reference(thing)
                self._held[id(thing)] = (
                    ref,
                    self._keep_attributes(thing, ref, _is_light),
                )

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
        if isinstance(thing, torch.Tensor) or _is_generator(thing):
            self._held[key] = (lambda: thing, self._keep(thing))
            return
        ref = _reference(thing, lambda _: self._held.pop(key, None))
        self._held[key] = (ref, self._keep_object(thing, ref))

    def _keep_object(self, thing: Any, ref: Callable[[], Any]) -> GiveBack:
        attributes = self._keep_attributes(thing, ref)
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
        wanted: Callable[[Any], bool] = lambda _: True,
    ) -> GiveBack:
        """Every attribute by name: torch keeps parameters, buffers, modes, hooks and state in attributes too."""
        kept = {
            name: self._keep(value) if wanted(value) else partial(_same, value)
            for name, value in getattr(thing, "__dict__", {}).items()
        }

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

    def _keep(self, value: Any, inside: frozenset[int] = frozenset()) -> GiveBack:
        if isinstance(value, torch.Tensor):
            return self._keep_tensor(value)
        if _is_generator(value):
            # Held in several places, it keeps the first state that was seen
            known = self._generators.setdefault(
                id(value), (value, _keep_generator(value))
            )
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
            return lambda: _refill(
                value, value.update, {key: item() for key, item in items.items()}
            )
        if isinstance(value, list) and all(type(item) in _PLAIN for item in value):
            numbers = value.copy()
            return lambda: _refill(value, value.extend, numbers)
        if isinstance(value, (list, deque)):
            elements = [self._keep(item, inside) for item in value]
            return lambda: _refill(value, value.extend, [item() for item in elements])
        if isinstance(value, set):
            members = value.copy()
            return lambda: _refill(value, value.update, members)
        if isinstance(value, tuple):
            return _keep_tuple(value, [self._keep(item, inside) for item in value])
        if _is_array(value):
            array = value.copy()
            return lambda: _rewrite(value, array)
        return lambda: value

    def _keep_state(self, thing: Any) -> GiveBack:
        """What an object says of itself: schedulers, scalers, averages of weights that are no modules."""
        state = self._keep(thing.state_dict())

        def give_back() -> Any:
            thing.load_state_dict(state())
            return thing

        return give_back

    def _keep_tensor(self, tensor: torch.Tensor) -> GiveBack:
        known = self._tensors.get(id(tensor))
        if known is not None and known.keeps(tensor):
            return known
        if tensor.is_meta or torch.nn.parameter.is_lazy(tensor):  # nothing to copy yet
            return lambda: tensor
        kept = _KeptTensor(
            tensor, lambda: self._passes, with_gradient=self._with_gradients
        )
        self._tensors[id(tensor)] = kept
        return kept


class _KeptTensor:
    """Puts values, gradient and `requires_grad` back into the same tensor, or into a new one if it has died.

    The original is not held: a gradient or a hidden state that training would have freed must not stay on the device.
    """

    def __init__(
        self, tensor: torch.Tensor, passes: Callable[[], int], *, with_gradient: bool
    ) -> None:
        self._ref = TensorWeakRef(tensor)
        self._device = tensor.device
        self._is_leaf = tensor.is_leaf
        self._needs_gradient = tensor.requires_grad
        self._copy = _on_host(tensor)
        gradient = tensor.grad if tensor.is_leaf and with_gradient else None
        self._gradient = None if gradient is None else _on_host(gradient)
        self._passes = passes
        self._given_in = -1

    def keeps(self, tensor: torch.Tensor) -> bool:
        return self._ref() is tensor

    @property
    def is_dead(self) -> bool:
        return self._ref() is None

    def __call__(self) -> torch.Tensor:
        tensor: torch.Tensor | None = self._ref()
        if tensor is not None and self._given_in == self._passes():
            return tensor  # held in several places, given back once
        self._given_in = self._passes()
        tensor = self._rewritten(tensor)
        if self._is_leaf:
            tensor.requires_grad_(self._needs_gradient)
            tensor.grad = self._on_device(self._gradient)
        return tensor

    def _rewritten(self, tensor: torch.Tensor | None) -> torch.Tensor:
        if tensor is None or tensor.is_inference() or self._is_leaf > tensor.is_leaf:
            tensor = self._on_device(self._copy)
            self._ref = TensorWeakRef(tensor)
        elif _is_expanded(tensor):
            # Elements that share memory can not be written one by one; as a rule no one has
            if not torch.equal(_on_host(tensor), self._copy):
                tensor.data = self._on_device(self._copy)
        elif tensor.shape == self._copy.shape and tensor.dtype == self._copy.dtype:
            tensor.data.copy_(self._copy)
        else:
            tensor.data = self._on_device(self._copy)
        return tensor

    @overload
    def _on_device(self, copy: torch.Tensor) -> torch.Tensor: ...
    @overload
    def _on_device(self, copy: None) -> None: ...
    def _on_device(self, copy: torch.Tensor | None) -> torch.Tensor | None:
        return None if copy is None else copy.to(self._device, copy=True)


def _is_expanded(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in sizes)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _keep_random_state() -> GiveBack:
    cpu = torch.get_rng_state()
    # Asking CUDA for its state would create a context on a machine where nothing uses it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpy = sys.modules.get("numpy")
    arrays = numpy.random.get_state() if numpy else None
    python = random.getstate()

    def give_back() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if numpy:
            numpy.random.set_state(arrays)
        random.setstate(python)

    return give_back


def _is_generator(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    kinds = (
        torch.Generator,
        random.Random,
        *((numpy.random.Generator, numpy.random.RandomState) if numpy else ()),
    )
    return isinstance(value, kinds)


def _is_array(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _keep_generator(generator: Any) -> GiveBack:
    """A source of random numbers of torch, python or numpy, each with its own words for the same thing."""
    if isinstance(generator, random.Random):
        version = generator.getstate()
        return lambda: generator.setstate(version) or generator  # type: ignore[func-returns-value]
    if hasattr(generator, "bit_generator"):
        numbers = generator.bit_generator.state
        return lambda: setattr(generator.bit_generator, "state", numbers) or generator  # type: ignore[func-returns-value]
    state = generator.get_state()
    return lambda: generator.set_state(state) or generator


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


def _reference(
    thing: Any, died: Callable[[Any], object] | None = None
) -> Callable[[], Any]:
    """A weak reference, or a firm one to what knows no weak ones."""
    try:
        return weakref.ref(thing, died)
    except TypeError:
        return lambda: thing


def _is_light(value: object) -> bool:
    if isinstance(value, torch.Tensor) or _is_array(value):
        return False
    return not isinstance(value, (dict, list, set, tuple, deque)) or len(value) <= _MANY


def _keep_tuple(value: tuple[Any, ...], elements: list[GiveBack]) -> GiveBack:
    """The very same tuple where its elements are the same, which they are but for tensors that died."""

    def give_back() -> tuple[Any, ...]:
        given = [item() for item in elements]
        if all(new is old for new, old in zip(given, value, strict=True)):
            return value
        return type(value)(*given) if hasattr(value, "_fields") else type(value)(given)

    return give_back


def _refill(container: Any, fill: Callable[[Any], object], contents: Any) -> Any:
    """The same container with other contents: made before it is emptied, which may be what keeps a tensor alive."""
    container.clear()
    fill(contents)
    return container


def _rewrite(array: Any, values: Any) -> Any:
    if array.shape != values.shape or not array.flags.writeable:
        return values.copy()
    array[...] = values
    return array
