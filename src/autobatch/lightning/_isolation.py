"""Replace loops and collectives of the strategy while trials run."""

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


def local_collectives(trainer: Trainer) -> patched:
    """Return a patch for collectives of the strategy, as if all ranks were like this one.

    Those of Lightning 2.6 sum for a decision, and read the size of what they receive: by dry
    collectives a sum is that of one rank, and nothing is received. `reduce` stays, by which
    `self.log` knows that it was called in the same way before.
    """
    world_size = trainer.world_size
    return patched(
        trainer.strategy,
        all_gather=lambda tensor, *_, **__: torch.stack([tensor] * world_size),
        broadcast=lambda thing, *_, **__: thing,
        reduce_boolean_decision=lambda decision, *_, **__: decision,
    )
