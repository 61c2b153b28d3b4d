"""Devices for tests of CUDA: a real one, or one on paper that counts tensors on the CPU.

`CudaProbe` reads both through the real `pynvml` and `torch.cuda`. On paper the driver library and
torch's allocator are models, with torch's rules for segments and the cache, and a GiB is 256 KiB: a
test that passes there works, but proves nothing about CUDA.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from autobatch._memory.cuda import CudaProbe, _mig_instance
from nvml_standin import Card, FakeGpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

GIB_ON_PAPER = 2**18  # bytes


@dataclass(frozen=True)
class Place:
    """Device for tests.

    Args:
        device: Device of its tensors.
        gib: Bytes that stand for one GiB.
        width: Width of the test network.
        probe: Probe of the device.
        neighbour: Context manager of another process that allocates; yields the bytes of its context.
        held: Function that returns the bytes of live tensors.
    """

    device: str
    gib: int
    width: int
    probe: CudaProbe
    neighbour: Callable[[int], contextlib.AbstractContextManager[int]]
    held: Callable[[], int]

    @property
    def is_real(self) -> bool:
        return self.device != "cpu"

    def bytes(self, gib: float) -> int:
        return int(gib * self.gib)

    def tensor(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def network(self) -> nn.Module:
        """Return a perceptron with BatchNorm and dropout."""
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(self.width // 4, self.width),
            nn.BatchNorm1d(self.width),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(self.width, 16),
        ).to(self.device)

    def samples(self, count: int) -> torch.Tensor:
        return torch.randn(count, self.width // 4, device=self.device)


@contextlib.contextmanager
def on_paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    card = Card("aaaa-0", total=80 * GIB_ON_PAPER, context=GIB_ON_PAPER // 2)
    gpu = FakeGpu((card,)).install(monkeypatch)

    @contextlib.contextmanager
    def neighbour(nbytes: int) -> Iterator[int]:
        card.others += card.context + nbytes
        yield card.context
        card.others -= card.context + nbytes

    with gpu.allocating(0, mib=GIB_ON_PAPER // 1024):
        yield Place(
            "cpu",
            GIB_ON_PAPER,
            64,
            CudaProbe(0),
            neighbour,
            held=card.allocated,
        )


@contextlib.contextmanager
def on_cuda() -> Iterator[Place]:
    device = "cuda:0"
    gc.collect()  # a Trainer of the previous test may still hold tensors
    torch.cuda.empty_cache()
    _warm_up(device)
    yield Place(
        device,
        2**30,
        4096,
        CudaProbe(0),
        _process,
        held=lambda: torch.cuda.memory_allocated(device),
    )
    torch.cuda.empty_cache()


def _warm_up(device: str) -> None:
    """Create handles and workspaces of CUDA libraries, for this thread and for that of autograd."""
    x = torch.randn(64, 64, device=device, requires_grad=True)
    (x @ x).sum().backward()
    torch.cuda.synchronize()


# Program of another process: creates a context, allocates, and waits for the end of its input
_NEIGHBOUR = """
import sys, pynvml, torch
pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByUUID(sys.argv[1])
free = pynvml.nvmlDeviceGetMemoryInfo(handle).free
held = torch.empty(512, dtype=torch.uint8, device="cuda:0")
torch.cuda.synchronize()
taken = free - pynvml.nvmlDeviceGetMemoryInfo(handle).free
context = taken - torch.cuda.memory_reserved()
held = torch.empty(int(sys.argv[2]), dtype=torch.uint8, device="cuda:0")
torch.cuda.synchronize()
print(context + torch.cuda.memory_reserved() - held.numel(), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def _process(nbytes: int) -> Iterator[int]:
    whole = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    uuid = _mig_instance(0) or whole
    with subprocess.Popen(
        [sys.executable, "-c", _NEIGHBOUR, uuid, str(nbytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    ) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(60)
