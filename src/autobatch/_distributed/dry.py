"""Dry collectives: every process group answers for itself, with the memory of real communication.

A process group passes its collectives to a back end. For a while that is the `FakeProcessGroup` of
torch, so that no rank waits for another: results are as if all ranks were like this one. Everything
that communicates goes through a group: FSDP, DTensor, metrics, compiled code, a `dist.all_reduce`
of the user. Private names are those of torch 2.13.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from autobatch._undo import Undo, patched
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DryCollectives(Undo):
    """Let no collective wait for another rank in the body; the real back ends return on leaving.

    Meanwhile a new group is refused, since the other ranks would have to make it too, and
    `DistributedDataParallel` synchronizes no gradients, since its reducer takes them from the work
    itself, which a fake one does not hold.

    Args:
        kept: Groups that go on communicating.

    Raises:
        AutobatchError: Kernels communicate in memory that they share, beside the groups.
    """

    def __init__(self, *kept: ProcessGroup) -> None:
        super().__init__()
        self._kept = kept

    def start(self) -> None:
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        c10d: Any = dist.distributed_c10d
        world = c10d._world
        _check_no_shared_memory(list(world.pg_map))
        # `new_group` counts its calls for the name of the group, which all ranks have to agree on
        self.add(partial(setattr, world, "group_count", world.group_count))
        self.enter_context(patched(c10d, _new_process_group_helper=_refuse_new_group))
        flags = {name: _Flag(name, value) for name, value in _FLAGS_OF_DDP.items()}
        self.enter_context(patched(DistributedDataParallel, **flags))
        for group in list(world.pg_map):
            if not any(group is each for each in self._kept):
                self._swap(group)

    def _swap(self, group: Any) -> None:
        """Replace the back end of each device type."""
        from torch._C._distributed_c10d import FakeProcessGroup
        from torch.distributed import ProcessGroup

        kinds: Any = ProcessGroup.BackendType
        # Named differently before torch 2.9
        create: Any = getattr(FakeProcessGroup, "_create_internal", FakeProcessGroup)
        for device in list(group._device_types):
            real = group._get_backend(device)
            if isinstance(real, FakeProcessGroup):
                continue
            # A group keeps a back end of each kind for good: the fake one gets a kind of its own
            own = getattr(kinds, real.name().upper(), kinds.CUSTOM)
            slot = kinds.MPI if own == kinds.UCC else kinds.UCC
            self.add(partial(group._register_backend, device, own, real))
            # The group keeps its first fake, and compares the device of that with each later one
            with patched(group, bound_device_id=None):
                group._register_backend(device, slot, create(group.rank(), group.size()))


def _refuse_new_group(*_: object, **__: object) -> None:
    raise AutobatchError(
        "The step makes a new process group, for which a trial would wait until the other ranks "
        "make it too; make all groups before tuning begins."
    )


class _Flag:
    """An attribute of `DistributedDataParallel` that reads as a value, and keeps what it was."""

    def __init__(self, name: str, value: object) -> None:
        self._name = name
        self._value = value  # None: what the instance holds

    def __get__(self, instance: Any, kind: type) -> Any:
        own = None if instance is None else vars(instance).get(self._name)
        return own if self._value is None else self._value

    def __set__(self, instance: Any, value: object) -> None:
        # `no_sync` writes back what it has read
        vars(instance).setdefault(self._name, value)


# A forward pass without synchronized gradients turns the second off for the next one
_FLAGS_OF_DDP: Final = {"require_backward_grad_sync": False, "require_forward_param_sync": None}


def _check_no_shared_memory(groups: list[Any]) -> None:
    from torch.distributed import _symmetric_memory

    names = getattr(_symmetric_memory, "_group_name_to_store", {})
    if any(group.group_name in names for group in groups):
        raise AutobatchError(
            "A process group has symmetric memory, by which kernels wait for other ranks without "
            "a collective: a trial would hang. Tune without symmetric-memory kernels, or write "
            "the batch size by hand."
        )
