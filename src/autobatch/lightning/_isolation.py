"""Replace loops and collectives while trials run."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from autobatch._undo import patched
from autobatch.lightning._compat import (
    fresh_results,
    new_epoch_loop,
    new_epoch_progress,
)
from autobatch.lightning._silence import without_effects

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch._distributed import Ranks
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
def on_this_rank_alone(trainer: Trainer, ranks: Ranks) -> Iterator[None]:
    """Run the body on this rank alone: its steps wait for no other rank.

    A rank that is out of memory would leave the others waiting. Collectives of the strategy answer
    as if all ranks were like this one, where those of its groups cannot: a broadcast leaves what a
    rank receives as it is, and a sum is that of one rank.
    """
    with ranks.dry(), patched(trainer.strategy, **_local_collectives(trainer.world_size)):
        yield


def _local_collectives(world_size: int) -> dict[str, Any]:
    """Return collectives of a strategy (Lightning 2.6), as if all ranks were like this one."""
    if world_size == 1:
        return {}
    return {
        "reduce": lambda tensor, *_, **__: tensor,
        "all_gather": lambda tensor, *_, **__: torch.stack([tensor] * world_size),
        "broadcast": lambda thing, *_, **__: thing,
        "reduce_boolean_decision": lambda decision, *_, **__: decision,
    }
