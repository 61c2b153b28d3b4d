"""Whether accumulating reproduces one batch: the module's own training step, on a batch and on its halves."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._cautions import batch_norm, not_additive, not_tested
from autobatch._equivalence import (
    Splitting,
    UndecidedError,
    batch_norms,
    split_gradient,
    without_dropout,
)
from autobatch._ledger import eager
from autobatch._memory import memory_budget, parse_memory_limit
from autobatch._workload import recover
from autobatch.lightning._steps import on_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch._deadline import Deadline
    from autobatch._memory import MemoryProbe
    from autobatch._plan import BatchPlan
    from autobatch._ranks import Ranks
    from autobatch._snapshot import Snapshot
    from autobatch.lightning._samples import Samples
    from autobatch.lightning._steps import Steps

__all__ = ["Splits"]

_log = logging.getLogger("autobatch")

_MOST: Final = 32  # samples: enough to see it, and cheap
# What rounding alone changes is 5e-7 in 32 bits, 3e-4 under fp16 autocast and 2e-3 under bf16 autocast; what is not
# in here, such as eight bits, rounds more than a test could tell from a loss
_THRESHOLDS: Final = {
    "64-true": 0.01,
    "32-true": 0.01,
    "16-true": 0.01,
    "16-mixed": 0.01,
    "bf16-true": 0.02,
    "bf16-mixed": 0.02,
}
_SCALE: Final = 2.0**10  # of a loss whose gradients may be too small for 16 bits


@dataclass(frozen=True, slots=True)
class Splits:
    """What splitting a batch changes in this Trainer.

    Args:
        trainer: The Trainer, on scratch loops.
        module: What it trains.
        samples: Makes the batches.
        steps: Takes the training steps.
        named: Told the batch size, since a step may look at the attribute that names it.
        probe: This rank's device.
        memory_limit: What of it may be held.
        snapshot: Gives back what the test changes.
        ranks: Who trains together.
    """

    trainer: Any
    module: Any
    samples: Samples
    steps: Steps
    named: Callable[[int], None]
    probe: MemoryProbe
    memory_limit: float | str
    snapshot: Snapshot
    ranks: Ranks

    def told(self, plan: BatchPlan, deadline: Deadline) -> tuple[str, ...]:
        """What a person should know of the gradients of a plan that accumulates; every rank of a job asks.

        The test runs a few training steps: it is left out where they would not be over in time.
        """
        if plan.accumulate_grad_batches == 1:
            return ()
        norms = batch_norms(self.module.modules())
        size = _samples_of(plan)
        is_tested = self.module.automatic_optimization and not norms and size > 0
        if is_tested and not deadline.allows(size, deadline.nearest(size), 0.0):
            return (not_tested(deadline.limit or 0.0),)
        # Also where there is nothing to test: no rank may wait for another. Each has data of its own, one speaks
        found, *_ = self.ranks.everywhere(
            lambda: self._tested(size) if is_tested else None
        )
        notes = (not_additive(found, plan),) if found else ()
        return (*batch_norm(norms, plan), *notes)

    def _tested(self, size: int) -> Splitting | None:
        """What the test found; None also where it could not be made, which must not keep anyone from training."""
        try:
            return self._measured(size)
        except Exception as error:
            _log.debug("Whether a batch can be split was not tested: %r", error)
            recover(error, self.probe)
            return None
        finally:
            self.snapshot.restore()

    def _measured(self, size: int) -> Splitting | None:
        precision = self.trainer.precision
        if precision not in _THRESHOLDS:
            raise UndecidedError(f"precision={precision!r} rounds too much")
        host = self.samples.ordinary(size)
        if host is None:
            raise UndecidedError("there are too few samples")
        self.named(size)
        self.probe.attach(*self.snapshot.alive)
        self.probe.release()
        budget = memory_budget(self.probe.read(), parse_memory_limit(self.memory_limit))
        with (
            self.probe.limited(budget),
            eager(),  # another size would be compiled for this alone
            without_dropout(self.module),
            torch.enable_grad(),
        ):
            batch = on_device(self.trainer, host, 0)
            return split_gradient(
                self._gradient, batch, size, threshold=_THRESHOLDS[precision]
            )

    def _gradient(self, batch: Any) -> Sequence[torch.Tensor | None]:
        loss = self.steps.loss(batch)
        if loss is None:
            raise UndecidedError("training_step returned no loss")
        weights = [each for each in self.module.parameters() if each.requires_grad]
        scale = _SCALE if self.trainer.precision.startswith("16") else 1.0
        return torch.autograd.grad(scale * loss, weights, allow_unused=True)


def _samples_of(plan: BatchPlan) -> int:
    """How many samples the test takes, an even number; 0 where a micro-batch has no two."""
    return min(plan.micro_batch_size, _MOST) // 2 * 2
