"""Values as they were when they were saved, without the objects that they contain."""

from __future__ import annotations

import functools
import random
import sys
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from autobatch._distributed.sharding import local_part, maker_of


class Saved(Protocol):
    """A value as it was when it was saved."""

    def restore(self) -> Any:
        """Restore the value, in place if possible, and return it."""


@dataclass(frozen=True, slots=True)
class Unchanged:
    """A value that a trial cannot change, or that is restored elsewhere."""

    value: Any

    def restore(self) -> Any:
        return self.value


class SavedEntries:
    """A container with the entries it had; the entries themselves are not saved."""

    def __init__(self, container: Any) -> None:
        self._container = container
        self._entries = container.copy()

    def restore(self) -> Any:
        return replace_entries(self._container, self._entries)


def replace_entries(container: Any, entries: Any) -> Any:
    """Replace the entries of a container; `entries` may be all that keeps a tensor alive."""
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(entries)
    else:
        container.update(entries)
    return container


def is_numpy_array(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


class SavedArray:
    """A NumPy array; a new one if its shape has changed or it is read-only."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self._values = array.copy()

    def restore(self) -> Any:
        if self._array.shape != self._values.shape or not self._array.flags.writeable:
            return self._values.copy()
        self._array[...] = self._values
        return self._array


class SavedGenerator:
    """State of a random number generator of torch, Python or NumPy."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        if hasattr(generator, "getstate"):  # Python's
            self._state, self._set = generator.getstate(), generator.setstate
        elif hasattr(generator, "get_state"):
            self._state, self._set = generator.get_state(), generator.set_state
        else:
            bits = generator.bit_generator
            self._state, self._set = bits.state, functools.partial(setattr, bits, "state")

    def restore(self) -> Any:
        self._set(self._state)
        return self._generator


def global_generators() -> list[Any]:
    """Return the generators of torch, CUDA, NumPy and Python that are used if none is given."""
    numpy = sys.modules.get("numpy")
    # A query of CUDA's state would create a context, even if nothing else uses the device
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *cuda, *([numpy.random] if numpy else ()), random]


class HostCopy:
    """Values of a tensor on the host; of a DTensor those of this rank."""

    def __init__(self, tensor: torch.Tensor) -> None:
        part = local_part(tensor)
        self.values = part.detach().to("cpu", copy=True)
        self._device = part.device
        self._make = maker_of(tensor)

    def new_tensor(self) -> torch.Tensor:
        """Return a new tensor with the values, on its own device."""
        return self._make(self.values.to(self._device, copy=True))


def has_shared_elements(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in sizes)
