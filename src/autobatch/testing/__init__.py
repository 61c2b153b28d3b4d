"""Devices to test against without a GPU."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from typing import TYPE_CHECKING, Any

from autobatch._memory import MemoryReading, format_bytes, parse_bytes
from autobatch.testing.recording import Recorder, Recording, ReplayedDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from autobatch._memory import Watch

__all__ = [
    "PaperDevice",
    "Recorder",
    "Recording",
    "ReplayedDevice",
    "SimulatedAccelerator",
]


class SimulatedAccelerator:
    """An accelerator of any size on the CPU: real tensors, exact accounting, honest out-of-memory errors.

    Every live tensor byte counts; the allocation that would pass the capacity raises `torch.OutOfMemoryError`.

    Args:
        capacity: Memory of the device, in bytes or as text such as "2GiB".
        foreign: What other processes hold of it, in bytes or as text; may be set again at any time.
        name: What reports call it.

    Example:
        >>> import autobatch
        >>> from autobatch.testing import SimulatedAccelerator
        >>> report = autobatch.find(train, device=SimulatedAccelerator("2GiB"))  # doctest: +SKIP
    """

    source = "the ledger of live tensor bytes"

    def __init__(
        self,
        capacity: int | str,
        *,
        foreign: int | str = 0,
        name: str = "simulated accelerator",
    ) -> None:
        from autobatch._memory.ledger import Ledger

        self.capacity = parse_bytes("capacity", capacity)
        self.foreign = foreign
        self.name = name
        # Other tools know an out-of-memory error by these words
        self.ledger = Ledger("CUDA out of memory")

    @property
    def foreign(self) -> int:
        """Bytes that other processes hold; may be set again at any time, also as text."""
        return self._foreign

    @foreign.setter
    def foreign(self, amount: int | str) -> None:
        self._foreign = parse_bytes("foreign", amount) if amount else 0

    def __repr__(self) -> str:
        return f"SimulatedAccelerator({self.capacity}, foreign={self.foreign})"

    def read(self) -> MemoryReading:
        """Total, used (others' and ours), ours, the peak of ours, and the allocations refused."""
        ledger = self.ledger
        return MemoryReading(
            total=self.capacity,
            used=self.foreign + ledger.current,
            reserved=ledger.current,
            peak=ledger.peak,
            failures=ledger.failures,
        )

    @contextlib.contextmanager
    def limited(self, budget: int) -> Iterator[Watch]:
        """Charge what the body allocates; past `budget`, or past what the capacity leaves, it is out of memory."""
        with self.ledger.watching(min(budget, self.capacity - self.foreign), offset=0) as steps:
            yield steps

    def attach(self, *objects: Any) -> None:
        """Charge what already lives: modules, optimizers, tensors in any container."""
        self.ledger.attach(*objects)

    def release(self) -> None:
        """Nothing: the ledger credits a tensor when it dies, nothing is cached."""

    def clock(self) -> float:
        """Wall-clock seconds."""
        return time.perf_counter()


class PaperDevice:
    """A device on paper, with a workload to match: memory, speed and clock by formula, exact and without tensors.

    A step at batch size b holds `fixed + per_sample * b`, plus the jumps reached, plus `state` once a step was done;
    it takes `seconds_per_step + seconds_per_sample * b` on the device's own clock.

    Args:
        capacity: Memory of the device, in bytes or as text.
        fixed: Bytes held at any batch size.
        per_sample: Bytes per sample.
        jumps: Bytes added from a batch size on, by that size.
        state: Bytes that appear when the first step ends, and stay: optimizer state.
        memory: Bytes of a step by batch size, instead of `fixed`, `per_sample` and `jumps`.
        noise: Relative spread of the peak, uniform in ±noise.
        seed: Seed of the noise.
        foreign: What other processes hold, in bytes; may be set again at any time.
        seconds_per_step: Seconds of a micro-batch of no samples.
        seconds_per_sample: Seconds each sample adds.

    Example:
        >>> import autobatch
        >>> from autobatch.testing import PaperDevice
        >>> device = PaperDevice(1000, fixed=100, per_sample=8)
        >>> autobatch.find(device.workload, device=device, memory_limit=1.0).plan.micro_batch_size
        112
    """

    source = "paper"
    name = "paper device"

    def __init__(
        self,
        capacity: int | str,
        *,
        fixed: int = 0,
        per_sample: int = 1,
        jumps: Mapping[int, int] | None = None,
        state: int = 0,
        memory: Callable[[int], float] | None = None,
        noise: float = 0.0,
        seed: int = 0,
        foreign: int = 0,
        seconds_per_step: float = 1e-3,
        seconds_per_sample: float = 1e-5,
    ) -> None:
        self.capacity = parse_bytes("capacity", capacity)
        self.foreign = foreign
        self.sizes_run: list[int] = []  # in order, one entry per time the workload was started
        self._fixed = fixed
        self._per_sample = per_sample
        self._jumps = dict(jumps or {})
        self._state = state
        self._memory = memory
        self._noise = noise
        self._random = random.Random(seed)  # noqa: S311 -- not for secrets
        self._seconds_per_step = seconds_per_step
        self._seconds_per_sample = seconds_per_sample
        self._now = 0.0
        self._has_state = False
        self._held = self._peak = self._failures = 0
        self._limit: int | None = None

    def needs(self, batch_size: int) -> int:
        """Bytes of a step at this size, without noise and with the state there."""
        return self._curve(batch_size) + self._state

    def workload(self, batch_size: int, accumulate: int) -> Generator[int]:
        """A training loop on paper, to be given to `autobatch.find`."""
        self.sizes_run.append(batch_size)
        spread = 1 + self._noise * self._random.uniform(-1, 1)
        for _ in itertools.count():
            for _ in range(accumulate):
                self._hold(int(self._curve(batch_size) * spread) + self._state * self._has_state)
                self._now += self._seconds_per_step + self._seconds_per_sample * batch_size
            if not self._has_state:
                self._hold(self._state)
                self._has_state = True
            yield batch_size

    def read(self) -> MemoryReading:
        """What the formulas say."""
        return MemoryReading(
            total=self.capacity,
            used=self.foreign + self._held,
            reserved=self._held,
            peak=self._peak,
            failures=self._failures,
        )

    @contextlib.contextmanager
    def limited(self, budget: int) -> Iterator[None]:
        """Past `budget`, or past what the capacity leaves, the workload is out of memory."""
        self._limit, self._peak = min(budget, self.capacity - self.foreign), self._held
        try:
            yield
        finally:
            self._limit = None

    def attach(self, *objects: Any) -> None:
        """Nothing: there are no tensors."""

    def release(self) -> None:
        """Let go of what the last step held; the state stays."""
        self._held = self._state * self._has_state

    def clock(self) -> float:
        """Seconds on the device's own clock, which only its workload moves."""
        return self._now

    def _curve(self, batch_size: int) -> int:
        if self._memory is not None:
            return int(self._memory(batch_size))
        jumps = sum(nbytes for size, nbytes in self._jumps.items() if batch_size >= size)
        return self._fixed + self._per_sample * batch_size + jumps

    def _hold(self, nbytes: int) -> None:
        import torch

        if self._limit is not None and nbytes > self._limit:
            self._failures += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. On paper a step takes {format_bytes(nbytes)}, of {format_bytes(self._limit)}."
            )
        self._held = nbytes
        self._peak = max(self._peak, nbytes)
