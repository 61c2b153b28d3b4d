"""From the largest micro-batch that fits to the batch the optimizer should see."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BatchPlan"]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How an effective batch is made: micro-batch × accumulation × ranks.

    Args:
        micro_batch_size: Samples per device and forward pass.
        accumulate_grad_batches: Micro-batches per optimizer update.
        world_size: Ranks that train together.

    Example:
        >>> BatchPlan(micro_batch_size=32, accumulate_grad_batches=8).effective_batch_size
        256
    """

    micro_batch_size: int
    accumulate_grad_batches: int = 1
    world_size: int = 1

    @property
    def effective_batch_size(self) -> int:
        """Samples behind one optimizer update, over all ranks."""
        return self.micro_batch_size * self.accumulate_grad_batches * self.world_size
