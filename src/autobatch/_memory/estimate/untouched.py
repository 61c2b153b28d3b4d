"""State of the process that a trace leaves as it was.

The dicts of global hooks have no public names in torch 2.13.
"""

from __future__ import annotations

import random
import sys
from functools import partial
from typing import Any

import torch
from torch.nn.modules import module as module_hooks
from torch.optim import optimizer as optimizer_hooks

from autobatch._undo import Undo


class Untouched(Undo):
    """Global state in the body of which nothing is left: random numbers, hooks, autocast, modes."""

    def start(self) -> None:
        self.add(partial(random.setstate, random.getstate()))
        self.add(partial(torch.set_rng_state, torch.get_rng_state()))
        if (numpy := sys.modules.get("numpy")) is not None:
            self.add(partial(numpy.random.set_state, numpy.random.get_state()))
        for hooks in _global_hooks():
            self.add(partial(_refill, hooks, dict(hooks)))
            hooks.clear()
        self.enter_context(torch.enable_grad())
        # A context of autocast would keep the casts of those within it
        self.add(partial(torch.set_autocast_enabled, "cpu", torch.is_autocast_enabled("cpu")))
        torch.set_autocast_enabled("cpu", False)
        if "torch._dynamo" in sys.modules:
            self.enter_context(torch.compiler.set_stance("force_eager"))


def _global_hooks() -> list[dict[int, Any]]:
    return [
        module_hooks._global_forward_hooks,
        module_hooks._global_forward_pre_hooks,
        module_hooks._global_backward_hooks,
        module_hooks._global_backward_pre_hooks,
        optimizer_hooks._global_optimizer_pre_hooks,
        optimizer_hooks._global_optimizer_post_hooks,
    ]


def _refill(hooks: dict[int, Any], former: dict[int, Any]) -> None:
    hooks.clear()
    hooks.update(former)
