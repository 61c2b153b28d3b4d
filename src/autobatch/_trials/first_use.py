"""Checks and attachments when a workload uses a module or an optimizer for the first time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from autobatch._distributed import Ranks
    from autobatch._memory import MemoryProbe
    from autobatch._trials.optimizers import OptimizerWatch

# Classes whose steps wait for other ranks
_SYNCHRONIZING_WRAPPERS: Final = {
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
}


@dataclass(frozen=True, slots=True)
class FirstUse:
    """Called with every module and optimizer when it is used for the first time.

    Args:
        probe: The device.
        optimizers: Counts optimizer steps and backward passes.
        model_device: The device that the probe was chosen by; None if the user chose it.
        ranks: The processes that train together.
        is_training: Whether the workload trains.
    """

    probe: MemoryProbe
    optimizers: OptimizerWatch
    model_device: torch.device | None
    ranks: Ranks
    is_training: bool

    def __call__(self, thing: object) -> None:
        self.probe.attach(thing)
        if not isinstance(thing, torch.nn.Module):
            return
        if self.ranks.world_size > 1:
            check_not_synchronizing(thing)
        parameter = next(thing.parameters(), None)
        if parameter is None:
            return
        if self.is_training and torch.is_grad_enabled():
            self.optimizers.expected |= any(p.requires_grad for p in thing.parameters())
            self.optimizers.look_at(thing)
        if self.model_device is not None and parameter.device.type != self.model_device.type:
            raise AutobatchError(
                f"The model is on {parameter.device}, but the memory of {self.probe.name} is "
                f'measured; pass device="{parameter.device}".'
            )


def check_not_synchronizing(*things: Any) -> None:
    """Refuse modules whose steps would wait for a rank that is out of memory."""
    for name in {kind.__name__ for thing in things for kind in type(thing).__mro__}:
        if name in _SYNCHRONIZING_WRAPPERS:
            raise AutobatchError(
                f"The workload runs a {name}, whose steps wait for other ranks: a rank "
                "that runs out of memory would hang them. Let the workload run the wrapped module "
                "(model.module)."
            )
