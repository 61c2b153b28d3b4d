"""A small network, sharded in each way that trials support."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

KINDS = ("fsdp2", "fsdp2 bf16", "fsdp2 kept", "fsdp1", "tp", "fsdp2 and tp")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Network(nn.Module):
    def __init__(self, width=32, depth=2):
        super().__init__()
        self.first = nn.Linear(16, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.last = nn.Linear(width, 8)

    def forward(self, x):
        return self.last(self.blocks(self.first(x)))


def sharded(kind, **options):
    """Return a network and its optimizer, divided among the ranks of the default group."""
    torch.manual_seed(0)
    network = Network(**options)
    size = dist.get_world_size()
    if kind == "fsdp2 and tp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
        in_parallel(network, mesh["tensor"])
        fully_sharded(network, mesh=mesh["data"])
    elif kind == "tp":
        in_parallel(network, init_device_mesh("cpu", (size,)))
    elif kind == "fsdp1":
        network = flattened(network)
    elif kind.startswith("fsdp2"):
        fully_sharded(network, mesh=init_device_mesh("cpu", (size,)), **policy_of(kind))
    elif kind == "ddp":
        network = nn.parallel.DistributedDataParallel(network)
    return network, torch.optim.AdamW(network.parameters(), 1e-2)


def policy_of(kind):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if kind == "fsdp2 bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return {"mp_policy": policy}
    return {"reshard_after_forward": False} if kind == "fsdp2 kept" else {}


def fully_sharded(network, **options):
    from torch.distributed.fsdp import fully_shard

    for block in network.blocks:
        fully_shard(block, **options)
    fully_shard(network, **options)


def flattened(network, **options):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    given = {"use_orig_params": True, "device_id": torch.device("cpu"), **options}
    return FullyShardedDataParallel(network, auto_wrap_policy=ModuleWrapPolicy({Block}), **given)


def in_parallel(network, mesh):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    for block in network.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def batch(size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 16, generator=generator)
    return x, torch.randint(0, 8, (size,), generator=generator)


def update(network, optimizer, size, accumulate=2):
    """Run one optimizer step, and return its loss."""
    total = 0.0
    for number in range(accumulate):
        x, y = batch(size, seed=number)
        loss = F.cross_entropy(network(x), y) / accumulate
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


def parts(network, optimizer):
    """Return copies of what this rank holds of parameters and optimizer state."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [local(each).detach().clone() for each in [*network.parameters(), *states]]


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
