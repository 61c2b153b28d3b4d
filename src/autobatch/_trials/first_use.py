"""Checks and attachments when a workload uses a module or an optimizer for the first time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from autobatch._distributed.sharding import check_can_rest
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from autobatch._memory import MemoryProbe
    from autobatch._trials.optimizers import OptimizerWatch


@dataclass(frozen=True, slots=True)
class FirstUse:
    """Called with every module and optimizer when it is used for the first time."""

    probe: MemoryProbe
    optimizers: OptimizerWatch
    model_device: torch.device | None  # that the probe was chosen by; None if the user chose it
    is_training: bool

    def __call__(self, thing: object) -> None:
        self.probe.attach(thing)
        if not isinstance(thing, torch.nn.Module):
            return
        check_can_rest([thing])
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
