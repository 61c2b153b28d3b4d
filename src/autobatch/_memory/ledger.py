"""Ledger: bytes of live tensors, counted by a dispatch mode."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import torch

# The dispatch mode and the switch that disables it have no public name in torch 2.13
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from autobatch._memory import format_bytes
from autobatch._memory.in_place import InPlaceSums
from autobatch._memory.storages import (
    address_of,
    is_divided,
    sizes_in,
    storages_in,
    storages_of,
    tensors_of,
)
from autobatch._undo import patched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ENCODER_LAYER: Final = torch.ops.aten._transformer_encoder_layer_fwd.default
# Most sizes to keep: operators with new numbers, such as a step count, would add them without end
_MOST_SIZES: Final = 20_000


def unobserved() -> contextlib.AbstractContextManager[None]:
    """Run the body without dispatch modes: copies by autobatch are not the user's memory."""
    if not torch._C._len_torch_dispatch_stack():
        return contextlib.nullcontext()  # in a tenth of the time
    return _disable_current_modes()


def eager() -> contextlib.AbstractContextManager[Any]:
    """Keep compiled modules eager: if first called under a dispatch mode, they never compile."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


class StepProfile:
    """Bytes held after each allocation of the last complete step."""

    def __init__(self, offset: int) -> None:
        self._offset = offset  # bytes added to every value
        self._complete: list[int] | None = None
        self._running: list[int] = []

    def mark(self) -> None:
        self._complete, self._running = self._running, []

    def add(self, nbytes: int) -> None:
        self._running.append(nbytes + self._offset)

    @property
    def profile(self) -> tuple[int, ...]:
        return tuple(self._running if self._complete is None else self._complete)


@dataclass(slots=True)
class _Entry:
    """One live storage."""

    nbytes: int  # charged
    ref: weakref.ref[torch.UntypedStorage]  # whose callback credits its death


class _Sum(NamedTuple):
    """A result that takes the place of one of its terms, if that dies before the next operator."""

    key: int
    entry: _Entry
    terms: set[int]  # addresses of storages of the same size


class Ledger:
    """Bytes of live tensor storages, from allocation to death, on real tensors of any device.

    Each new storage that an operator returns while `watching` is charged, and each storage
    attached. Views and in-place results share a storage and count once, and so do sums that are
    written in place without a ledger, and storages that FSDP empties and fills. Memory that a
    kernel allocates and frees in one operator is not seen, nor are tensors of another process.
    `current` and `peak` are bytes, `failures` counts refused allocations.

    Args:
        message: First words of its out-of-memory errors, by which other libraries recognise them.
    """

    # Bytes that an operator allocates, by its signature, which alone decides them on any device
    _sizes: ClassVar[dict[Any, int | None]] = {}

    def __init__(self, message: str = "out of memory") -> None:
        self._message = message
        self.current = 0
        self.peak = 0
        self.failures = 0
        self.allocations = 0  # since watching began
        # Number of one allocation to refuse, once: tests inject out of memory anywhere with it
        self.refuse_at: int | None = None
        self._limit: int | None = None
        self._entries: dict[int, _Entry] = {}
        self._profile = StepProfile(0)
        self._in_place = InPlaceSums()
        self._sum: _Sum | None = None  # not charged yet
        # Re-entrant: a storage may die, and call back, while an entry is being written
        self._lock = threading.RLock()

    def attach(self, *objects: Any) -> None:
        """Charge existing tensors: of modules, gradients, optimizer states and containers."""
        for tensor in tensors_of(objects):
            for storage in storages_of(tensor):
                self._enter(storage)

    @contextlib.contextmanager
    def watching(self, limit: int | None, offset: int) -> Iterator[StepProfile]:
        """Charge allocations of this thread from a fresh peak; more than `limit` is out of memory.

        `offset` is added to every value of the profile, for probes that count more than tensors.
        """
        try:
            self._limit, self.peak, self.allocations = limit, self.current, 0
            self._profile = StepProfile(offset)
            with eager(), self._seeing_resizes(), _Mode(self):
                yield self._profile
                self._settle()
        finally:
            self._limit = None

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator and charge its result; refuse it beforehand if it would not fit."""
        self._settle()
        is_in_place = self._in_place.recognises(func)
        if self._limit is not None and not is_in_place and _may_allocate(func):
            # Before it runs: an absurd request must not take down the host
            expected = self._expected(func, args, kwargs)
            if expected and self.current + expected > self._limit:
                raise self._refusal(expected)
        with _autocast_of(func):
            result = func(*args, **kwargs)
        arguments: dict[int, int] | None = None  # collected only if needed
        for storage in storages_in(result):
            if storage.device.type == "meta":
                continue  # no memory
            if address_of(storage) not in self._entries:
                arguments = sizes_in((args, *kwargs.values())) if arguments is None else arguments
                if address_of(storage) in arguments:
                    continue  # a view of data that was never attached
            if not is_in_place or not self._await_term(storage, arguments or {}):
                self._charge(storage)
        return result

    @contextlib.contextmanager
    def _seeing_resizes(self) -> Iterator[None]:
        """In the body, charge storages of this thread that are emptied and filled again.

        FSDP does so with the parameters that it gathers, and no dispatch mode sees it.
        """
        thread, resize = threading.get_ident(), torch.UntypedStorage.resize_

        def charged_resize(storage: torch.UntypedStorage, nbytes: int) -> Any:
            if threading.get_ident() != thread:
                return resize(storage, nbytes)
            self._settle()
            entry = self._entries.get(address_of(storage))
            growth = nbytes - (entry.nbytes if entry else storage.nbytes())
            if growth > 0:
                self._check_growth(growth)
            is_known = entry is not None or not storage.nbytes()  # otherwise it was never attached
            result = resize(storage, nbytes)
            if growth and is_known and storage.device.type != "meta":
                self._enter(storage)
                if growth > 0:
                    self._profile.add(self.current)
            return result

        with patched(torch.UntypedStorage, resize_=charged_resize):
            yield

    def _await_term(self, storage: torch.UntypedStorage, arguments: dict[int, int]) -> bool:
        """Enter a sum without a charge if one of its terms has its size, and may die now."""
        key, nbytes = address_of(storage), storage.nbytes()
        terms = {term for term, size in arguments.items() if size == nbytes}
        if key in self._entries or not terms.intersection(self._entries):
            return False
        with self._lock:
            self._entries[key] = entry = self._entry(storage)
            self._sum = _Sum(key, entry, terms)
        return True

    def _settle(self) -> None:
        """Charge the latest sum, if all its terms have lived on."""
        with self._lock:
            awaited, self._sum = self._sum, None
            storage = awaited.entry.ref() if awaited else None
            if awaited is None or storage is None:
                return
            del self._entries[awaited.key]
        self._charge(storage)

    def _entry(self, storage: torch.UntypedStorage) -> _Entry:
        ref = weakref.ref(storage, partial(self._credit, address_of(storage)))
        return _Entry(storage.nbytes(), ref)

    def _enter(self, storage: torch.UntypedStorage) -> int:
        """Enter a storage at its present size, and return the bytes it grew by."""
        key, nbytes = address_of(storage), storage.nbytes()
        with self._lock:
            entry = self._entries.get(key)
            growth = nbytes - (entry.nbytes if entry else 0)
            if entry is None:
                self._entries[key] = self._entry(storage)
            else:
                entry.nbytes = nbytes
            self.current += growth
            self.peak = max(self.peak, self.current)
        return growth

    def _charge(self, storage: torch.UntypedStorage) -> None:
        """Enter an allocation, or refuse it beyond the limit."""
        entry = self._entries.get(address_of(storage))
        growth = storage.nbytes() - (entry.nbytes if entry else 0)
        if growth > 0:
            self._check_growth(growth)
        if growth:
            self._enter(storage)
            self._profile.add(self.current)

    def _check_growth(self, growth: int) -> None:
        """Count an allocation, and refuse it beyond the limit."""
        self.allocations += 1
        if self._is_refused(growth):
            raise self._refusal(growth)

    def _is_refused(self, growth: int) -> bool:
        if self.allocations == self.refuse_at:
            self.refuse_at = None
            return True
        return self._limit is not None and self.current + growth > self._limit

    def _credit(self, key: int, ref: weakref.ref[torch.UntypedStorage]) -> None:
        with self._lock:
            entry = self._entries.get(key)
            # A younger storage at the same address has another reference
            if entry is None or entry.ref is not ref:
                return
            del self._entries[key]
            awaited = self._sum
            if awaited is not None and key == awaited.key:
                self._sum = None  # never charged
            elif awaited is not None and key in awaited.terms:
                self._sum = None
                self._hand_over(key, awaited.key)
            else:
                self._release(key, entry.nbytes)

    def _hand_over(self, term: int, total: int) -> None:
        """Let a sum have the memory of one of its terms."""

    def _release(self, key: int, nbytes: int) -> None:  # noqa: ARG002
        """Credit a storage that has died."""
        self.current -= nbytes

    def _refusal(self, wanted: int) -> torch.OutOfMemoryError:
        self.failures += 1
        if self._limit is None:
            return torch.OutOfMemoryError(
                f"{self._message}. Tried to allocate {format_bytes(wanted)}."
            )
        free = max(self._limit - self.current, 0)
        return torch.OutOfMemoryError(
            f"{self._message}. Tried to allocate {format_bytes(wanted)}; "
            f"{format_bytes(free)} of a limit of {format_bytes(self._limit)} is free."
        )

    def _expected(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> int | None:
        """Bytes an operator will allocate, from a run on the meta device; None if unknown."""
        try:
            key = (func, _signature(args), _signature(tuple(sorted(kwargs.items()))))
            if key in self._sizes:
                return self._sizes[key]
        except TypeError:  # an argument that cannot be hashed
            return None
        if len(self._sizes) >= _MOST_SIZES:
            self._sizes.clear()
        self._sizes[key] = size = _size_on_meta(func, args, kwargs)
        return size


class _Mode(TorchDispatchMode):
    """Pass every operator of this thread to the ledger."""

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
            # A DataLoader worker forked while the mode was on: memory of another process
            return func(*args, **(kwargs or {}))
        return self._ledger.run(func, args, kwargs or {})


@cache
def _may_allocate(func: Callable[..., Any]) -> bool:
    """Return whether a run on the meta device can show what an operator allocates."""
    returns = func._schema.returns  # type: ignore[attr-defined]
    if all(value.alias_info is not None for value in returns):
        return False  # views and in-place operators allocate nothing
    if "c10d" in func.namespace:  # type: ignore[attr-defined]
        return False  # a collective on the meta device would be a collective
    # A run on the meta device would draw random numbers too
    return torch.Tag.nondeterministic_seeded not in func.tags  # type: ignore[attr-defined]


def _autocast_of(func: Callable[..., Any]) -> contextlib.AbstractContextManager[Any]:
    """Let autocast act within an operator as it does without a dispatch mode.

    A mode runs below autocast, which then leaves out operators that a kernel calls. Nearly all such
    kernels are cast as a whole before; under CPU autocast torch 2.13 takes this one, of a
    `TransformerEncoderLayer` in eval mode, which is not.
    """
    if func is not _ENCODER_LAYER:
        return contextlib.nullcontext()
    # The state of the thread on entry to the operator has no public name
    with torch._C._RestorePythonTLSSnapshot():  # type: ignore[attr-defined]
        excluded = torch._C._dispatch_tls_local_exclude_set()
    included = torch._C._dispatch_tls_local_include_set()
    guard: contextlib.AbstractContextManager[Any] = torch._C._ForceDispatchKeyGuard(
        included, excluded
    )
    return guard


def _size_on_meta(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int | None:
    try:
        with unobserved(), torch.no_grad():
            result = func(*_on_meta(args), **_on_meta(kwargs))
    except Exception:
        # No meta kernel, or a shape that depends on data: charged after the operator has run
        return None
    return sum(sizes_in(result).values())


def _signature(value: Any) -> Any:
    """Properties of an argument that decide the size of the result; TypeError if there are none."""
    if isinstance(value, torch.Tensor):
        if value.is_nested or is_divided(value):
            raise TypeError  # it has no shape, or that of all ranks together
        layout = value.stride() if value.layout is torch.strided else value.layout
        return (value.shape, layout, value.dtype, value.requires_grad)
    if isinstance(value, (list, tuple)):
        return tuple(map(_signature, value))
    if isinstance(value, dict):
        return tuple((key, _signature(item)) for key, item in value.items())
    if isinstance(value, torch.Generator):
        return None
    hash(value)
    return type(value), value  # 2, 2.0 and True are equal, but their results differ in type


def _on_meta(value: Any) -> Any:
    """Return an argument without its data."""
    if isinstance(value, torch.Tensor):
        if value.dim() == 0:
            return value  # scalars mix with meta tensors, and some operators read their value
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
