"""What the Trainer counts in batches and steps, and what that comes to at another batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from autobatch._plan import BatchPlan

__all__ = ["Counts"]


@dataclass(frozen=True, slots=True)
class Counts:
    """The arguments of a Trainer that are numbers of batches or steps.

    Args:
        trainer: Whose arguments they are.
        max_steps: Updates after which it stops; -1 for no such limit.
        validates: Whether it validates at all.
        batches: Micro-batches that the loader has at a micro-batch size; None where it has no length.
        samples: Samples that an epoch trains on with a plan, where that is known.
        before: What was trained with until now.
    """

    trainer: Any
    max_steps: int
    validates: bool
    batches: Callable[[int], int | None]
    samples: Callable[[BatchPlan], int | None]
    before: BatchPlan

    def check(self, plan: BatchPlan) -> None:
        """Refuse a plan with which an epoch has too few batches for what the Trainer was told."""
        trainer, size = self.trainer, plan.micro_batch_size
        batches, limit = self.batches(size), trainer.limit_train_batches
        if batches is None:
            return
        taken = min(batches, limit) if _is_count(limit) else int(batches * limit)
        if taken == 0:
            raise AutobatchError(
                f"{self._limit}={limit} of the {batches} micro-batches of {size} that an epoch has is less than one, "
                f"so nothing would be trained. Raise {self._limit}, or lower max_micro_batch_size."
            )
        interval = trainer.val_check_interval
        if (
            _is_count(interval)
            and interval > taken
            and trainer.check_val_every_n_epoch is not None
            and trainer.limit_val_batches > 0
        ):
            raise AutobatchError(
                f"val_check_interval={interval} counts micro-batches, and of {size} samples an epoch has only "
                f"{taken} instead of {self.batches(self.before.micro_batch_size)}, so validation would never come. "
                "Give it as a share of an epoch (a float up to 1.0), set check_val_every_n_epoch=None to count over "
                "epochs, or lower max_micro_batch_size."
            )

    def remarks(self, plan: BatchPlan) -> tuple[str, ...]:
        """What these numbers come to with a plan, where that is not what they were."""
        told = (
            self._limited(plan),
            self._validated(plan),
            self._logged(plan),
            self._stopped(plan),
        )
        return tuple(remark for remark in told if remark)

    @property
    def _limit(self) -> str:
        # The Trainer of Lightning 2.6 makes the one of the other
        return (
            "overfit_batches" if self.trainer.overfit_batches else "limit_train_batches"
        )

    def _limited(self, plan: BatchPlan) -> str | None:
        limit = self.trainer.limit_train_batches
        if not _is_count(limit):
            return None
        now, then = self._samples_of(limit, plan), self._samples_of(limit, self.before)
        if now == then:
            return None
        return (
            f"{self._limit}={limit} counts micro-batches: an epoch trains on {now:,} samples instead of "
            f"{then:,}."
        )

    def _samples_of(self, limit: int, plan: BatchPlan) -> int:
        known = self.samples(plan)
        return (
            limit * plan.micro_batch_size * plan.world_size if known is None else known
        )

    def _validated(self, plan: BatchPlan) -> str | None:
        interval, before = self.trainer.val_check_interval, self.before
        if (
            not _is_count(interval)
            or not self.validates
            or plan.micro_batch_size == before.micro_batch_size
        ):
            return None
        now, then = (
            interval * each.micro_batch_size * each.world_size
            for each in (plan, before)
        )
        return (
            f"val_check_interval={interval} counts micro-batches: validation comes every {now:,} samples instead of "
            f"every {then:,}."
        )

    def _logged(self, plan: BatchPlan) -> str | None:
        """Where an epoch was long enough for a logged step, and is no more."""
        every = self.trainer.log_every_n_steps
        now, then = self._updates(plan), self._updates(self.before)
        if not self.trainer.loggers or now is None or then is None:
            return None
        if not now < every <= then:
            return None
        return (
            f"log_every_n_steps={every} counts updates: an epoch has {now:,} instead of {then:,}, "
            "so that some epochs log no step."
        )

    def _updates(self, plan: BatchPlan) -> int | None:
        samples = self.samples(plan)
        return None if samples is None else -(-samples // plan.effective_batch_size)

    def _stopped(self, plan: BatchPlan) -> str | None:
        steps, before = self.max_steps, self.before
        now, then = plan.effective_batch_size, before.effective_batch_size
        if steps == -1 or now == then:
            return None
        return (
            f"max_steps={steps:,} counts updates: training ends after {steps * now:,} samples instead of "
            f"{steps * then:,}."
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int)
