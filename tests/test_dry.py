"""Dry collectives and sharded modules, on a fake group in this process."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world
from torch.nn.parallel import DistributedDataParallel

from autobatch._distributed.dry import DryCollectives
from autobatch.errors import AutobatchError

CPU = torch.device("cpu")


@contextlib.contextmanager
def group_of(backend, size):
    dist.init_process_group(backend, rank=0, world_size=size, store=dist.HashStore())
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
