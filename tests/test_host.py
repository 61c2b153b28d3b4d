"""Host memory: available memory, the copy of a snapshot, and prefetched batches."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import autobatch
from autobatch._memory.host import HostMemory
from autobatch._trials.snapshot import Snapshot
from kernel_files import machine
from sameness import same

GIB, MIB, KIB = 2**30, 2**20, 2**10


# Available memory


def test_available_memory_is_read_from_the_kernel(tmp_path):
    assert HostMemory.read(machine(tmp_path)).available == 600 * KIB


def test_memory_is_unknown_without_kernel_files(tmp_path):
    assert HostMemory.read(tmp_path) == HostMemory(available=None, shared=None)


def test_shared_memory_is_the_size_of_its_file_system(tmp_path):
    (tmp_path / "dev/shm").mkdir(parents=True)
    status = os.statvfs(tmp_path)

    assert HostMemory.read(tmp_path).shared == status.f_frsize * status.f_blocks


# Size of a snapshot


def test_the_estimate_counts_parameters_buffers_gradients_and_state_once():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10))
    tied = nn.ModuleList([model, model[0]])
    optimizer = torch.optim.AdamW(model.parameters())
    weights, buffers = 120 * 4, 20 * 4 + 8

    assert Snapshot.bytes_of(tied, optimizer) == weights + buffers
    model(torch.zeros(2, 10)).sum().backward()
    assert Snapshot.bytes_of(tied, optimizer) == 2 * weights + buffers
    optimizer.step()
    state = 2 * weights + 3 * 4  # two averages, and a count for each parameter
    assert Snapshot.bytes_of(tied, optimizer) == 2 * weights + buffers + state


def test_lazy_and_meta_tensors_count_nothing():
    lazy, empty = nn.LazyLinear(3), nn.Linear(1000, 1000, device="meta")
    sparse = nn.Embedding(1000, 10, sparse=True)
    sparse(torch.tensor([1])).sum().backward()

    assert Snapshot.bytes_of(lazy, empty, "text") == 0
    assert Snapshot.bytes_of(sparse) == 1000 * 10 * 4


# In a Trainer

lightning = pytest.importorskip("lightning_here")
loaders = pytest.importorskip("autobatch.lightning._trainer_notes")


@pytest.fixture
def host(monkeypatch):
    """Set the memory of the host."""

    def has(*, available=10**12, shared=10**12):
        memory = HostMemory(available, shared)
        monkeypatch.setattr(HostMemory, "read", classmethod(lambda _: memory))

    return has


def test_a_copy_too_large_for_the_host_is_refused_beforehand(host):
    host(available=10 * KIB)
    model, loader, callback = (
        lightning.Model(),
        lightning.plain(),
        lightning.tuner(),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.raises(
        autobatch.AutobatchError,
        match=r"on the host: 21 KiB, where 10 KiB are available\. Free host memory",
    ) as caught:
        lightning.quiet_trainer(callback).fit(model, loader)

    assert "\n" not in str(caught.value)
    assert same(before, dict(model.state_dict()))
    assert (model.sizes, loader.batch_size, callback.report) == ([], 4, None)


def test_ranks_of_a_machine_share_host_memory(host):
    host(available=10 * MIB)
    things = [nn.Linear(1000, 1000, bias=False)]

    assert loaders.checked_copy_bytes(things, 2) == 4 * 10**6
    with pytest.raises(
        autobatch.AutobatchError, match=r"host: 3\.8 MiB on each of 3 ranks, where 10"
    ):
        loaders.checked_copy_bytes(things, 3)


def test_nothing_is_refused_if_host_memory_is_unknown(host):
    host(available=None, shared=None)
    callback = lightning.tuner()

    lightning.quiet_trainer(callback).fit(lightning.Model(), lightning.plain())

    assert callback.report.plan.effective_batch_size == 120


def test_a_copy_of_more_than_a_gibibyte_is_noted():
    assert loaders.copy_note(GIB, 1) is None
    assert loaders.copy_note(3 * GIB, 1) == (
        "To restore everything, tuning kept a copy of parameters, buffers, gradients and optimizer state on the "
        "host: 3 GiB."
    )
    assert "host: 3 GiB on each of 2 ranks." in loaders.copy_note(3 * GIB, 2)


def test_a_large_copy_is_noted_in_the_report(monkeypatch):
    monkeypatch.setattr(loaders, "_NOTED_COPY", 20 * KIB)
    callback = lightning.tuner()

    lightning.quiet_trainer(callback).fit(lightning.Model(), lightning.plain())

    assert any("on the host: 21 KiB." in note for note in callback.report.notes)


def test_batches_too_large_for_shared_memory_are_noted(host):
    host(shared=64 * MIB)
    loader = SimpleNamespace(num_workers=4, prefetch_factor=2)

    note = loaders.prefetch_note(loader, 512, 12 * GIB // 10 // 512, 1)

    assert note == (
        "num_workers=4 × prefetch_factor=2 × batches of 512 (1.2 GiB each) would need 9.6 GiB of shared memory, and "
        "/dev/shm has 64 MiB: lower one of the two, or enlarge it (docker run --shm-size)."
    )


def test_batches_too_large_for_the_host_are_noted(host):
    host(available=GIB)
    loader = SimpleNamespace(num_workers=4, prefetch_factor=2)

    note = loaders.prefetch_note(loader, 128, MIB, 2)

    assert note == (
        "num_workers=4 × prefetch_factor=2 × batches of 128 (128 MiB each) would need 1 GiB of host memory on each of "
        "2 ranks, and 1 GiB are available: lower one of the two."
    )
    assert loaders.prefetch_note(loader, 128, MIB, 1) is None


def test_a_loader_without_workers_prefetches_nothing(host):
    host(available=1, shared=1)

    loader = SimpleNamespace(num_workers=0, prefetch_factor=None)

    assert loaders.prefetch_note(loader, 512, GIB, 1) is None


@pytest.mark.parametrize(("shared", "noted"), [(8 * KIB, True), (9 * KIB, False)])
def test_the_report_notes_prefetched_batches_of_the_loader(host, shared, noted):
    host(shared=shared)
    callback = lightning.tuner(plan=autobatch.BatchPlan(60, 2))
    loader = torch.utils.data.DataLoader(lightning.data(), batch_size=4, num_workers=1)

    lightning.quiet_trainer(callback, max_epochs=1).fit(lightning.Model(), loader)

    # A sample has 16 numbers of 4 bytes, and a label of 8
    note = "num_workers=1 × prefetch_factor=2 × batches of 60 (4.2 KiB each) would need 8.4 KiB of shared"
    assert any(note in each for each in callback.report.notes) is noted
