"""Laws of every memory probe, and the choice of a probe for a device."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

from autobatch import MemoryReading
from autobatch._memory.cuda import CudaProbe
from autobatch._memory.detect import detect
from autobatch._memory.host import HostProbe
from autobatch._memory.oom import is_oom
from autobatch.errors import ProbeError
from autobatch.testing import (
    PaperDevice,
    Recorder,
    Recording,
    ReplayedDevice,
    SimulatedAccelerator,
)
from autobatch.testing.recording import Run
from nvml_standin import GIB, FakeGpu, tensor_on, three_cards

if TYPE_CHECKING:
    from collections.abc import Callable

    from autobatch import MemoryProbe

MIB = 2**20
CPU = torch.device("cpu")


# Laws of every probe


@dataclass
class Case:
    """A probe, and a context manager that holds bytes on its device."""

    probe: MemoryProbe
    holding: Callable[[int], contextlib.AbstractContextManager[None]]


def host(monkeypatch):
    return Case(HostProbe(), lambda nbytes: tensor_on("cpu", nbytes))


def cuda_on_paper(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    return Case(CudaProbe(0), lambda nbytes: gpu.holding(0, nbytes))


def real_cuda(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return Case(CudaProbe(0), lambda nbytes: tensor_on("cuda:0", nbytes))


def simulated(monkeypatch):
    device = SimulatedAccelerator("4GiB", foreign="1MiB")
    return Case(device, lambda nbytes: tensor_on("cpu", nbytes))


def recorder(monkeypatch):
    return Case(Recorder(SimulatedAccelerator("4GiB")), lambda nbytes: tensor_on("cpu", nbytes))


def paper(monkeypatch):
    device = PaperDevice("4GiB", per_sample=1)
    return Case(device, lambda nbytes: step_on(device, nbytes))


def replayed(monkeypatch):
    before = MemoryReading(total=4 * GIB, used=0, reserved=0, peak=0, failures=0)
    after = MemoryReading(total=4 * GIB, used=GIB, reserved=GIB, peak=GIB, failures=0)
    run = Run(GIB, 1, 2 * GIB, before, after, steps=1, step_seconds=None)
    device = ReplayedDevice(Recording("paper", "paper", "paper", 1.0, {}, (run,)))
    return Case(device, lambda nbytes: step_on(device, nbytes))


@contextlib.contextmanager
def step_on(device, nbytes):
    """One step of a workload whose samples take one byte each."""
    try:
        next(device.workload(nbytes, 1))
        yield
    finally:
        device.release()


PROBES = (
    host,
    simulated,
    recorder,
    paper,
    replayed,
    cuda_on_paper,
    pytest.param(real_cuda, marks=[pytest.mark.gpu, pytest.mark.filterwarnings("default")]),
)


@pytest.fixture(params=PROBES)
def case(request, monkeypatch):
    made = request.param(monkeypatch)
    made.probe.release()
    return made


def test_readings_are_whole_bytes_and_not_negative(case):
    reading = case.probe.read()

    for value in (
        reading.total,
        reading.used,
        reading.reserved,
        reading.peak,
        reading.failures,
    ):
        assert type(value) is int
        assert value >= 0
    assert reading.used <= reading.total
    assert reading.foreign <= reading.used


def test_a_probe_has_a_name_and_a_source(case):
    assert case.probe.name
    assert case.probe.source


def test_a_peak_includes_memory_held_before_the_trial(case):
    held = case.probe.read().reserved

    with case.probe.limited(held + 256 * MIB):
        pass

    # The kernel counts a process's pages in batches
    assert case.probe.read().peak >= held - MIB


def test_a_peak_includes_memory_freed_since(case):
    held = case.probe.read().reserved

    with case.probe.limited(held + 1024 * MIB), case.holding(512 * MIB):
        pass

    # Free parts of the host's heap, which other tests leave, count as used: tens of MiB
    assert 512 * MIB <= case.probe.read().peak - held + MIB <= 640 * MIB


def test_each_trial_has_its_own_peak(case):
    held = case.probe.read().reserved
    with case.probe.limited(held + 1024 * MIB), case.holding(512 * MIB):
        pass
    case.probe.release()

    held = case.probe.read().reserved
    with case.probe.limited(held + 1024 * MIB), case.holding(16 * MIB):
        pass

    assert case.probe.read().peak < held + 256 * MIB


def test_exceeding_the_budget_is_out_of_memory_and_a_failure(case):
    before = case.probe.read()

    with (
        pytest.raises(torch.OutOfMemoryError) as caught,
        case.probe.limited(before.reserved + 32 * MIB),
        case.holding(64 * MIB),
    ):
        pass

    assert is_oom(caught.value)
    assert case.probe.read().failures > before.failures


def test_a_budget_below_held_memory_allows_no_allocation(case):
    with (
        pytest.raises(torch.OutOfMemoryError),
        case.probe.limited(-1),
        case.holding(64 * MIB),
    ):
        pass


@pytest.mark.parametrize(
    "error", [KeyError("user"), torch.OutOfMemoryError("user"), KeyboardInterrupt()]
)
def test_the_limit_ends_with_the_trial_after_any_error(case, error):
    held = case.probe.read().reserved

    with pytest.raises(type(error)), case.probe.limited(held + 32 * MIB):
        raise error

    with case.holding(64 * MIB):
        pass
    with case.probe.limited(held + 256 * MIB), case.holding(64 * MIB):
        pass


def test_a_clock_does_not_run_backwards(case):
    first, second = case.probe.clock(), case.probe.clock()

    assert isinstance(first, float)
    assert first <= second


def test_attach_and_release_can_be_repeated(case):
    model = torch.nn.Linear(4, 4)

    case.probe.attach(model, torch.optim.SGD(model.parameters()), [torch.ones(3)])
    case.probe.release()
    case.probe.release()

    assert case.probe.read().total > 0


# Which device


def test_a_probe_is_returned_unchanged():
    probe = HostProbe()

    assert detect(probe, CPU) is probe


@pytest.mark.parametrize("device", [None, "cpu", "cpu:0", CPU])
def test_the_cpu_is_read_by_the_host_probe(device):
    assert isinstance(detect(device, CPU), HostProbe)


@pytest.mark.parametrize(
    ("device", "index"),
    [
        (None, 1),
        ("cuda", 0),
        ("cuda:0", 0),
        ("cuda:2", 2),
        (torch.device("cuda", 1), 1),
        ("cpu", None),
    ],
)
def test_a_name_or_the_default_selects_the_device(monkeypatch, device, index):
    FakeGpu(three_cards()).install(monkeypatch)

    probe = detect(device, torch.device("cuda", 1))

    assert probe.name == ("host memory" if index is None else f"Paper GPU (cuda:{index})")


@pytest.mark.parametrize(
    "device",
    ["cuda:3", torch.device("cuda:3"), "gpu", "", "cuda:x", "GPU-bbbb", 3, 1.5, object],
)
def test_a_missing_device_is_refused_with_a_list_of_devices(monkeypatch, device):
    FakeGpu(three_cards()).install(monkeypatch)

    with pytest.raises(
        ValueError,
        match=r"^device=.*; this process sees cpu, cuda:0, cuda:1, cuda:2\.$",
    ) as caught:
        detect(device, CPU)

    assert (str(device) if isinstance(device, torch.device) else repr(device)) in str(caught.value)


def test_cuda_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    with pytest.raises(
        ValueError, match=r"^device='cuda' does not exist; this process sees cpu\.$"
    ):
        detect("cuda", CPU)


@pytest.mark.parametrize("device", ["mps", "xpu:0", torch.device("meta")])
def test_other_kinds_of_device_need_a_probe(device):
    with pytest.raises(
        ProbeError,
        match=rf"device='{device}', only of cpu and cuda\. Pass device= a MemoryProbe",
    ):
        detect(device, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.filterwarnings("default")
def test_nvml_and_cuda_agree_on_a_real_card(monkeypatch):
    torch.ones(1, device="cuda:0")
    by_nvml = CudaProbe(0)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    by_cuda = CudaProbe(0)

    assert by_nvml.source == "NVML"
    assert by_nvml.read().total == pytest.approx(by_cuda.read().total, rel=0.05)
    assert by_nvml.read().foreign == pytest.approx(by_cuda.read().foreign, abs=2 * GIB)
