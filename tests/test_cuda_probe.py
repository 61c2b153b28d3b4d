"""CudaProbe: the right device, its readings and caps, and other sources without NVML."""

from __future__ import annotations

import contextlib
import sys
import types

import pynvml
import pytest
import torch

import autobatch
from autobatch._memory.cuda import CudaProbe
from autobatch._memory.host import HostMemory
from autobatch.errors import ProbeError
from nvml_standin import CONTEXT, GIB, Card, FakeGpu, three_cards

MIB = 2**20


def others(probe: CudaProbe) -> int:
    return probe.read().foreign - CONTEXT


def searched(gpu, index=0, **options):
    """Return the report of a search on a card, in which a sample takes 16 MiB."""

    def train(batch_size):
        while True:
            with gpu.holding(index, batch_size * GIB // 64):
                yield

    return autobatch.find(train, device=f"cuda:{index}", timing_seconds=0, **options)


def device_seen(gpu, index=0):
    """Return the device in the report of a search that takes no time."""
    return searched(gpu, index, max_micro_batch_size=1).device


# The right device


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
def test_the_probe_reads_the_card_that_torch_uses(monkeypatch, visible, order, expected):
    gpu = FakeGpu(three_cards(), visible=visible, cuda_order=order).install(monkeypatch)

    devices = [device_seen(gpu, index) for index in range(len(expected))]

    assert [device.foreign // GIB for device in devices] == expected
    assert {device.source for device in devices} == {"NVML"}


def test_a_mig_instance_is_read_by_its_own_uuid(monkeypatch):
    parts = (
        Card("m1", total=10 * GIB, others=1 * GIB),
        Card("m2", total=20 * GIB, others=4 * GIB),
    )
    gpu = FakeGpu((Card("aaaa", instances=parts),), visible="MIG-m2").install(monkeypatch)

    device = device_seen(gpu)

    assert device.source == "NVML"
    assert device.total == 20 * GIB
    assert device.foreign == CONTEXT + 4 * GIB


def test_cuda_without_an_index_is_the_current_device(monkeypatch):
    gpu = FakeGpu(three_cards()).install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)

    def train(batch_size):
        with gpu.holding(2, batch_size * GIB):
            yield

    report = autobatch.find(train, device="cuda", max_micro_batch_size=1, timing_seconds=0)

    assert report.device.name == "Paper GPU (cuda:2)"


# Readings and caps


def test_memory_of_other_processes_is_read_each_time(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    probe = CudaProbe(0)
    gpu.allocate(0, 5 * GIB)
    before = probe.read()

    gpu.cards[0].others = 7 * GIB
    after = probe.read()

    assert (before.reserved, before.foreign) == (5 * GIB, CONTEXT)
    assert (after.reserved, after.foreign) == (5 * GIB, CONTEXT + 7 * GIB)
    assert after.total == 80 * GIB


def test_the_cap_of_the_allocator_equals_the_budget(monkeypatch):
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
def test_a_users_cap_is_respected_and_restored(monkeypatch, budget, error):
    card = FakeGpu().install(monkeypatch).cards[0]
    card.share = 0.5

    with contextlib.suppress(KeyError), CudaProbe(0).limited(budget):
        assert 0.0 <= card.share <= 0.5
        if error:
            raise error

    assert card.share == 0.5


def test_a_users_cap_is_reported_during_a_trial(monkeypatch):
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


def test_a_search_stays_within_the_users_cap_without_a_failure(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    gpu.cards[0].share = 0.125

    report = searched(gpu)

    assert report.budget == int(0.125 * gpu.cards[0].seen_by_cuda)
    assert all(trial.outcome != "out_of_memory" for trial in report.trials)
    assert report.plan.micro_batch_size >= 0.97 * report.budget * 64 / GIB


def test_old_torch_without_a_getter_is_left_without_a_cap(monkeypatch):
    card = FakeGpu().install(monkeypatch).cards[0]
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")

    with CudaProbe(0).limited(GIB):
        assert card.share < 1.0

    assert card.share == 1.0


def test_retries_of_the_allocator_count_as_failures(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    probe = CudaProbe(0)
    assert probe.read().failures == 0

    gpu.cards[0].retries += 2
    gpu.cards[0].ooms += 1

    reading = probe.read()
    assert (reading.failures, reading.retries, reading.refused) == (3, 2, 1)


def test_missing_statistics_are_not_failures(monkeypatch):
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


# Without NVML


NVML = "NVML failed: "
NOT_SUPPORTED = {"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED}


def failing(function, code):
    return FakeGpu((Card("aaaa", others=6 * GIB),), refusals={function: code})


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (
            failing("nvmlInitWithFlags", pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH),
            (
                f"{NVML}RM has detected an NVML/RM version mismatch (the driver was updated while it "
                "ran; restart the machine)"
            ),
        ),
        (
            failing("nvmlInitWithFlags", pynvml.NVML_ERROR_DRIVER_NOT_LOADED),
            f"{NVML}Driver Not Loaded",
        ),
        (failing("nvmlInitWithFlags", 4321), f"{NVML}error 4321 of the driver"),
        (
            failing("nvmlDeviceGetHandleByUUID", pynvml.NVML_ERROR_NOT_FOUND),
            f"{NVML}Not Found",
        ),
        (
            failing("nvmlDeviceGetHandleByUUID", pynvml.NVML_ERROR_NO_PERMISSION),
            f"{NVML}Insufficient Permissions",
        ),
        (
            FakeGpu(refusals=NOT_SUPPORTED),
            f"{NVML}Not Supported (the driver does not count the memory of this device)",
        ),
        (
            FakeGpu((Card("aaaa", is_integrated=True),), refusals=NOT_SUPPORTED),
            (
                f"{NVML}Not Supported (the driver does not count the memory of this device); no more "
                "than the free memory of the host is counted as free, because they share one memory"
            ),
        ),
        (
            FakeGpu(has_library=False),
            f"{NVML}NVML Shared Library Not Found (no libnvidia-ml.so.1 is installed)",
        ),
        (FakeGpu(lacks={"nvmlDeviceGetHandleByUUID"}), f"{NVML}Function Not Found"),
        (
            FakeGpu((Card("aaaa", instances=(Card("m1", total=79 * GIB),)),)),
            "MIG is on and CUDA_VISIBLE_DEVICES does not name an instance",
        ),
    ],
    ids=[
        *("mismatch", "no driver", "other error", "not found", "no permission"),
        *("Jetson", "unified", "no library", "old driver", "MIG"),
    ],
)
def test_a_search_without_nvml_reads_cuda_and_the_report_gives_the_reason(
    monkeypatch, machine, reason
):
    gpu = machine.install(monkeypatch)
    monkeypatch.setattr(HostMemory, "read", lambda: HostMemory(60 * GIB, None))

    report = searched(gpu, memory_limit="2GiB")

    assert report.device.source == f"torch.cuda.mem_get_info, because {reason}"
    assert report.device.total == gpu.cards[0].seen_by_cuda
    assert any(f"Memory is read from {report.device.source}" in note for note in report.notes)
    assert 125 <= report.plan.micro_batch_size <= 128


def test_an_integrated_device_has_the_free_memory_of_the_host(
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


def test_an_integrated_device_is_read_directly_if_the_host_is_unknown(
    monkeypatch,
):
    card = Card("aaaa", total=128 * GIB, is_integrated=True)
    FakeGpu((card,)).install(monkeypatch)
    monkeypatch.setattr(HostMemory, "read", lambda: HostMemory(None, None))

    assert others(CudaProbe(0)) == 0


def test_processes_are_listed_with_their_memory(monkeypatch):
    card = Card("aaaa", processes={41: 3 * GIB, 42: None, 77: 5})
    FakeGpu((card,)).install(monkeypatch)

    assert CudaProbe(0).processes() == {41: 3 * GIB, 42: None, 77: 5}


def test_an_idle_device_lists_no_processes(monkeypatch):
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
def test_memory_is_read_even_if_processes_cannot_be_listed(monkeypatch, machine):
    machine.install(monkeypatch)
    probe = CudaProbe(0)
    before = probe.source

    assert probe.processes() is None
    assert probe.source == before
    assert others(probe) == 0


def test_a_search_with_nvml_has_no_note_about_it(monkeypatch):
    gpu = FakeGpu(three_cards(), visible="GPU-bb", cuda_order=(2, 1, 0)).install(monkeypatch)

    report = searched(gpu, memory_limit="2GiB")

    assert report.device.source == "NVML"
    assert not any("Memory is read from" in note for note in report.notes)


def test_nvml_is_used_for_cards_without_mig(monkeypatch):
    refusals = {"nvmlDeviceGetMigMode": pynvml.NVML_ERROR_NOT_SUPPORTED}

    assert device_seen(FakeGpu(refusals=refusals).install(monkeypatch)).source == "NVML"


def test_cuda_replaces_nvml_for_good_after_a_failure(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    probe = CudaProbe(0)
    assert probe.source == "NVML"

    gpu.refusals["nvmlDeviceGetMemoryInfo"] = pynvml.NVML_ERROR_GPU_IS_LOST
    probe.read()
    gpu.refusals.clear()

    assert probe.read().total == gpu.cards[0].seen_by_cuda
    assert probe.source == "torch.cuda.mem_get_info, because NVML failed: GPU is lost"


def test_nvml_is_not_used_if_its_total_differs(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    properties = types.SimpleNamespace(
        name="Paper GPU", total_memory=40 * GIB, uuid=gpu.cards[0].uuid
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)

    assert device_seen(gpu).source == (
        "torch.cuda.mem_get_info, because NVML's total is 80 GiB but CUDA's is 40 GiB"
    )


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "pynvml cannot be imported"),
        (types.ModuleType("pynvml"), "the module pynvml is not the one from nvidia-ml-py"),
    ],
    ids=["none", "another"],
)
def test_cuda_replaces_nvml_without_its_module(monkeypatch, module, reason):
    gpu = FakeGpu().install(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", module)

    assert device_seen(gpu).source == f"torch.cuda.mem_get_info, because {reason}"


def test_without_any_source_the_error_gives_both_reasons(
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
        autobatch.find(lambda batch_size: None, device="cuda:0")


def test_a_lost_gpu_raises_a_probe_error(monkeypatch):
    gpu = FakeGpu().install(monkeypatch)
    probe = CudaProbe(0)

    gpu.lose()

    with pytest.raises(ProbeError, match=r"unspecified launch failure; NVML failed: GPU is lost\."):
        probe.read()


def test_a_gpu_lost_in_a_trial_ends_the_search(monkeypatch):
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
        autobatch.find(train, device="cuda:0")

    assert gpu.cards[0].share == 1.0


def test_a_device_error_is_not_hidden_by_a_failed_restore_of_the_cap(
    monkeypatch,
):
    FakeGpu().install(monkeypatch)
    probe = CudaProbe(0)

    def fail(share, index):
        raise RuntimeError("CUDA error: device-side assert triggered (again)")

    with pytest.raises(RuntimeError, match=r"assert triggered$"), probe.limited(GIB):
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fail)
        raise RuntimeError("CUDA error: device-side assert triggered")


def test_an_allocator_without_statistics_is_refused(monkeypatch):
    FakeGpu().install(monkeypatch)

    def refuse(index):
        raise RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats")

    monkeypatch.setattr(torch.cuda, "memory_stats", refuse)

    with pytest.raises(ProbeError, match=r"has no statistics for .* Pass device="):
        autobatch.find(lambda batch_size: None, device="cuda:0")


@pytest.mark.parametrize(
    "share", [lambda index: 2.0**64 / (80 * GIB), "refuses"], ids=["async", "refuses"]
)
def test_an_allocator_without_caps_is_left_without_a_cap(monkeypatch, share):
    card = FakeGpu().install(monkeypatch).cards[0]

    def refuse(index):
        raise RuntimeError("not supported")

    name = "get_per_process_memory_fraction"
    monkeypatch.setattr(torch.cuda, name, refuse if share == "refuses" else share)

    with CudaProbe(0).limited(GIB):
        assert card.share < 1.0

    assert card.share == 1.0


def test_an_allocation_rejected_before_the_driver_is_a_failure(monkeypatch):
    FakeGpu().install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda index: {"num_oom_rejections": 2})

    assert CudaProbe(0).read().failures == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_machine_without_cuda_refuses_a_cuda_probe(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    with pytest.raises(ProbeError, match=r"cuda:0 cannot be opened: .*Pass device="):
        autobatch.find(lambda batch_size: None, device="cuda:0")
