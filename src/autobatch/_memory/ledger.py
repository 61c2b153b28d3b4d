"""Ledger: bytes of live tensors, counted by a dispatch mode."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

# The dispatch mode and its off-switch have no public home; read from torch 2.13.
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from autobatch._memory import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


def unobserved() -> contextlib.AbstractContextManager[None]:
    """Run the body with every dispatch mode off: our own bookkeeping is not the user's memory."""
    return _disable_current_modes()


def eager() -> contextlib.AbstractContextManager[Any]:
    """Keep compiled modules eager: one first called under a dispatch mode stays uncompiled for good."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


class _Entry:
    """One live storage: the bytes charged for it, and the reference that tells of its death."""

    __slots__ = ("nbytes", "ref")

    def __init__(self, nbytes: int, ref: weakref.ref[torch.UntypedStorage]) -> None:
        self.nbytes = nbytes
        self.ref = ref


class Ledger:
    """Follows tensor storages from allocation to death, on real tensors of any device.

    Charged is each new storage that an operator returns while `watching`, and what was attached. Views and in-place
    results share a storage and count once. Memory that a kernel takes and gives back inside one operator is not seen,
    nor are tensors made in another process. `current` and `peak` are bytes, `failures` counts refused allocations.

    Args:
        says: How its errors begin, by which others know what they are about.
    """

    def __init__(self, says: str = "out of memory") -> None:
        self._says = says
        self.current = 0
        self.peak = 0
        self.failures = 0
        self.allocations = 0  # since watching began
        # This allocation is refused, once: how tests let memory run out anywhere
        self.refuse_at: int | None = None
        self._limit: int | None = None
        self._entries: dict[int, _Entry] = {}
        self._sizes: dict[Any, int | None] = {}
        self._steps: list[list[int]] = [[]]
        # Re-entrant, because a storage may die, and report it, while an entry is being written.
        self._lock = threading.RLock()

    def attach(self, *objects: Any) -> None:
        """Charge what lives already: modules with gradients, optimizers with state, tensors in any container."""
        for tensor in _tensors_of(objects):
            for storage in _storages(tensor):
                self._enter(storage)

    @contextlib.contextmanager
    def watching(self, limit: int | None, offset: int) -> Iterator[_Steps]:
        """Charge what this thread allocates, from a fresh peak; raise out-of-memory past `limit` bytes.

        `offset` is added to every number of the profile, for probes that count more than tensors.
        """
        self._limit, self.peak, self.allocations = limit, self.current, 0
        self._steps = [[]]
        try:
            with eager(), _Mode(self):
                yield _Steps(self, offset)
        finally:
            self._limit = None

    def mark(self) -> None:
        """A new step begins."""
        self._steps = [*self._steps[-1:], []]

    @property
    def last_step(self) -> list[int]:
        """Bytes after each allocation between the last two marks."""
        return self._steps[0]

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator and charge what it allocates, having refused what would not fit."""
        if self._limit is not None:
            # Asked before it is run: an absurd request must not take the host down with it.
            expected = self._expected(func, args, kwargs)
            if expected and self.current + expected > self._limit:
                raise self._refusal(expected)
        result = func(*args, **kwargs)
        given: set[int] | None = None
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            for storage in _storages(tensor):
                if _key(storage) not in self._entries:
                    given = _identities((args, kwargs)) if given is None else given
                    if _key(storage) in given:
                        continue
                self._charge(storage)
        return result

    def _enter(self, storage: torch.UntypedStorage) -> int:
        """Note a storage at its present size; the bytes it grew by."""
        key, nbytes = _key(storage), storage.nbytes()
        with self._lock:
            entry = self._entries.get(key)
            growth = nbytes - (entry.nbytes if entry else 0)
            if entry is None:
                ref = weakref.ref(storage, partial(self._credit, key))
                self._entries[key] = _Entry(nbytes, ref)
            else:
                entry.nbytes = nbytes
            self.current += growth
            self.peak = max(self.peak, self.current)
        return growth

    def _charge(self, storage: torch.UntypedStorage) -> None:
        """Note what an operator allocated; refuse it where it passes the limit."""
        entry = self._entries.get(_key(storage))
        growth = storage.nbytes() - (entry.nbytes if entry else 0)
        if growth > 0:
            self.allocations += 1
            if self._is_refused(growth):
                raise self._refusal(growth)
        if growth:
            self._enter(storage)
            self._steps[-1].append(self.current)

    def _is_refused(self, growth: int) -> bool:
        if self.allocations == self.refuse_at:
            self.refuse_at = None
            return True
        return self._limit is not None and self.current + growth > self._limit

    def _credit(self, key: int, ref: weakref.ref[torch.UntypedStorage]) -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.ref is ref:
                # Not a younger storage at a reused address
                del self._entries[key]
                self.current -= entry.nbytes

    def _refusal(self, wanted: int) -> torch.OutOfMemoryError:
        self.failures += 1
        if self._limit is None:
            return torch.OutOfMemoryError(
                f"{self._says}. Tried to allocate {format_bytes(wanted)}."
            )
        free = max(self._limit - self.current, 0)
        return torch.OutOfMemoryError(
            f"{self._says}. Tried to allocate {format_bytes(wanted)}, of a limit of {format_bytes(self._limit)} "
            f"{format_bytes(free)} is free."
        )

    def _expected(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> int | None:
        """Bytes an operator will return, found on the meta device and remembered; None where only running it tells."""
        returns = func._schema.returns  # type: ignore[attr-defined]
        if not returns or all(value.alias_info is not None for value in returns):
            return 0  # views and in-place operators allocate nothing
        if torch.Tag.nondeterministic_seeded in func.tags:  # type: ignore[attr-defined]
            return None  # asked twice it would draw twice
        try:
            key = (func, _signature(args), _signature(tuple(sorted(kwargs.items()))))
            if key in self._sizes:
                return self._sizes[key]
        except TypeError:  # an argument that can not be hashed
            return None
        self._sizes[key] = size = _size_on_meta(func, args, kwargs)
        return size


class _Steps:
    """What a probe hands to the trial: where steps begin, and the profile of the last one."""

    def __init__(self, ledger: Ledger, offset: int) -> None:
        self._ledger = ledger
        self._offset = offset

    def mark(self) -> None:
        self._ledger.mark()

    @property
    def profile(self) -> tuple[int, ...]:
        return tuple(nbytes + self._offset for nbytes in self._ledger.last_step)


class _Mode(TorchDispatchMode):
    """Shows the ledger every operator of this thread."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ledger = ledger
        self._process = os.getpid()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if os.getpid() != self._process:
            # A DataLoader worker, forked while the mode was on: not our memory
            return func(*args, **(kwargs or {}))
        return self._ledger.run(func, args, kwargs or {})


def _tensors_of(objects: Iterable[Any]) -> Iterator[torch.Tensor]:
    for thing in objects:
        if isinstance(thing, torch.nn.Module):
            for parameter in thing.parameters():
                yield parameter
                if parameter.grad is not None:
                    yield parameter.grad
            yield from thing.buffers()
        elif isinstance(thing, torch.optim.Optimizer):
            yield from _tensors_of(tree_leaves(list(thing.state.values())))
        else:
            yield from (leaf for leaf in tree_leaves(thing) if isinstance(leaf, torch.Tensor))


def _key(storage: torch.UntypedStorage) -> int:
    """What two handles of one storage have in common: its address."""
    return int(storage._cdata)  # torch 2.13 has no public name for it


def _storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """Every storage behind a tensor: several where it wraps others or is sparse, none where it is opaque."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(
        type(tensor), "__tensor_flatten__"
    ):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from _storages(getattr(tensor, name))
    elif torch.nn.parameter.is_lazy(tensor):
        return  # no memory yet
    elif tensor.layout is torch.strided:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return  # functorch wrappers and opaque tensors have none to show: there is nothing to count
        yield storage
    elif tensor.layout is torch.sparse_coo:
        yield from _storages(tensor._indices())
        yield from _storages(tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from _storages(tensor.crow_indices())
        yield from _storages(tensor.col_indices())
        yield from _storages(tensor.values())


def _identities(values: Any) -> set[int]:
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return {_key(storage) for tensor in tensors for storage in _storages(tensor)}


def _size_on_meta(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int | None:
    try:
        with unobserved(), torch.no_grad():
            result = func(*_on_meta(args), **_on_meta(kwargs))
    except Exception:
        # No meta kernel, or a shape that depends on data: charged after the fact
        return None
    tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
    return sum(
        {
            _key(storage): storage.nbytes() for tensor in tensors for storage in _storages(tensor)
        }.values()
    )


def _signature(value: Any) -> Any:
    """What of an argument decides the size of the result; TypeError where it can not be hashed."""
    if isinstance(value, torch.Tensor):
        layout = value.stride() if value.layout is torch.strided else value.layout
        return (value.shape, layout, value.dtype, value.requires_grad)
    if isinstance(value, (list, tuple)):
        return tuple(map(_signature, value))
    if isinstance(value, dict):
        return tuple((key, _signature(item)) for key, item in value.items())
    if isinstance(value, torch.Generator):
        return None
    hash(value)
    return type(value), value  # 2, 2.0 and True are equal, and make results of different types


def _on_meta(value: Any) -> Any:
    """An argument without its data."""
    if isinstance(value, torch.Tensor):
        if value.dim() == 0:
            return value  # scalars mix with meta tensors, and some operators read them
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, torch.Generator):
        return None
    if isinstance(value, dict):
        return {key: _on_meta(item) for key, item in value.items() if key != "pin_memory"}
    if type(value) in (list, tuple):
        return type(value)(map(_on_meta, value))
    return value
