"""Notes about Trainer arguments, schedules and host memory at the new batch size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from torch.optim import lr_scheduler

from autobatch._memory import format_bytes
from autobatch._memory.host import HostMemory
from autobatch._report.notes import stretched_schedule
from autobatch._trials.snapshot import Snapshot
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.utils.data import DataLoader

    from autobatch._plan import BatchPlan


@dataclass(frozen=True, slots=True)
class TrainerLimits:
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
        return "overfit_batches" if self.trainer.overfit_batches else "limit_train_batches"

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
        return limit * plan.micro_batch_size * plan.world_size if known is None else known

    def _validated(self, plan: BatchPlan) -> str | None:
        interval, before = self.trainer.val_check_interval, self.before
        if (
            not _is_count(interval)
            or not self.validates
            or plan.micro_batch_size == before.micro_batch_size
        ):
            return None
        now, then = (interval * each.micro_batch_size * each.world_size for each in (plan, before))
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


def schedules(
    trainer: Any, before: BatchPlan, plan: BatchPlan, *, is_named: bool
) -> tuple[str, ...]:
    """What schedules that step with every update cover with a plan, where that is not what they covered.

    A schedule that took its length from `estimated_stepping_batches` has made Lightning 2.6 set the training loader
    up before `fit` starts, which is how it is told: with the plan it is made anew, and covers the same data. One that
    may have computed its length from the batch size, where that is named, is told without a number.
    """
    if trainer.fit_loop._combined_loader is not None:
        return ()
    if not trainer.lightning_module.automatic_optimization:
        return ()
    told = (
        stretched_schedule(
            type(config.scheduler).__name__,
            None if is_named else _updates(config),
            before,
            plan,
        )
        for config in trainer.lr_scheduler_configs
        if config.interval == "step"
    )
    return tuple(dict.fromkeys(note for note in told if note))


def _updates(config: Any) -> int | None:
    length = _length(config.scheduler)
    return None if length is None else length * config.frequency


def _length(scheduler: Any) -> int | None:
    """Steps after which a scheduler is through; None where it never is, or does not say."""
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        last = _length(scheduler._schedulers[-1])
        return None if last is None else scheduler._milestones[-1] + last
    if isinstance(scheduler, lr_scheduler.MultiStepLR):
        return max(scheduler.milestones, default=None)
    if isinstance(scheduler, lr_scheduler.LambdaLR):
        # As the schedules of Hugging Face's transformers are made
        made = [each for each in scheduler.lr_lambdas if isinstance(each, partial)]
        known = [each.keywords.get("num_training_steps") for each in made]
        return next((each for each in known if isinstance(each, int)), None)
    for name in ("total_steps", "T_max", "total_iters"):
        length = getattr(scheduler, name, None)
        if isinstance(length, int):
            return length
    return None


_MUCH: Final = 2**30  # bytes of a copy that a person should hear of


def room_for_copy(things: Sequence[Any], ranks: int) -> int:
    """Bytes that a snapshot of these copies to the host; `ranks` processes share it.

    Raises:
        AutobatchError: The host has not that much.
    """
    own = Snapshot.bytes_of(*things)
    needed, available = own * ranks, HostMemory.read().available
    if available is not None and needed > available:
        raise AutobatchError(
            f"To give everything back after its trials, AutoBatch keeps a copy of parameters, buffers, gradients and "
            f"optimizer state on the host: {_for(own, ranks)}, where {format_bytes(available)} are available. Free "
            "host memory, raise the limit of this container or job, or write batch size and accumulation by hand."
        )
    return own


def copied(nbytes: int, ranks: int) -> str | None:
    """What a person should know of that copy."""
    if nbytes <= _MUCH:
        return None
    return (
        "To give everything back, tuning kept a copy of parameters, buffers, gradients and optimizer state on the "
        f"host: {_for(nbytes, ranks)}."
    )


def ahead(
    loader: DataLoader[Any], batch_size: int, bytes_per_sample: int, ranks: int
) -> str | None:
    """What a person should know of the batches that workers make ahead, where the host has no room for them."""
    each = batch_size * bytes_per_sample
    factor = loader.prefetch_factor or 1  # without workers there is none
    needed = loader.num_workers * factor * each
    host = HostMemory.read()
    on_ranks = f" on each of {ranks} ranks" if ranks > 1 else ""
    made = (
        f"num_workers={loader.num_workers} × prefetch_factor={factor} × batches of {batch_size:,} "
        f"({format_bytes(each)} each) would need {format_bytes(needed)} of"
    )
    if host.shared is not None and needed * ranks > host.shared:
        return (
            f"{made} shared memory{on_ranks}, and /dev/shm has {format_bytes(host.shared)}: lower one of the two, or "
            "enlarge it (docker run --shm-size)."
        )
    if host.available is not None and needed * ranks > host.available:
        return f"{made} host memory{on_ranks}, and {format_bytes(host.available)} are available: lower one of the two."
    return None


def _for(nbytes: int, ranks: int) -> str:
    if ranks == 1:
        return format_bytes(nbytes)
    return f"{format_bytes(nbytes)} on each of {ranks} ranks"
