"""Trials that wait for no other rank: the module without its wrapper, and collectives that answer for themselves."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["apart"]


@contextmanager
def apart(trainer: Any) -> Iterator[None]:
    """While the body runs, a step of this rank is its own affair, and no other rank is waited for.

    Through `DistributedDataParallel` a rank that is out of memory would leave the others waiting for its gradients.
    Neutralised are the strategy's own collectives (`self.log(sync_dist=True)`, `self.all_gather`), SyncBatchNorm and
    the synchronisation of torchmetrics; collectives that a module calls by itself can not be seen.
    """
    if trainer.world_size == 1:
        yield
        return
    with ExitStack() as undo:
        strategy, module = trainer.strategy, trainer.lightning_module
        undo.callback(setattr, strategy, "model", strategy.model)
        strategy.model = module  # Lightning 2.6 steps whatever this is
        for name, answer in _answers(trainer.world_size).items():
            _hide(strategy, name, answer, undo)
        for part in module.modules():
            if isinstance(part, torch.nn.SyncBatchNorm):
                _hide(part, "forward", partial(_BatchNorm.forward, part), undo)
            elif _is_metric(part):
                _hide(part, "distributed_available_fn", lambda: False, undo)
                _hide(part, "dist_sync_on_step", False, undo)
        yield


def _answers(world_size: int) -> dict[str, Any]:
    """What the collectives of a strategy of Lightning 2.6 would say, if all ranks were like this one."""
    return {
        "reduce": lambda tensor, *_, **__: tensor,
        "all_gather": lambda tensor, *_, **__: torch.stack([tensor] * world_size),
        "broadcast": lambda thing, *_, **__: thing,
        "barrier": lambda *_, **__: None,
        "reduce_boolean_decision": lambda decision, *_, **__: decision,
    }


def _hide(owner: Any, name: str, stand_in: Any, undo: ExitStack) -> None:
    """Let an attribute of the instance hide what the class says, or what it said itself."""
    attributes = vars(owner)
    if name in attributes:
        undo.callback(attributes.__setitem__, name, attributes[name])
    else:
        undo.callback(attributes.pop, name, None)
    attributes[name] = stand_in


def _is_metric(part: object) -> bool:
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(part, torchmetrics.Metric)
