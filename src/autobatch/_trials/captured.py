"""Save and restore a single value: tensor, generator, container or global RNG state."""

from __future__ import annotations

import random
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch
from torch.utils.weak import TensorWeakRef

if TYPE_CHECKING:
    from collections.abc import Callable

# Puts a value back as it was, in place where it can, and returns it
Restore: TypeAlias = "Callable[[], Any]"


class SavedTensor:
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
        self._hooks = _kept_hooks(tensor) if tensor.is_leaf else {}
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
        for name, hooks in self._hooks.items():
            former = None if hooks is None else hooks()
            if getattr(tensor, name) is not former:
                setattr(tensor, name, former)
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


def _kept_hooks(tensor: torch.Tensor) -> dict[str, Restore | None]:
    """What gives the hooks of a leaf back: the same dictionaries, by which their handles know them."""
    kept: dict[str, Restore | None] = {}
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(tensor, name)
        kept[name] = None if hooks is None else partial(refill, hooks, hooks.update, {**hooks})
    return kept


def _is_expanded(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in sizes)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def keep_random_state() -> Restore:
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


def is_generator(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    kinds = (
        torch.Generator,
        random.Random,
        *((numpy.random.Generator, numpy.random.RandomState) if numpy else ()),
    )
    return isinstance(value, kinds)


def is_array(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def keep_generator(generator: Any) -> Restore:
    """A source of random numbers of torch, python or numpy, each with its own words for the same thing."""
    if isinstance(generator, random.Random):
        version = generator.getstate()
        return lambda: generator.setstate(version) or generator  # type: ignore[func-returns-value]
    if hasattr(generator, "bit_generator"):
        numbers = generator.bit_generator.state
        return lambda: setattr(generator.bit_generator, "state", numbers) or generator  # type: ignore[func-returns-value]
    state = generator.get_state()
    return lambda: generator.set_state(state) or generator


def keep_tuple(value: tuple[Any, ...], elements: list[Restore]) -> Restore:
    """The very same tuple where its elements are the same, which they are but for tensors that died."""

    def give_back() -> tuple[Any, ...]:
        given = [item() for item in elements]
        if all(new is old for new, old in zip(given, value, strict=True)):
            return value
        return type(value)(*given) if hasattr(value, "_fields") else type(value)(given)

    return give_back


def refill(container: Any, fill: Callable[[Any], object], contents: Any) -> Any:
    """The same container with other contents: made before it is emptied, which may be what keeps a tensor alive."""
    container.clear()
    fill(contents)
    return container


def rewrite(array: Any, values: Any) -> Any:
    if array.shape != values.shape or not array.flags.writeable:
        return values.copy()
    array[...] = values
    return array
