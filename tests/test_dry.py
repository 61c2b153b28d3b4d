"""Dry collectives and sharded modules, on a fake group in this process."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _world
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import autobatch
from autobatch._distributed.dry import DryCollectives
from autobatch._memory.ledger import Ledger
from autobatch._trials.snapshot import Snapshot
from autobatch.errors import AutobatchError
from sameness import same
from sharded_models import (
    KINDS,
    Network,
    batch,
    flattened,
    fully_sharded,
    local,
    parts,
    sharded,
    update,
)

CPU = torch.device("cpu")


@contextlib.contextmanager
def group_of(backend, size):
    dist.init_process_group(
        backend,
        rank=0,
        world_size=size,
        store=FakeStore() if backend == "fake" else dist.HashStore(),
    )
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def test_real_back_ends_return_whatever_happens():
    with group_of("gloo", 1) as group:
        other = dist.new_group()
        group.bound_device_id = torch.device("meta", 0)  # as with init_process_group(device_id=…)
        real, names = group._get_backend(CPU), []

        for _ in range(3):
            with pytest.raises(ZeroDivisionError), DryCollectives(other):
                names.append(group._get_backend(CPU).name())
                assert other._get_backend(CPU).name() == "gloo"
                names.append(1 / 0)
            assert group._get_backend(CPU) is real
            assert group.bound_device_id == torch.device("meta", 0)

    assert names == 3 * ["fake"]


def test_a_new_group_within_is_refused_and_not_counted():
    with group_of("gloo", 1):
        before = _world.group_count

        with DryCollectives(), pytest.raises(AutobatchError, match="makes a new process group"):
            dist.new_group()

        assert _world.group_count == before
        assert dist.new_group() is not None


def test_results_are_as_if_all_ranks_were_alike():
    with group_of("fake", 4), DryCollectives():
        sums, part, gathered = torch.ones(2), torch.empty(2), [torch.empty(2) for _ in range(4)]

        dist.all_gather(gathered, torch.ones(2))
        dist.all_reduce(sums)
        dist.reduce_scatter(part, [torch.ones(2) for _ in range(4)])

    assert [each.tolist() for each in [*gathered, sums, part]] == 6 * [[1.0, 1.0]]


def test_a_ddp_module_within_another_synchronizes_no_gradients_and_keeps_its_flags():
    with group_of("fake", 2):
        inner = DistributedDataParallel(torch.nn.Linear(4, 2))
        model = torch.nn.Sequential(inner)
        names = ("require_backward_grad_sync", "require_forward_param_sync")
        before = {name: vars(inner)[name] for name in names}

        with DryCollectives():
            with inner.no_sync():
                model(torch.ones(3, 4)).sum().backward()
            model(torch.ones(3, 4)).sum().backward()
            assert not inner.require_backward_grad_sync

        assert {name: vars(inner)[name] for name in names} == before
        assert inner.module.weight.grad.tolist() == 2 * [4 * [6.0]]


# Sharded modules: restored exactly


@pytest.fixture(scope="module")
def four():
    with group_of("fake", 4) as group:
        yield group


def outcome(network, optimizer):
    return [torch.tensor(update(network, optimizer, 3)), *parts(network, optimizer)]


def differences(kind, *, warm, every, first=1):
    """Yield for every n-th allocation of an update, refused, whether training differs afterwards."""
    network, optimizer = sharded(kind, depth=1, width=8)
    if warm:
        update(network, optimizer, 3)
    ledger = Ledger()
    with Snapshot() as snapshot:
        snapshot.capture(network, optimizer)
        with ledger.watching(None, 0):
            update(network, optimizer, 3)
        allocations = ledger.allocations
        snapshot.restore()
        expected = outcome(network, optimizer)
        for number in range(first, allocations + 1, every):
            snapshot.restore()
            ledger.refuse_at = number
            with pytest.raises(torch.OutOfMemoryError), ledger.watching(None, 0):
                update(network, optimizer, 3)
            snapshot.restore()
            yield not same(outcome(network, optimizer), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("warm", "first"), [(True, 1), (False, 2)])
def test_out_of_memory_at_half_of_the_allocations_of_a_sharded_step_is_restored(
    four, kind, warm, first
):
    found = list(differences(kind, warm=warm, first=first, every=2))

    assert len(found) > 25
    assert not any(found)


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_out_of_memory_at_some_allocations_of_a_sharded_step_is_restored(four, kind):
    found = list(differences(kind, warm=True, every=9))

    assert len(found) >= 10
    assert not any(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass_alone_is_restored(four, kind):
    network, optimizer = sharded(kind)
    with Snapshot() as snapshot:
        snapshot.capture(network, optimizer)
        expected = outcome(network, optimizer)
        snapshot.restore()

        with torch.no_grad():
            network(torch.ones(2, 16))
        snapshot.restore()

        assert same(outcome(network, optimizer), expected)


def test_a_snapshot_copies_the_parts_of_this_rank_only(four):
    network, optimizer = sharded("fsdp2")
    update(network, optimizer, 3)
    held = sum(each.nbytes for each in parts(network, optimizer))

    assert Snapshot.bytes_of(network, optimizer) == held
    assert held < 0.3 * 3 * sum(each.nbytes for each in Network().parameters())


def test_gradients_of_a_sharded_module_are_restored(four):
    network, _ = sharded("fsdp2")
    network(batch(3, 0)[0]).sum().backward()
    before = [local(each.grad).clone() for each in network.parameters()]

    with Snapshot() as snapshot:
        snapshot.capture(network)
        network.zero_grad()

    assert same([local(each.grad) for each in network.parameters()], before)


# What is refused


class DeepSpeedEngine(torch.nn.Linear):
    """A stand-in by name: DeepSpeed is not installed."""


def refused(model):
    def train(batch_size):
        model(torch.ones(batch_size, 16)).sum().backward()

    with pytest.raises(AutobatchError) as caught:
        autobatch.find(train, device="simulated:1MiB")
    return str(caught.value)


def test_what_cannot_be_restored_exactly_is_refused_in_one_sentence(four):
    from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy

    offloaded = Network()
    fully_sharded(
        offloaded,
        mesh=init_device_mesh("cpu", (4,)),
        offload_policy=CPUOffloadPolicy(pin_memory=False),
    )

    assert "give it use_orig_params=True" in refused(flattened(Network(), use_orig_params=False))
    assert "(CPU offload)" in refused(flattened(Network(), cpu_offload=CPUOffload(True)))
    assert "(CPU offload)" in refused(offloaded)
    assert "static_graph=True" in refused(
        DistributedDataParallel(torch.nn.Linear(16, 1), static_graph=True)
    )
    assert "train_micro_batch_size_per_gpu and gradient_acc" in refused(DeepSpeedEngine(16, 1))


def test_pipeline_parallelism_is_refused(four):
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    stage = PipelineStage(Network(), 0, 4, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 4)

    assert "of pipeline parallelism" in refused(schedule.step)


def test_symmetric_memory_is_refused(four, monkeypatch):
    from torch.distributed import _symmetric_memory

    monkeypatch.setitem(_symmetric_memory._group_name_to_store, four.group_name, None)

    with pytest.raises(AutobatchError, match="has symmetric memory"), DryCollectives():
        pass
