"""Devices without a GPU: simulated, on paper, and replayed from a recording."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from autobatch._memory import MemoryReading, parse_bytes
from autobatch.testing.recording import Recorder, Recording, ReplayedDevice, TensorlessDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping
    from contextlib import AbstractContextManager

    from autobatch._memory import Watch

__all__ = ["PaperDevice", "Recorder", "Recording", "ReplayedDevice", "SimulatedAccelerator"]


def named_device(device: Any) -> Any:
    """Return the accelerator that a text such as "simulated:2GiB" names; anything else as it is."""
    if not isinstance(device, str) or device.partition(":")[0] != "simulated":
        return device
    try:
        return SimulatedAccelerator(device.partition(":")[2])
    except ValueError:
        raise ValueError(
            f"device={device!r} names no amount of memory; give it after the colon with its unit, as "
            "in 'simulated:2GiB'."
        ) from None


class SimulatedAccelerator:
    """Accelerator of any size on the CPU: real tensors and out-of-memory errors, exact accounting.

    Every byte of a live tensor counts; an allocation beyond the capacity raises
    `torch.OutOfMemoryError`.

    Args:
        capacity: Memory of the device, in bytes or as text such as "2GiB".
        foreign: Memory used by other processes, in bytes or as text; may be changed at any time.
        name: Name of the device in reports.

    Example:
        >>> import autobatch
        >>> from autobatch.testing import SimulatedAccelerator
        >>> report = autobatch.find(train, device=SimulatedAccelerator("2GiB"))  # doctest: +SKIP
    """

    source = "the ledger of live tensor bytes"

    def __init__(
        self, capacity: int | str, *, foreign: int | str = 0, name: str = "simulated accelerator"
    ) -> None:
        from autobatch._memory.ledger import Ledger

        self.capacity = parse_bytes("capacity", capacity)
        self.foreign = foreign
        self.name = name
        # Other libraries recognise out of memory by these words
        self.ledger = Ledger("CUDA out of memory")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[int]]:
        """Copy and pickle the device without the tensors that live on it."""
        return partial(type(self), foreign=self.foreign, name=self.name), (self.capacity,)

    @property
    def foreign(self) -> int:
        """Bytes used by other processes; may be changed at any time, also as text."""
        return self._foreign

    @foreign.setter
    def foreign(self, amount: int | str) -> None:
        self._foreign = parse_bytes("foreign", amount) if amount else 0

    def __repr__(self) -> str:
        return f"SimulatedAccelerator({self.capacity}, foreign={self.foreign})"

    def read(self) -> MemoryReading:
        """Return the present memory, by the ledger."""
        ledger = self.ledger
        return MemoryReading(
            total=self.capacity,
            used=self.foreign + ledger.current,
            reserved=ledger.current,
            peak=ledger.peak,
            failures=ledger.failures,
            allocated=ledger.peak,
            requested=ledger.peak,
        )

    @contextlib.contextmanager
    def limited(self, budget: int) -> Iterator[Watch]:
        """Charge allocations of the body; beyond `budget` or the capacity is out of memory."""
        with self.ledger.watching(min(budget, self.capacity - self.foreign), offset=0) as watch:
            yield watch

    def attach(self, *objects: Any) -> None:
        """Charge existing objects: modules, optimizers, tensors in any container."""
        self.ledger.attach(*objects)

    def release(self) -> None:
        """Do nothing: there is no cache, a tensor is freed when it dies."""

    def gpu(self) -> None:
        """Return None: predicted peaks are those of live tensors, and of no GPU's allocator."""

    def clock(self) -> float:
        """Return wall-clock seconds."""
        return time.perf_counter()


class PaperDevice(TensorlessDevice):
    """Device whose memory, speed and clock follow formulas, with a matching workload; no tensors.

    A step of batch size b holds `fixed + per_sample * b` bytes, plus all jumps up to b, plus
    `state` after the first step. It takes `seconds_per_step + seconds_per_sample * b` on the
    device's own clock.

    Args:
        capacity: Memory of the device, in bytes or as text.
        fixed: Bytes held at any batch size.
        per_sample: Bytes per sample.
        jumps: Bytes added at and above a batch size, by that size.
        state: Bytes of optimizer state, allocated at the end of the first step and kept.
        memory: Function from batch size to bytes, instead of `fixed`, `per_sample` and `jumps`.
        noise: Relative noise of the peak, uniform in ±noise.
        seed: Seed of the noise.
        foreign: Bytes used by other processes; may be changed at any time.
        seconds_per_step: Seconds of a micro-batch, without its samples.
        seconds_per_sample: Seconds that each sample adds.

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
        self.sizes_run: list[int] = []  # one entry for each start of the workload
        self._fixed = fixed
        self._per_sample = per_sample
        self._jumps = dict(jumps or {})
        self._state = state
        self._memory = memory
        self._noise = noise
        self._random = random.Random(seed)  # noqa: S311 -- not for secrets
        self._seconds_per_step = seconds_per_step
        self._seconds_per_sample = seconds_per_sample
        self._has_state = False

    def needs(self, batch_size: int) -> int:
        """Return the bytes of a step at this size, with state and without noise."""
        return self._curve(batch_size) + self._state

    def workload(self, batch_size: int, accumulate: int) -> Generator[int]:
        """Run a training loop on the device; pass this method to `autobatch.find`."""
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
        """Return the present memory, by the formulas."""
        return self._reading(self.capacity, self.foreign)

    def limited(self, budget: int) -> AbstractContextManager[None]:
        """Let the workload run out of memory beyond `budget` or the capacity."""
        return self._limited(min(budget, self.capacity - self.foreign))

    def release(self) -> None:
        """Free the memory of the last step; optimizer state stays."""
        self._held = self._state * self._has_state

    def _curve(self, batch_size: int) -> int:
        if self._memory is not None:
            return int(self._memory(batch_size))
        jumps = sum(nbytes for size, nbytes in self._jumps.items() if batch_size >= size)
        return self._fixed + self._per_sample * batch_size + jumps
