from __future__ import annotations

import contextlib
import sys
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pynvml
import pytest
import torch

import autobatch
from autobatch._memory.cuda import CudaProbe
from autobatch._memory.detect import detect
from autobatch._memory.host import HostMemory, HostProbe
from autobatch._memory.oom import is_oom
from autobatch.errors import ProbeError
from autobatch.testing import SimulatedAccelerator
from nvml_standin import CONTEXT, GIB, Card, FakeGpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from autobatch._memory import MemoryProbe

MIB = 2**20
CPU = torch.device("cpu")


# Laws of every probe


@dataclass
class Case:
    """A probe, and how to hold bytes on its device for a while."""

    probe: MemoryProbe
    holding: Callable[[int], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def tensor_on(device, nbytes):
    tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    yield
    del tensor


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


PROBES = (
    host,
    simulated,
    cuda_on_paper,
    pytest.param(real_cuda, marks=[pytest.mark.gpu, pytest.mark.filterwarnings("default")]),
)


@pytest.fixture(params=PROBES)
def case(request, monkeypatch):
    made = request.param(monkeypatch)
    made.probe.release()
    return made


def test_a_reading_is_whole_bytes_none_of_them_negative(case):
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


def test_a_probe_says_what_it_is_and_where_its_readings_come_from(case):
    assert case.probe.name
    assert case.probe.source


def test_a_peak_is_no_less_than_what_was_held_when_the_trial_began(case):
    held = case.probe.read().reserved

    with case.probe.limited(held + 256 * MIB):
        pass

    # The kernel counts a process's pages in batches
    assert case.probe.read().peak >= held - MIB


def test_a_peak_shows_what_was_held_and_let_go(case):
    held = case.probe.read().reserved

    with case.probe.limited(held + 256 * MIB), case.holding(64 * MIB):
        pass

    assert 64 * MIB <= case.probe.read().peak - held + MIB <= 80 * MIB


def test_each_trial_has_its_own_peak(case):
    held = case.probe.read().reserved
    with case.probe.limited(held + 256 * MIB), case.holding(128 * MIB):
        pass
    case.probe.release()

    held = case.probe.read().reserved
    with case.probe.limited(held + 256 * MIB), case.holding(16 * MIB):
        pass

    assert case.probe.read().peak < held + 64 * MIB


def test_past_the_budget_is_out_of_memory_and_counts_as_a_failure(case):
    before = case.probe.read()

    with (
        pytest.raises(torch.OutOfMemoryError) as caught,
        case.probe.limited(before.reserved + 32 * MIB),
        case.holding(64 * MIB),
    ):
        pass

    assert is_oom(caught.value)
    assert case.probe.read().failures > before.failures


def test_a_budget_below_what_is_held_lets_nothing_more_in(case):
    with (
        pytest.raises(torch.OutOfMemoryError),
        case.probe.limited(-1),
        case.holding(64 * MIB),
    ):
        pass


@pytest.mark.parametrize(
    "error", [KeyError("user"), torch.OutOfMemoryError("user"), KeyboardInterrupt()]
)
def test_the_limit_ends_with_the_trial_however_it_ends(case, error):
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


def test_attaching_and_releasing_do_no_harm(case):
    model = torch.nn.Linear(4, 4)

    case.probe.attach(model, torch.optim.SGD(model.parameters()), [torch.ones(3)])
    case.probe.release()
    case.probe.release()

    assert case.probe.read().total > 0


# CUDA, and the right device of it


def three_cards():
    """Told apart by what others hold of them."""
    return tuple(
        Card(uuid, others=i * GIB)
        for i, uuid in enumerate(("aaaa-1111", "bbbb-2222", "bbcc-3333"), start=1)
    )


def others(probe: CudaProbe) -> int:
    return probe.read().foreign - CONTEXT


@pytest.mark.parametrize(
    ("visible", "order", "expected"),
    [
        (None, None, [1, 2, 3]),
        ("0,1,2", None, [1, 2, 3]),
        ("2,1,0", None, [3, 2, 1]),
        ("1", None, [2]),
        (None, (1, 0, 2), [2, 1, 3]),
        ("0,2", (1, 2, 0), [2, 1]),
        ("GPU-bbbb-2222,GPU-aaaa-1111", None, [2, 1]),
        ("GPU-bbc,GPU-aa", None, [3, 1]),
        ("GPU-bbc,GPU-aa", (2, 1, 0), [3, 1]),
    ],
    ids=[
        "unset",
        "indices",
        "reversed",
        "one",
        "order",
        "order and indices",
        "uuids",
        "abbreviated",
        "both",
    ],
)
def test_the_card_that_is_read_is_the_one_torch_uses(monkeypatch, visible, order, expected):
    FakeGpu(three_cards(), visible=visible, cuda_order=order).install(monkeypatch)

    probes = [CudaProbe(index) for index in range(len(expected))]

    assert [others(probe) // GIB for probe in probes] == expected
    assert {probe.source for probe in probes} == {"NVML"}


def test_a_mig_instance_is_read_by_its_own_uuid(monkeypatch):
    parts = (
        Card("m1", total=10 * GIB, others=1 * GIB),
        Card("m2", total=20 * GIB, others=4 * GIB),
    )
    FakeGpu((Card("aaaa", instances=parts),), visible="MIG-m2").install(monkeypatch)

    probe = CudaProbe(0)

    assert probe.source == "NVML"
    assert probe.read().total == 20 * GIB
    assert others(probe) == 4 * GIB


def test_a_card_cut_by_mig_is_not_trusted_where_no_instance_is_named(monkeypatch):
    gpu = FakeGpu((Card("aaaa", instances=(Card("m1", total=79 * GIB),)),)).install(monkeypatch)
    monkeypatch.setattr(FakeGpu, "devices", [gpu.cards[0].instances[0]])

    probe = CudaProbe(0)

    assert (
        probe.source
        == "torch.cuda.mem_get_info, because MIG is on and CUDA_VISIBLE_DEVICES does not name an instance"
    )
    assert probe.read().total == gpu.devices[0].seen_by_cuda


def test_none_is_the_current_device(monkeypatch):
    FakeGpu(three_cards()).install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)

    assert CudaProbe(None).name == "Paper GPU (cuda:2)"


# CUDA, and what is read of it


def test_what_others_hold_is_used_less_reserved_and_read_again_each_time(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    probe = CudaProbe(0)
    gpu.allocate(0, 5 * GIB)
    before = probe.read()

    gpu.cards[0].others = 7 * GIB
    after = probe.read()

    assert (before.reserved, before.foreign) == (5 * GIB, CONTEXT)
    assert (after.reserved, after.foreign) == (5 * GIB, CONTEXT + 7 * GIB)
    assert after.total == 80 * GIB


def test_the_cap_is_the_budget_as_torch_counts_the_device(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    card = gpu.cards[0]

    with CudaProbe(0).limited(10 * GIB):
        assert card.share * card.seen_by_cuda == pytest.approx(10 * GIB)
        gpu.allocate(0, 10 * GIB - MIB)
        with pytest.raises(torch.OutOfMemoryError):
            gpu.allocate(0, 2 * MIB)

    assert card.share == 1.0


@pytest.mark.parametrize("budget", [1 * GIB, 79 * GIB, 200 * GIB, 0, -GIB])
@pytest.mark.parametrize("error", [None, KeyError("user")])
def test_a_cap_of_the_users_is_kept_and_put_back(monkeypatch, budget, error):
    card = FakeGpu().install(monkeypatch).cards[0]
    card.share = 0.5

    with contextlib.suppress(KeyError), CudaProbe(0).limited(budget):
        assert 0.0 <= card.share <= 0.5
        if error:
            raise error

    assert card.share == 0.5


def test_a_cap_of_the_users_is_read_also_while_a_trial_has_one_of_its_own(monkeypatch):
    card = FakeGpu().install(monkeypatch).cards[0]
    probe = CudaProbe(0)
    uncapped = probe.read().cap
    card.share = 0.5

    before = probe.read().cap
    with probe.limited(GIB):
        during = probe.read().cap
    after = probe.read().cap

    assert uncapped is None
    assert before == during == after == pytest.approx(card.seen_by_cuda / 2, abs=1)


def test_a_search_stays_within_the_users_cap_without_running_into_it(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    gpu.cards[0].share = 0.125

    def train(batch_size):
        while True:
            with gpu.holding(0, batch_size * GIB // 64):
                yield

    report = autobatch.find(train, device=CudaProbe(0))

    assert report.budget == int(0.125 * gpu.cards[0].seen_by_cuda)
    assert all(trial.outcome != "out_of_memory" for trial in report.trials)
    assert report.plan.micro_batch_size >= 0.97 * report.budget * 64 / GIB


def test_a_torch_that_can_not_tell_its_cap_is_left_without_one(monkeypatch):
    card = FakeGpu().install(monkeypatch).cards[0]
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")

    with CudaProbe(0).limited(GIB):
        assert card.share < 1.0

    assert card.share == 1.0


def test_an_allocator_that_had_to_retry_shows_as_failures(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    probe = CudaProbe(0)
    assert probe.read().failures == 0

    gpu.cards[0].retries += 2
    gpu.cards[0].ooms += 1

    reading = probe.read()
    assert (reading.failures, reading.retries, reading.refused) == (3, 2, 1)


def test_statistics_that_do_not_exist_yet_are_no_failures(monkeypatch):
    FakeGpu().install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda index: {})

    reading = CudaProbe(0).read()

    assert (reading.reserved, reading.peak, reading.failures) == (0, 0, 0)


def test_the_clock_waits_for_its_own_device(monkeypatch):
    FakeGpu(three_cards()).install(monkeypatch)
    waited_for = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited_for.append)

    CudaProbe(1).clock()

    assert waited_for == [1]


def test_nvml_is_opened_once_per_probe(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    probe = CudaProbe(0)

    probe.read()
    probe.read()

    assert gpu.calls["nvmlInitWithFlags"] == 1


# CUDA, where NVML is no help


@pytest.mark.parametrize(
    ("function", "code", "said"),
    [
        (
            "nvmlInitWithFlags",
            pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
            "RM has detected an NVML/RM version mismatch (the driver was updated while it ran; restart the machine)",
        ),
        ("nvmlInitWithFlags", pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "Driver Not Loaded"),
        ("nvmlInitWithFlags", 4321, "error 4321 of the driver"),
        ("nvmlDeviceGetHandleByUUID", pynvml.NVML_ERROR_NOT_FOUND, "Not Found"),
        (
            "nvmlDeviceGetHandleByUUID",
            pynvml.NVML_ERROR_NO_PERMISSION,
            "Insufficient Permissions",
        ),
        (
            "nvmlDeviceGetMemoryInfo",
            pynvml.NVML_ERROR_NOT_SUPPORTED,
            "Not Supported (the driver does not count the memory of this device)",
        ),
    ],
)
def test_where_nvml_refuses_cuda_is_asked_and_the_source_says_why(
    monkeypatch, function, code, said
):
    gpu = FakeGpu((Card("aaaa", others=6 * GIB),), refusals={function: code}).install(monkeypatch)

    probe = CudaProbe(0)

    assert probe.source == f"torch.cuda.mem_get_info, because NVML failed: {said}"
    assert probe.read().total == gpu.cards[0].seen_by_cuda
    assert others(probe) == 6 * GIB


def test_without_the_drivers_library_cuda_is_asked(monkeypatch):
    FakeGpu(has_library=False).install(monkeypatch)

    assert CudaProbe(0).source == (
        "torch.cuda.mem_get_info, because NVML failed: NVML Shared Library Not Found (no libnvidia-ml.so.1 is installed)"
    )


def test_a_driver_that_is_too_old_to_know_a_function_is_not_asked_for_it(monkeypatch):
    FakeGpu(lacks={"nvmlDeviceGetHandleByUUID"}).install(monkeypatch)

    assert CudaProbe(0).source == (
        "torch.cuda.mem_get_info, because NVML failed: Function Not Found"
    )


def test_a_device_that_shares_the_hosts_memory_has_no_more_than_the_host_has_left(
    monkeypatch,
):
    card = Card("aaaa", total=128 * GIB, others=4 * GIB, is_integrated=True)
    refusals = {"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED}
    FakeGpu((card,), refusals=refusals).install(monkeypatch)
    left = HostMemory(available=30 * GIB, shared=None)
    monkeypatch.setattr(HostMemory, "read", lambda: left)

    probe = CudaProbe(0)
    reading = probe.read()

    assert reading.total - reading.used == 30 * GIB
    assert "Not Supported" in probe.source
    assert probe.source.endswith("because they share one memory")


def test_where_the_host_does_not_say_what_it_has_left_the_device_is_believed(
    monkeypatch,
):
    card = Card("aaaa", total=128 * GIB, is_integrated=True)
    FakeGpu((card,)).install(monkeypatch)
    monkeypatch.setattr(HostMemory, "read", lambda: HostMemory(None, None))

    assert others(CudaProbe(0)) == 0


def test_the_processes_on_a_device_are_told_with_what_each_holds(monkeypatch):
    card = Card("aaaa", processes={41: 3 * GIB, 42: None, 77: 5})
    FakeGpu((card,)).install(monkeypatch)

    assert CudaProbe(0).processes() == {41: 3 * GIB, 42: None, 77: 5}


def test_a_device_without_processes_has_none(monkeypatch):
    FakeGpu().install(monkeypatch)

    assert CudaProbe(0).processes() == {}


@pytest.mark.parametrize(
    "machine",
    [
        FakeGpu(has_library=False),
        FakeGpu(lacks={"nvmlDeviceGetComputeRunningProcesses_v3"}),
        FakeGpu(
            refusals={"nvmlDeviceGetGraphicsRunningProcesses_v3": pynvml.NVML_ERROR_NO_PERMISSION}
        ),
    ],
    ids=["no library", "old driver", "no permission"],
)
def test_where_nvml_tells_of_no_processes_memory_is_read_all_the_same(monkeypatch, machine):
    machine.install(monkeypatch)
    probe = CudaProbe(0)
    before = probe.source

    assert probe.processes() is None
    assert probe.source == before
    assert others(probe) == 0


def cut_without_an_instance():
    return FakeGpu((Card("aaaa", instances=(Card("m1", total=79 * GIB),)),))


NOT_SUPPORTED = {"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED}


@pytest.mark.parametrize(
    ("machine", "word"),
    [
        (FakeGpu(has_library=False), "no libnvidia-ml.so.1 is installed"),
        (
            FakeGpu(refusals={"nvmlInitWithFlags": pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH}),
            "the driver was updated while it ran; restart the machine",
        ),
        (FakeGpu(lacks={"nvmlDeviceGetHandleByUUID"}), "Function Not Found"),
        (FakeGpu(refusals=NOT_SUPPORTED), "does not count the memory of this device"),
        (
            FakeGpu((Card("aaaa", is_integrated=True),), refusals=NOT_SUPPORTED),
            "because they share one memory",
        ),
        (cut_without_an_instance(), "CUDA_VISIBLE_DEVICES does not name an instance"),
    ],
    ids=["library", "mismatch", "old", "Jetson", "unified", "MIG"],
)
def test_a_search_without_nvml_works_and_its_report_says_why(monkeypatch, machine, word):
    gpu = machine.install(monkeypatch)
    monkeypatch.setattr(HostMemory, "read", lambda: HostMemory(60 * GIB, None))

    def train(batch_size):
        while True:
            with gpu.holding(0, batch_size * GIB // 64):
                yield

    report = autobatch.find(train, device=CudaProbe(0), memory_limit="2GiB")

    (note,) = (note for note in report.notes if note.startswith("Memory is read from"))
    assert "torch.cuda.mem_get_info, because" in note
    assert word in note
    assert 125 <= report.plan.micro_batch_size <= 128
    assert report.device.source in note


def test_where_nvml_answers_the_report_has_no_need_to_say_so(monkeypatch):
    gpu = FakeGpu(three_cards(), visible="GPU-bb", cuda_order=(2, 1, 0))
    gpu.install(monkeypatch)

    def train(batch_size):
        while True:
            with gpu.holding(0, batch_size * GIB // 64):
                yield

    report = autobatch.find(train, device=CudaProbe(0), memory_limit="2GiB")

    assert report.device.source == "NVML"
    assert not any("Memory is read from" in note for note in report.notes)


def test_where_mig_is_unknown_to_a_card_nvml_is_still_used(monkeypatch):
    refusals = {"nvmlDeviceGetMigMode": pynvml.NVML_ERROR_NOT_SUPPORTED}
    FakeGpu(refusals=refusals).install(monkeypatch)

    assert CudaProbe(0).source == "NVML"


def test_where_nvml_fails_later_cuda_is_asked_from_then_on(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    probe = CudaProbe(0)
    assert probe.source == "NVML"

    gpu.refusals["nvmlDeviceGetMemoryInfo"] = pynvml.NVML_ERROR_GPU_IS_LOST
    probe.read()
    gpu.refusals.clear()

    assert probe.read().total == gpu.cards[0].seen_by_cuda
    assert probe.source == "torch.cuda.mem_get_info, because NVML failed: GPU is lost"


def test_where_nvml_counts_another_total_it_is_not_believed(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    properties = types.SimpleNamespace(
        name="Paper GPU", total_memory=40 * GIB, uuid=gpu.cards[0].uuid
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)

    assert (
        CudaProbe(0).source
        == "torch.cuda.mem_get_info, because NVML's total is 80 GiB but CUDA's is 40 GiB"
    )


def test_where_pynvml_is_missing_cuda_is_asked(monkeypatch):
    FakeGpu().install(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", None)

    assert CudaProbe(0).source == "torch.cuda.mem_get_info, because pynvml cannot be imported"


def test_a_module_that_only_has_pynvmls_name_is_not_used(monkeypatch):
    FakeGpu().install(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", types.ModuleType("pynvml"))

    source = CudaProbe(0).source

    assert (
        source
        == "torch.cuda.mem_get_info, because the module pynvml is not the one from nvidia-ml-py"
    )


def test_where_neither_can_be_read_the_error_says_both_reasons_and_the_way_out(
    monkeypatch,
):
    FakeGpu(
        refusals={
            "nvmlInitWithFlags": pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
            "mem_get_info": "CUDA error: not permitted\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1",
        }
    ).install(monkeypatch)

    with pytest.raises(
        ProbeError,
        match=r"cuda:0 cannot be read: CUDA error: not permitted; NVML failed: Driver Not Loaded\. Pass device=",
    ):
        CudaProbe(0)


def test_a_gpu_that_disappears_is_told_as_what_it_is(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    probe = CudaProbe(0)

    gpu.lose()

    with pytest.raises(ProbeError, match=r"unspecified launch failure; NVML failed: GPU is lost\."):
        probe.read()


def test_a_gpu_that_disappears_in_a_trial_ends_the_search_with_a_sentence(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    sizes = []

    def train(batch_size):
        sizes.append(batch_size)
        while True:
            with gpu.holding(0, batch_size * GIB // 64):
                if len(sizes) == 2:
                    gpu.lose()
            yield

    with pytest.raises(ProbeError, match="GPU is lost"):
        autobatch.find(train, device=CudaProbe(0))

    assert gpu.cards[0].share == 1.0


def test_an_error_of_the_device_is_not_hidden_by_a_cap_that_can_not_be_put_back(
    monkeypatch,
):
    FakeGpu().install(monkeypatch)
    probe = CudaProbe(0)

    def fail(share, index):
        raise RuntimeError("CUDA error: device-side assert triggered (again)")

    with pytest.raises(RuntimeError, match=r"assert triggered$"), probe.limited(GIB):
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fail)
        raise RuntimeError("CUDA error: device-side assert triggered")


def test_an_allocator_that_keeps_no_count_is_refused_with_the_way_out(monkeypatch):
    FakeGpu().install(monkeypatch)

    def refuse(index):
        raise RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats")

    monkeypatch.setattr(torch.cuda, "memory_stats", refuse)

    with pytest.raises(ProbeError, match=r"has no statistics for .* Pass device="):
        CudaProbe(0)


@pytest.mark.parametrize(
    "told", [lambda index: 2.0**64 / (80 * GIB), "refuses"], ids=["async", "refuses"]
)
def test_an_allocator_that_knows_no_cap_is_left_without_one(monkeypatch, told):
    card = FakeGpu().install(monkeypatch).cards[0]

    def refuse(index):
        raise RuntimeError("not supported")

    name = "get_per_process_memory_fraction"
    monkeypatch.setattr(torch.cuda, name, refuse if told == "refuses" else told)

    with CudaProbe(0).limited(GIB):
        assert card.share < 1.0

    assert card.share == 1.0


def test_an_allocation_that_is_refused_ahead_of_the_driver_is_a_failure(monkeypatch):
    FakeGpu().install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda index: {"num_oom_rejections": 2})

    assert CudaProbe(0).read().failures == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_machine_without_cuda_has_no_cuda_probe():
    with pytest.raises(ProbeError, match=r"cuda:0 cannot be opened: .*Pass device="):
        CudaProbe(0)


# The host


def machine(root, *, total=1000, available=600, anonymous=50, shared=10, groups="", files=()):
    """A made-up tree of kernel files; amounts in KiB, as the kernel writes them there."""
    contents = {
        "proc/meminfo": f"MemTotal: {total} kB\nMemFree: 5 kB\nMemAvailable:    {available} kB\n",
        "proc/self/status": f"VmRSS:\t900 kB\nRssAnon:\t {anonymous} kB\nRssFile:\t 840 kB\nRssShmem:\t {shared} kB\n",
        "proc/self/cgroup": groups,
        **dict(files),
    }
    for path, text in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def group(path, *, limit, usage, cache=0):
    """A control group of version 2, in KiB."""
    directory = f"sys/fs/cgroup/{path}".rstrip("/")
    limit = limit if limit == "max" else limit * 1024
    return {
        f"{directory}/memory.max": f"{limit}\n",
        f"{directory}/memory.current": f"{usage * 1024}\n",
        f"{directory}/memory.stat": f"anon 1\ninactive_file {cache * 1024}\nactive_file 77\n",
    }


def old_group(path, *, limit, usage, cache=0):
    """A control group of version 1, in KiB."""
    directory = f"sys/fs/cgroup/memory/{path}".rstrip("/")
    return {
        f"{directory}/memory.limit_in_bytes": f"{limit * 1024}\n",
        f"{directory}/memory.usage_in_bytes": f"{usage * 1024}\n",
        f"{directory}/memory.stat": f"inactive_file 99\ntotal_inactive_file {cache * 1024}\n",
    }


def test_without_control_groups_the_host_is_what_the_kernel_says(tmp_path):
    probe = HostProbe(machine(tmp_path))

    reading = probe.read()

    assert (reading.total, reading.used, reading.reserved) == (
        1000 * 1024,
        400 * 1024,
        60 * 1024,
    )
    assert probe.source == str(tmp_path / "proc/meminfo")


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/box/job\n", group("box/job", limit=300, usage=200, cache=80)),
        (
            "0::/box/job\n",
            group("box", limit=300, usage=200, cache=80) | group("box/job", limit="max", usage=90),
        ),
        (
            "0::/box/job\n",
            group("box", limit=300, usage=200, cache=80) | group("box/job", limit=900, usage=90),
        ),
        ("0::/\n", group("", limit=300, usage=200, cache=80)),
        ("0::/../../box\n", group("box", limit=300, usage=200, cache=80)),
        (
            "9:cpu:/x\n4:memory:/box/job\n0::/\n",
            old_group("box/job", limit=300, usage=200, cache=80),
        ),
        (
            "4:hugetlb,memory:/box/job\n",
            old_group("box", limit=300, usage=200, cache=80),
        ),
        (
            "4:memory:/docker/not-visible-in-here\n",
            old_group("", limit=300, usage=200, cache=80),
        ),
    ],
    ids=[
        "own",
        "parent",
        "tighter parent",
        "namespace",
        "outside",
        "version 1",
        "version 1 parent",
        "version 1 box",
    ],
)
def test_the_tightest_control_group_on_the_path_is_the_host(tmp_path, groups, files):
    probe = HostProbe(machine(tmp_path, groups=groups, files=files))

    reading = probe.read()

    assert reading.total == 300 * 1024
    assert reading.used == 120 * 1024, "cache that can be reclaimed is not used"
    assert probe.source.startswith("the memory limit of control group /")


def test_a_control_group_wider_than_the_machine_changes_nothing(tmp_path):
    probe = HostProbe(
        machine(tmp_path, groups="0::/job\n", files=group("job", limit=5000, usage=100))
    )

    assert probe.read().total == 1000 * 1024
    assert probe.source == str(tmp_path / "proc/meminfo")


def test_a_control_group_has_no_more_to_give_than_the_machine_has_left(tmp_path):
    files = group("job", limit=300, usage=100)
    probe = HostProbe(machine(tmp_path, available=50, groups="0::/job\n", files=files))

    reading = probe.read()

    assert reading.total - reading.used == 50 * 1024


def test_a_kernel_that_does_not_tell_pages_apart_is_asked_for_the_resident_set(
    tmp_path,
):
    root = machine(tmp_path)
    (root / "proc/self/status").write_text("VmPeak:\t 999 kB\nVmRSS:\t 70 kB\n")

    assert HostProbe(root).read().reserved == 70 * 1024


@pytest.mark.parametrize(
    ("missing", "unknown"),
    [
        ("proc/meminfo", "how much memory there is"),
        ("proc/self/status", "this process holds"),
    ],
)
def test_a_system_without_proc_is_an_error_with_a_way_out(tmp_path, missing, unknown):
    (machine(tmp_path) / missing).unlink()

    with pytest.raises(
        ProbeError,
        match=rf"{missing} does not say .*{unknown}.* Pass device= a MemoryProbe",
    ):
        HostProbe(tmp_path)


def test_the_hosts_peak_is_its_size_when_the_trial_began_and_what_tensors_added(
    tmp_path,
):
    root = machine(tmp_path, anonymous=5000, shared=0)
    probe = HostProbe(root)
    model = torch.nn.Linear(8, 8)
    probe.attach(model)
    assert probe.read().peak == 5000 * 1024

    with probe.limited(6000 * 1024) as watch:
        watch.mark()
        with tensor_on("cpu", 400 * 1024):
            machine(root, anonymous=9000, shared=0)
        watch.mark()

    assert probe.read().peak == (5000 + 400) * 1024
    assert watch.profile == ((5000 + 400) * 1024,)


def test_what_was_attached_counts_once_against_the_hosts_budget(tmp_path):
    probe = HostProbe(machine(tmp_path, anonymous=5000, shared=0))
    kept = torch.zeros(3000 * 1024, dtype=torch.uint8)
    probe.attach(kept)

    with probe.limited(5500 * 1024), tensor_on("cpu", 500 * 1024):
        pass
    with (
        pytest.raises(torch.OutOfMemoryError),
        probe.limited(5500 * 1024),
        tensor_on("cpu", 501 * 1024),
    ):
        pass


def test_freed_heap_is_given_back_only_where_the_c_library_can(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: types.SimpleNamespace())

    HostProbe().release()


# Which device


def test_a_probe_passes_through():
    probe = HostProbe()

    assert detect(probe, CPU) is probe


@pytest.mark.parametrize("device", [None, "cpu", "cpu:0", CPU])
def test_the_cpu_is_the_host(device):
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
def test_a_name_or_the_default_decides_the_device(monkeypatch, device, index):
    FakeGpu(three_cards()).install(monkeypatch)

    probe = detect(device, torch.device("cuda", 1))

    assert probe.name == ("host memory" if index is None else f"Paper GPU (cuda:{index})")


@pytest.mark.parametrize(
    "device",
    ["cuda:3", torch.device("cuda:3"), "gpu", "", "cuda:x", "GPU-bbbb", 3, 1.5, object],
)
def test_a_device_that_does_not_exist_is_refused_with_what_does(monkeypatch, device):
    FakeGpu(three_cards()).install(monkeypatch)

    with pytest.raises(
        ValueError,
        match=r"^device=.*; this process sees cpu, cuda:0, cuda:1, cuda:2\.$",
    ) as caught:
        detect(device, CPU)

    assert (str(device) if isinstance(device, torch.device) else repr(device)) in str(caught.value)


def test_without_a_gpu_cuda_does_not_exist(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    with pytest.raises(
        ValueError, match=r"^device='cuda' does not exist; this process sees cpu\.$"
    ):
        detect("cuda", CPU)


@pytest.mark.parametrize("device", ["mps", "xpu:0", torch.device("meta")])
def test_a_device_of_another_kind_needs_a_probe_of_the_users(device):
    with pytest.raises(
        ProbeError,
        match=rf"device='{device}', only of cpu and cuda\. Pass device= a MemoryProbe",
    ):
        detect(device, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.filterwarnings("default")
def test_a_real_card_is_read_by_nvml_and_by_cuda_alike(monkeypatch):
    torch.ones(1, device="cuda:0")
    by_nvml = CudaProbe(0)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    by_cuda = CudaProbe(0)

    assert by_nvml.source == "NVML"
    assert by_nvml.read().total == pytest.approx(by_cuda.read().total, rel=0.05)
    assert by_nvml.read().foreign == pytest.approx(by_cuda.read().foreign, abs=2 * GIB)
