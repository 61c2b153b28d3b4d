"""Notes about Trainer arguments, schedules and host memory at the new batch size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from torch.optim import lr_scheduler

from autobatch._memory import format_bytes
from autobatch._memory.host import HostMemory
from autobatch._plan import ceil_div
from autobatch._trials.snapshot import Snapshot
from autobatch.errors import AutobatchError
from autobatch.lightning._compat import combined_loader, validation_interval
from autobatch.lightning._shown import limited

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.utils.data import DataLoader

    from autobatch._plan import BatchPlan
    from autobatch.lightning._dataloaders import Loaders
    from autobatch.lightning._trainer import Trainer


@dataclass(frozen=True, slots=True)
class TrainerLimits:
    """Arguments of a Trainer that count batches or steps."""

    trainer: Trainer
    loaders: Loaders  # the training loaders
    before: BatchPlan  # the plan until now
    steps_done: int  # of training, without those of trials

    def samples(self, plan: BatchPlan) -> int | None:
        """Return the samples of an epoch under `drop_last` and `limit_train_batches`."""
        batches = batches_trained(self.trainer, self.loaders, plan.micro_batch_size)
        if batches is None:
            return self.loaders.samples
        return self.loaders.samples_in(batches, plan.micro_batch_size) or None

    def planned_seconds(self, sample_seconds: float) -> float | None:
        """Return the seconds of all training steps of a rank, at the seconds of one sample."""
        timers = (each for each in self.trainer.callbacks if type(each).__name__ == "Timer")
        planned = [timer.time_remaining() for timer in timers]  # max_time
        samples, most_epochs = self.samples(self.before), self.trainer.max_epochs
        if samples is not None and most_epochs not in (None, -1):
            epochs = max(0, most_epochs - self.trainer.current_epoch)
            planned.append(epochs * samples / self.before.world_size * sample_seconds)
        if self.trainer.max_steps != -1:
            updates = max(0, self.trainer.max_steps - self.steps_done)
            of_rank = self.before.micro_batch_size * self.before.accumulate_grad_batches
            planned.append(updates * of_rank * sample_seconds)
        return min((each for each in planned if each is not None), default=None)

    def check(self, plan: BatchPlan) -> None:
        """Raise `AutobatchError` if an epoch has too few batches with this plan."""
        trainer, size = self.trainer, plan.micro_batch_size
        taken, lengths = batches_trained(trainer, self.loaders, size), self.loaders.lengths(size)
        if taken is None or lengths is None:
            return
        limit, fewest = trainer.limit_train_batches, min(lengths)
        # Lightning 2.6 refuses a share that leaves no batch of one of several loaders
        if taken == 0 or (fewest and not _is_count(limit) and int(fewest * limit) == 0):
            raise AutobatchError(
                f"{self._limit}={limit} of the {fewest} micro-batches that a loader has at a batch "
                f"size of {size} is less than one. Raise {self._limit}, or lower "
                "max_micro_batch_size."
            )
        interval = validation_interval(trainer)
        validates = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches > 0
        if validates and _is_count(interval) and interval > taken:
            before = self.loaders.batches(self.before.micro_batch_size)
            raise AutobatchError(
                f"val_check_interval={interval} counts micro-batches, and of {size} samples an "
                f"epoch has only {taken} instead of {before}, "
                "so validation would never come. Give it as a share of an epoch (a float up to "
                "1.0), set check_val_every_n_epoch=None to count over epochs, or lower "
                "max_micro_batch_size."
            )

    def notes(self, plan: BatchPlan) -> tuple[str, ...]:
        """Return a note for each argument that covers more or fewer samples than before."""
        each = (self._limited(plan), self._validated(plan), self._logged(plan), self._stopped(plan))
        return tuple(note for note in each if note)

    @property
    def _limit(self) -> str:
        # Lightning 2.6 sets limit_train_batches to the value of overfit_batches
        return "overfit_batches" if self.trainer.overfit_batches else "limit_train_batches"

    def _limited(self, plan: BatchPlan) -> str | None:
        limit = self.trainer.limit_train_batches
        if not _is_count(limit):
            return None
        now, then = (
            self.samples(each) or limit * each.micro_batch_size * each.world_size
            for each in (plan, self.before)
        )
        if now == then:
            return None
        return (
            f"{self._limit}={limit} counts micro-batches: an epoch trains on {now:,} samples "
            f"instead of {then:,}."
        )

    def _validated(self, plan: BatchPlan) -> str | None:
        interval, before = validation_interval(self.trainer), self.before
        if (
            not _is_count(interval)
            or not self.trainer.enable_validation
            or plan.micro_batch_size == before.micro_batch_size
        ):
            return None
        now, then = (interval * each.micro_batch_size * each.world_size for each in (plan, before))
        return (
            f"val_check_interval={interval} counts micro-batches: validation comes every {now:,} "
            f"samples instead of every {then:,}."
        )

    def _logged(self, plan: BatchPlan) -> str | None:
        """Return a note if epochs become too short for a logged step."""
        every = self.trainer.log_every_n_steps
        now, then = self._updates(plan), self._updates(self.before)
        if not self.trainer.loggers or now is None or then is None or not now < every <= then:
            return None
        return (
            f"log_every_n_steps={every} counts updates: an epoch has {now:,} instead of {then:,}, "
            "so that some epochs log no step."
        )

    def _updates(self, plan: BatchPlan) -> int | None:
        samples = self.samples(plan)
        return None if samples is None else ceil_div(samples, plan.effective_batch_size)

    def _stopped(self, plan: BatchPlan) -> str | None:
        steps, before = self.trainer.max_steps, self.before
        now, then = plan.effective_batch_size, before.effective_batch_size
        if steps == -1 or now == then:
            return None
        return (
            f"max_steps={steps:,} counts updates: training ends after {steps * now:,} samples "
            f"instead of {steps * then:,}."
        )


def batches_trained(trainer: Any, loaders: Loaders, batch_size: int) -> int | None:
    """Return the batches of a rank per epoch, after `limit_train_batches`; None if unknown."""
    batches = loaders.batches(batch_size)
    return None if batches is None else int(limited(batches, trainer.limit_train_batches))


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int)


def schedule_notes(
    trainer: Trainer, before: BatchPlan, plan: BatchPlan, *, has_attribute: bool
) -> tuple[str, ...]:
    """Return a note for each schedule over updates that covers more or fewer samples than before.

    A schedule that takes its length from `estimated_stepping_batches` makes Lightning 2.6 set up
    the training loader before `fit` starts, which shows here. It is created again with the plan,
    and covers the same data. A schedule that may compute its length from an attribute with the
    batch size gets a note without a number.
    """
    is_set_up = combined_loader(trainer.fit_loop) is not None
    if is_set_up or not trainer.lightning_module.automatic_optimization:
        return ()
    old, new = before.effective_batch_size, plan.effective_batch_size
    notes = []
    for config in trainer.lr_scheduler_configs:
        if config.interval != "step" or old == new:
            continue
        length = None if has_attribute else _length(config.scheduler)
        name = type(config.scheduler).__name__
        if length is None:
            notes.append(
                f"{name} counts updates, each of {new:,} samples now instead of {old:,}; "
                "a length from trainer.estimated_stepping_batches would adapt."
            )
        else:
            updates = length * config.frequency
            notes.append(
                f"{name} counts updates: its {updates:,} steps now cover {updates * new:,} samples "
                f"instead of {updates * old:,}."
            )
    return tuple(dict.fromkeys(notes))


def _length(scheduler: Any) -> int | None:
    """Return the steps after which a scheduler ends; None if it never does, or does not show it."""
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        last = _length(scheduler._schedulers[-1])
        return None if last is None else scheduler._milestones[-1] + last
    if isinstance(scheduler, lr_scheduler.MultiStepLR):
        return max(scheduler.milestones, default=None)
    if isinstance(scheduler, lr_scheduler.LambdaLR):
        # Schedules of Hugging Face's transformers are partials
        partials = [each for each in scheduler.lr_lambdas if isinstance(each, partial)]
        lengths = [each.keywords.get("num_training_steps") for each in partials]
        return next((length for length in lengths if isinstance(length, int)), None)
    for name in ("total_steps", "T_max", "total_iters"):
        length = getattr(scheduler, name, None)
        if isinstance(length, int):
            return length
    return None


_NOTED_COPY: Final = 2**30  # bytes above which a note mentions the copy


def checked_copy_bytes(captured: Sequence[Any], ranks: int) -> int:
    """Return the bytes that a snapshot copies to host memory, which `ranks` processes share.

    Raises:
        AutobatchError: The host has less memory available.
    """
    own = Snapshot.bytes_of(*captured)
    needed, available = own * ranks, HostMemory.read().available
    if available is not None and needed > available:
        raise AutobatchError(
            "To restore everything after its trials, AutoBatch keeps a copy of parameters, "
            f"buffers, gradients and optimizer state on the host: {_for(own, ranks)}, where "
            f"{format_bytes(available)} are available. Free host memory, raise the limit of this "
            "container or job, or set batch size and accumulation manually."
        )
    return own


def copy_note(nbytes: int, ranks: int) -> str | None:
    """Return a note about a large copy on the host."""
    if nbytes <= _NOTED_COPY:
        return None
    return (
        "To restore everything, tuning kept a copy of parameters, buffers, gradients and "
        f"optimizer state on the host: {_for(nbytes, ranks)}."
    )


def rows_note(rows: int, batch_size: int) -> str | None:
    """Return a note if a sample of the loader becomes several rows of a batch."""
    if rows == 1:
        return None
    return (
        f"Each sample of the loader becomes {rows} rows of a batch. Sizes and samples here are "
        f"those of the loader: a micro-batch of {batch_size:,} has {rows * batch_size:,} rows."
    )


def prefetch_note(
    loader: DataLoader[Any], batch_size: int, bytes_per_sample: int, ranks: int
) -> str | None:
    """Return a note if the batches that workers prefetch do not fit in host memory."""
    nbytes = batch_size * bytes_per_sample
    factor = loader.prefetch_factor or 1  # None without workers
    needed = loader.num_workers * factor * nbytes
    host = HostMemory.read()
    on_ranks = f" on each of {ranks} ranks" if ranks > 1 else ""
    prefetched = (
        f"num_workers={loader.num_workers} × prefetch_factor={factor} × batches of {batch_size:,} "
        f"({format_bytes(nbytes)} each) would need {format_bytes(needed)} of"
    )
    if host.shared is not None and needed * ranks > host.shared:
        return (
            f"{prefetched} shared memory{on_ranks}, and /dev/shm has {format_bytes(host.shared)}: "
            "lower one of the two, or enlarge it (docker run --shm-size)."
        )
    if host.available is not None and needed * ranks > host.available:
        return (
            f"{prefetched} host memory{on_ranks}, and {format_bytes(host.available)} are "
            "available: lower one of the two."
        )
    return None


def _for(nbytes: int, ranks: int) -> str:
    if ranks == 1:
        return format_bytes(nbytes)
    return f"{format_bytes(nbytes)} on each of {ranks} ranks"
