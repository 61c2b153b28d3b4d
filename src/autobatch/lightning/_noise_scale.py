"""The NoiseScale callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.parallel import DistributedDataParallel

from autobatch._memory.oom import is_oom
from autobatch._noise.hooks import GradientNormHook, GradientNorms, NoiseRecord, obstacle
from autobatch._noise.loop import checked_interval
from autobatch._report.units import plain
from autobatch._trials.batches import NotDividedError, row_counts
from autobatch.errors import AutobatchError
from autobatch.lightning._compat import batches_that_stepped, data_fetcher, should_accumulate
from autobatch.lightning._half_batch import HalfBatch
from autobatch.lightning._package import Callback, missing_name

if TYPE_CHECKING:
    from autobatch._noise import NoiseReading

_CHECKPOINT_KEY: Final = "autobatch.NoiseScale"


class NoiseScale(Callback):  # type: ignore[misc]  # a class made at run time
    """Measures the gradient noise scale while a Trainer trains, without an effect on training.

    It compares the gradients of micro-batches, of all ranks, with the gradient of the update they
    add up to. If an update is one batch on one device, it repeats the training step on half of the
    batch in some updates, and restores the module and the random state afterwards. With an
    `AutoBatch` in the same Trainer, the report is completed with the reading when training ends.
    Loggers get `noise_scale`, `noise_scale_low` and `noise_scale_high`.

    Args:
        every: Interval of the measured updates, in updates.
        split_every: The same if an update is one batch on one device.

    Raises:
        ValueError: An argument is invalid.

    Example:
        >>> noise = NoiseScale()  # doctest: +SKIP
        >>> trainer = pl.Trainer(callbacks=[noise], accumulate_grad_batches=4)  # doctest: +SKIP
        >>> trainer.fit(model, loader)  # doctest: +SKIP
        >>> noise.reading.samples  # doctest: +SKIP
    """

    def __init__(self, *, every: int = 5, split_every: int = 20) -> None:
        super().__init__()
        self._every = checked_interval("every", every)
        self._split_every = checked_interval("split_every", split_every)
        self._record = NoiseRecord()
        self._hook = GradientNormHook()
        self._reset()

    def _reset(self) -> None:
        self._hook.close()
        self._half_batch = HalfBatch()
        self._world_size = 1
        self._group: Any | None = None
        self._is_within_update = False
        self._is_split = False  # this update is one batch, measured by half of it
        self._is_last_batch = False  # of its update
        self._sizes: list[int | None] = []  # samples of the batches of this update
        self._unit: float | torch.Tensor = 1.0
        self._split_norms: GradientNorms | None = None
        self._logged_update = 0  # last update of the last logged reading

    @property
    def reading(self) -> NoiseReading:
        """The noise scale measured so far."""
        return self._record.reading

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start a new record with every fit."""
        same = [each for each in trainer.callbacks if isinstance(each, NoiseScale)]
        if len(same) > 1:
            raise AutobatchError(
                f"callbacks holds {len(same)} NoiseScale, and a Trainer takes one: their readings "
                "would be the same."
            )
        if stage == "fit":
            self._record = NoiseRecord()
            self._reset()

    # Not by `state_dict`: Lightning 2.6 refuses two callbacks with a state in a sentence of its
    # own, before `setup`

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the measured windows, in plain numbers."""
        checkpoint[_CHECKPOINT_KEY] = self._record.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Resume with the windows of a checkpoint."""
        if _CHECKPOINT_KEY in checkpoint:
            self._record.load_state_dict(checkpoint[_CHECKPOINT_KEY])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check for a reason to measure nothing; all ranks find the same."""
        reason = _obstacle(trainer, pl_module)
        self._record.give_up(reason)
        if reason is None and trainer.world_size > 1:
            self._group = trainer.strategy.model.process_group
            self._world_size = trainer.world_size

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin an update if it is one of those to be measured."""
        # A rank with an obstacle still takes part in the sums of the other ranks
        if self._record.obstacle is not None and self._world_size == 1:
            return
        self._is_last_batch = not should_accumulate(trainer.fit_loop.epoch_loop)
        if not self._is_within_update:
            self._begin_update(trainer, pl_module)
        if self._hook.is_open:
            self._sizes.append(_samples_of(trainer, batch))
        self._batch, self._batch_idx = batch, batch_idx

    def _begin_update(self, trainer: Any, module: Any) -> None:
        self._is_within_update = True
        self._sizes = []
        self._split_norms = None
        is_one_batch = trainer.accumulate_grad_batches * self._world_size == 1
        every = self._split_every if is_one_batch else self._every
        is_measured = self._record.updates % every == 0
        self._is_split = is_one_batch and is_measured
        if is_measured and not is_one_batch:
            self._hook.open(module.parameters())

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Measure the gradient of the update, before anything unscales or clips it."""
        if not self._is_last_batch:
            return
        if self._hook.is_open:
            self._hook.take_whole()
            self._unit = _loss_factor(trainer)
        elif self._is_split:
            self._measure_half(trainer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the norms once the optimizer has stepped."""
        self._batch = None
        if not (self._is_within_update and self._is_last_batch):
            return
        if self._hook.is_open:
            self._record.watch_rate(trainer.optimizers[0])
            self._end_update(trainer)
        elif self._split_norms is not None:
            self._record.watch_rate(trainer.optimizers[0])
            self._record.add(self._split_norms)
        self._is_within_update = self._is_split = False
        self._record.updates += 1
        interval = trainer.log_every_n_steps
        if interval and self._record.updates % interval == 0:
            self._log(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the reading; no update continues in the next epoch."""
        self._stop()
        self._log(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks."""
        self._stop()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the hooks."""
        self._stop()

    def _stop(self) -> None:
        self._hook.close()
        self._is_within_update = self._is_split = False
        self._batch = None

    def _end_update(self, trainer: Any) -> None:
        """Keep the norms of an update of several backward passes."""
        size, flaw = self._sizes[0], None
        if size is None:
            flaw = "the samples of a batch cannot be counted"
        elif not self._hook.passes == len(self._sizes) == trainer.accumulate_grad_batches:
            flaw = "updates have fewer backward passes than accumulate_grad_batches"
        elif len(set(self._sizes)) > 1:
            flaw = "the batches of an update differ in size"
        self._record.end_update(
            self._hook,
            flaw,
            group=self._group,
            world_size=self._world_size,
            part_size=size or 0,
            unit=self._unit,
        )

    def _measure_half(self, trainer: Any) -> None:
        """Measure an update of one backward pass with half of its batch."""
        update, unit = self._record.updates + 1, _loss_factor(trainer)
        try:
            self._split_norms = self._half_batch.measure(
                trainer, self._batch, self._batch_idx, update=update, unit=unit
            )
        except NotDividedError as error:
            self._record.give_up(f"a batch cannot be compared with half of it: {error}")
        except Exception as error:
            reason = "memory" if is_oom(error) else plain(f"{type(error).__name__}: {error}")
            self._record.give_up(f"training_step fails on half a batch ({reason})")

    def _log(self, trainer: Any) -> None:
        """Log the reading if it is a new number."""
        if not (trainer.loggers and trainer.is_global_zero):
            return
        reading = self.reading
        if reading.state not in {"ok", "at_least"} or reading.last_update == self._logged_update:
            return
        self._logged_update = reading.last_update
        samples = reading.samples if reading.state == "ok" else None
        values = {"": samples, "_low": reading.low, "_high": reading.high}
        known = {f"noise_scale{end}": each for end, each in values.items() if each is not None}
        for logger in trainer.loggers:
            logger.log_metrics(known, step=batches_that_stepped(trainer.fit_loop.epoch_loop))


def _obstacle(trainer: Any, module: Any) -> str | None:
    """Return a reason to measure nothing in this run, if one is known at the start."""
    name = missing_name(trainer)
    if name is not None:
        return f"this Lightning has no {name}, which NoiseScale needs"
    if not module.automatic_optimization:
        return (
            "the module uses manual optimization; autobatch.noise_scale() around its steps can "
            "measure that"
        )
    wrapped = trainer.strategy.model
    is_ddp = isinstance(wrapped, DistributedDataParallel)
    if not is_ddp and (wrapped is not module or trainer.world_size > 1):
        return f"{type(trainer.strategy).__name__} hides whole gradients"
    if "DataLoaderIter" in type(data_fetcher(trainer.fit_loop)).__name__:
        return "training_step takes its batches from an iterator"
    optimizer = trainer.optimizers[0] if trainer.optimizers else None
    return "there is no optimizer" if optimizer is None else obstacle(module, optimizer)


def _samples_of(trainer: Any, batch: Any) -> int | None:
    """Return the rows of the tensors, or else the batch size of a loader except at its end."""
    counts = row_counts(batch)
    if len(counts) == 1:
        return counts.pop()
    size = getattr(trainer.train_dataloader, "batch_size", None)
    return size if isinstance(size, int) and not trainer.is_last_batch else None


def _loss_factor(trainer: Any) -> float | torch.Tensor:
    """Return the factor of the loss in Lightning 2.6: 1 / accumulation, and a scaler's scale."""
    factor: float | torch.Tensor = 1 / trainer.accumulate_grad_batches
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return factor
    # As a tensor: reading the scale would wait for the device
    scale: torch.Tensor = scaler.scale(torch.ones((), device=trainer.strategy.root_device))
    return scale * factor
