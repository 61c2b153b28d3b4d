"""Save and restore tensors, containers and objects, with all that they contain.

`save_all` picks a class for a value by its type; a new kind of value is a class and a registration.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
from torch.utils.weak import TensorWeakRef

from autobatch._distributed.sharding import local_part
from autobatch._trials.reachable import (
    CONTAINERS,
    LARGE,
    PLAIN,
    attributes_of,
    has_state_dict,
    is_generator,
    is_plain_object,
)
from autobatch._trials.saved import (
    HostCopy,
    SavedArray,
    SavedEntries,
    SavedGenerator,
    Unchanged,
    has_shared_elements,
    is_numpy_array,
    replace_entries,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from autobatch._trials.saved import Saved

_LARGE_TENSOR: Final = 2**28  # bytes; a larger one in an object beside a module is data as well


SaveFunction: TypeAlias = "Callable[[Any, Memo], Saved]"


@dataclass(frozen=True, slots=True)
class Scope:
    """Kinds of state that a capture saves."""

    save: SaveFunction  # for the attributes of an object
    gradients: bool = True  # tensors get their gradients back, or else are restored to None
    parameters: bool = True  # or else parameters and all gradients are left alone
    objects: bool = True  # modules and plain objects within containers and objects as well


class Memo:
    """Everything saved so far; a value held in several places is saved once, in its first state."""

    def __init__(self) -> None:
        self.objects: dict[int, SavedObject] = {}
        self.tensors: dict[int, SavedTensor] = {}
        self.parameters: dict[int, TensorWeakRef] = {}
        self.generators: dict[int, SavedGenerator] = {}
        self.open: set[int] = set()  # containers being saved
        self.restores = 0  # number of restores so far
        self.scope = Scope(save_all)  # of what is saved from now on
        self._found: list[Any] = []  # objects in attributes, yet to be saved

    def forget_dead_tensors(self) -> None:
        self.tensors = {key: saved for key, saved in self.tensors.items() if not saved.is_dead}
        self.parameters = {key: ref for key, ref in self.parameters.items() if ref() is not None}

    def clear(self) -> None:
        self.objects.clear()
        self.tensors.clear()
        self.parameters.clear()
        self.generators.clear()

    def add(self, thing: Any) -> None:
        """Save a tensor, a generator, or an object with its attributes and its state_dict."""
        key = id(thing)
        if key in self.objects:
            return
        if isinstance(thing, torch.Tensor) or is_generator(thing):
            self.objects[key] = SavedObject(lambda: thing, save_all(thing, self))
            return
        self.add_attributes(thing)
        # torch keeps the state of modules and optimizers in attributes
        is_of_torch = isinstance(thing, (torch.nn.Module, torch.optim.Optimizer))
        if not is_of_torch and hasattr(thing, "state_dict"):
            saved = self.objects.get(key) or SavedObject(lambda: thing, Unchanged(thing))
            self.objects[key] = replace(saved, state=save_all(thing.state_dict(), self))

    def add_attributes(self, thing: Any) -> None:
        """Save the attributes of an object, if it has any that can be written."""
        attributes = attributes_of(thing)
        if attributes is None or id(thing) in self.objects:
            return
        reference = self._reference(thing)
        is_found = self.scope.objects and is_plain_object(thing)
        save_one = save_without_data if is_found else self.scope.save
        values = {name: save_one(value, self) for name, value in attributes.items()}
        self.objects[id(thing)] = SavedObject(reference, SavedAttributes(reference, values))

    def add_later(self, thing: Any) -> None:
        """Remember an object found in an attribute, for `add_found`."""
        if id(thing) not in self.objects:
            self._found.append(thing)

    def add_found(self) -> None:
        """Save the objects found in attributes, and all that is found in these."""
        while self._found:
            self.add_attributes(self._found.pop())

    def _reference(self, thing: Any) -> Callable[[], Any]:
        """Return a weak reference that removes the entry; a firm one if the type has none."""
        key = id(thing)
        try:
            return weakref.ref(thing, lambda _: self.objects.pop(key, None))
        except TypeError:
            return lambda: thing


def save_all(value: Any, memo: Memo) -> Saved:
    """Save one value with all that it contains."""
    if id(value) in memo.open:  # a container that contains itself
        return Unchanged(value)
    memo.open.add(id(value))
    try:
        if _has_state(value):
            known = memo.objects.get(id(value))
            if known is not None and known.state is not None:
                return Unchanged(value)  # restored by itself
            state = save_all(value.state_dict(), memo)
            return SavedObject(lambda: value, Unchanged(value), state)
        return _save(value, memo)
    finally:
        memo.open.discard(id(value))


def save_small_values(value: Any, memo: Memo) -> Saved:
    """Save counters, generators and small containers, but no tensors, arrays and data."""
    is_data = isinstance(value, CONTAINERS) and len(value) > LARGE
    if is_data or isinstance(value, torch.Tensor) or is_numpy_array(value):
        return Unchanged(value)
    return save_all(value, memo)


def save_large_by_entries(value: Any, memo: Memo) -> Saved:
    """Save one value; of a large container only its entries, not the contents of these."""
    if isinstance(value, (list, deque, dict, set)) and len(value) > LARGE:
        return SavedEntries(value)
    return save_all(value, memo)


def save_without_data(value: Any, memo: Memo) -> Saved:
    """Save an attribute of a plain object, but no data."""
    is_values = isinstance(value, torch.Tensor) or is_numpy_array(value)
    if is_values and value.nbytes > _LARGE_TENSOR:
        return Unchanged(value)
    return save_large_by_entries(value, memo)


@functools.singledispatch
def _save(value: Any, memo: Memo) -> Saved:
    # NumPy is not imported for this, and has no registration
    if is_generator(value):
        return memo.generators.setdefault(id(value), SavedGenerator(value))
    if is_numpy_array(value):
        return SavedArray(value)
    if memo.scope.objects and is_plain_object(value):
        memo.add_later(value)
    return Unchanged(value)


@_save.register(torch.Tensor)
def _(value: torch.Tensor, memo: Memo) -> Saved:
    known = memo.tensors.get(id(value))
    if known is not None and known.is_of(value):
        return known
    if value.is_meta or torch.nn.parameter.is_lazy(value):  # nothing to copy yet
        return Unchanged(value)
    if _is_parameter(value):
        memo.parameters[id(value)] = TensorWeakRef(value)
        if not memo.scope.parameters:
            return Unchanged(value)
    memo.tensors[id(value)] = saved = SavedTensor(value, memo)
    return saved


@_save.register(torch.optim.Optimizer)
def _(value: torch.optim.Optimizer, memo: Memo) -> Saved:
    memo.add_later(value)
    return Unchanged(value)


@_save.register(torch.nn.Module)
def _(value: torch.nn.Module, memo: Memo) -> Saved:
    if memo.scope.objects:
        memo.add_later(value)
    return Unchanged(value)


@_save.register(set)
def _(value: set[Any], memo: Memo) -> Saved:  # noqa: ARG001 -- of all registrations
    return SavedEntries(value)


@_save.register(list)
@_save.register(deque)
def _(value: Any, memo: Memo) -> Saved:
    is_plain = all(type(item) in PLAIN for item in value)
    return SavedEntries(value) if is_plain else SavedSequence(value, memo)


def _is_parameter(tensor: torch.Tensor) -> bool:
    """Recognise parameters, registered or not: an optimizer may train any leaf."""
    return isinstance(tensor, torch.nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)


class SavedTensor:
    """Values, gradient, hooks and `requires_grad` of a tensor, copied to the host.

    They are written back into the same tensor, or into a new one if it has died. Of a DTensor that
    is the part of this rank. The tensor is not held: a gradient or a hidden state that training
    would free must not stay on the device.
    """

    def __init__(self, tensor: torch.Tensor, memo: Memo) -> None:
        self._reference = TensorWeakRef(tensor)
        self._is_leaf = tensor.is_leaf
        self._requires_grad = tensor.requires_grad
        self._copy = HostCopy(tensor)
        scope = memo.scope
        self._owns_gradient = tensor.is_leaf and scope.parameters
        gradient = tensor.grad if self._owns_gradient and scope.gradients else None
        self._gradient = None if gradient is None else HostCopy(gradient)
        self._hooks = _save_hooks(tensor) if tensor.is_leaf else {}
        self._memo = memo
        self._restored_in = -1

    def is_of(self, tensor: torch.Tensor) -> bool:
        return self._reference() is tensor

    @property
    def is_dead(self) -> bool:
        return self._reference() is None

    def restore(self) -> torch.Tensor:
        tensor: torch.Tensor | None = self._reference()
        if tensor is not None and self._restored_in == self._memo.restores:
            return tensor  # held in several places, restored once
        self._restored_in = self._memo.restores
        tensor = self._with_values(tensor)
        if self._is_leaf:
            tensor.requires_grad_(self._requires_grad)
        if self._owns_gradient:
            tensor.grad = None if self._gradient is None else self._gradient.new_tensor()
        for name, saved in self._hooks.items():
            hooks = saved.restore()
            if getattr(tensor, name) is not hooks:
                setattr(tensor, name, hooks)
        return tensor

    def _with_values(self, tensor: torch.Tensor | None) -> torch.Tensor:
        if tensor is None or tensor.is_inference() or self._is_leaf > tensor.is_leaf:
            tensor = self._copy.new_tensor()
            self._reference = TensorWeakRef(tensor)
            return tensor
        part, values = local_part(tensor), self._copy.values
        if has_shared_elements(part):
            # Elements that share memory cannot be written one by one; they rarely change
            if not torch.equal(part.detach().cpu(), values):
                tensor.data = self._copy.new_tensor()
        elif part.shape == values.shape and part.dtype == values.dtype:
            part.data.copy_(values)
        else:
            tensor.data = self._copy.new_tensor()
        return tensor


def _save_hooks(tensor: torch.Tensor) -> dict[str, Saved]:
    """Save the hooks of a leaf in the same dictionaries, which their handles refer to."""
    saved: dict[str, Saved] = {}
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(tensor, name)
        saved[name] = Unchanged(None) if hooks is None else SavedEntries(hooks)
    return saved


@_save.register(dict)
class SavedDict:
    def __init__(self, container: dict[Any, Any], memo: Memo) -> None:
        self._container = container
        self._items = {key: save_all(item, memo) for key, item in container.items()}

    def restore(self) -> Any:
        items = {key: item.restore() for key, item in self._items.items()}
        return replace_entries(self._container, items)


@_save.register(tuple)
class SavedSequence:
    """A list, a deque or a tuple.

    A tuple is a new one only if an item had to be replaced, such as a tensor that died.
    """

    def __init__(self, container: Any, memo: Memo) -> None:
        self._container = container
        self._items = [save_all(item, memo) for item in container]

    def restore(self) -> Any:
        container, items = self._container, [item.restore() for item in self._items]
        if not isinstance(container, tuple):
            return replace_entries(container, items)
        if all(new is old for new, old in zip(items, container, strict=True)):
            return container
        kind = type(container)
        return kind(*items) if hasattr(kind, "_fields") else kind(items)


@dataclass(frozen=True, slots=True)
class SavedAttributes:
    """All attributes of an object; torch keeps parameters, modes, hooks and state in them too."""

    reference: Callable[[], Any]
    attributes: Mapping[str, Saved]

    def restore(self) -> None:
        owner = self.reference()
        if owner is None:
            return
        for name in owner.__dict__.keys() - self.attributes.keys():
            del owner.__dict__[name]
        failure = None
        for name, saved in self.attributes.items():
            try:
                owner.__dict__[name] = saved.restore()
            except Exception as error:  # the others must still be restored
                failure = failure or error
        if failure is not None:
            raise failure


@dataclass(frozen=True, slots=True)
class SavedObject:
    """An object captured by a snapshot, or one with a state_dict, such as a scheduler."""

    reference: Callable[[], Any]
    value: Saved
    state: Saved | None = None

    def restore(self) -> Any:
        owner = self.reference()
        try:
            if owner is not None and self.state is not None:
                owner.load_state_dict(self.state.restore())
        finally:
            # Last: a state_dict leaves out details such as a half-done step of a GradScaler
            value = self.value.restore()
        return value


def _has_state(value: object) -> bool:
    # Modules and optimizers are saved as objects
    is_of_torch = isinstance(value, (torch.nn.Module, torch.optim.Optimizer))
    return not is_of_torch and has_state_dict(value)
