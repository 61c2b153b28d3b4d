"""Replace loops and collectives while trials run."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from autobatch._undo import patched
from autobatch.lightning._compat import (
    fresh_results,
    new_epoch_loop,
    new_epoch_progress,
)
from autobatch.lightning._silence import without_effects

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch.lightning._trainer import Trainer


@contextmanager
def on_new_loops(trainer: Trainer) -> Iterator[None]:
    """Run the body on new loops and results, without effects of callbacks and loggers.

    Progress, metrics and results live in these objects (Lightning 2.6). Progress starts as training
    has it, and results are empty.
    """
    fit_loop: Any = trainer.fit_loop
    loops: tuple[Any, ...] = (trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    with ExitStack() as stack:
        replace = stack.enter_context
        replace(
            patched(
                fit_loop,
                epoch_loop=new_epoch_loop(trainer),
                epoch_progress=new_epoch_progress(trainer),
            )
        )
        replace(fresh_results(trainer))
        replace(without_effects(trainer))
        for loop in loops:
            replace(patched(loop, batch_progress=type(loop.batch_progress)()))
        yield


@contextmanager
def without_collectives(trainer: Trainer) -> Iterator[None]:
    """Run the body on this rank alone: its steps wait for no other rank.

    With `DistributedDataParallel`, a rank that is out of memory would leave the others waiting for
    its gradients. Replaced are the collectives of the strategy (`self.log(sync_dist=True)`,
    `self.all_gather`), SyncBatchNorm and the synchronization of torchmetrics. Collectives that a
    module calls by itself cannot be seen.
    """
    if trainer.world_size == 1:
        yield
        return
    with ExitStack() as stack:
        module = trainer.lightning_module
        # Lightning 2.6 runs the steps of `strategy.model`
        stack.enter_context(patched(trainer.strategy, model=module))
        stack.enter_context(patched(trainer.strategy, **_local_collectives(trainer.world_size)))
        for part in module.modules():
            if isinstance(part, torch.nn.SyncBatchNorm):
                forward = partial(_BatchNorm.forward, part)
                stack.enter_context(patched(part, forward=forward))
            elif _is_metric(part):
                stack.enter_context(
                    patched(part, distributed_available_fn=lambda: False, dist_sync_on_step=False)
                )
        yield


def _local_collectives(world_size: int) -> dict[str, Any]:
    """Return collectives of a strategy (Lightning 2.6), as if all ranks were like this one."""
    return {
        "reduce": lambda tensor, *_, **__: tensor,
        "all_gather": lambda tensor, *_, **__: torch.stack([tensor] * world_size),
        "broadcast": lambda thing, *_, **__: thing,
        "barrier": lambda *_, **__: None,
        "reduce_boolean_decision": lambda decision, *_, **__: decision,
    }


def _is_metric(part: object) -> bool:
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(part, torchmetrics.Metric)
