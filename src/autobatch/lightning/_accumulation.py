"""Check accumulation on the training step, and correct the last accumulation window of an epoch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.data import BatchSampler, DataLoader

from autobatch._accumulation import (
    Splitting,
    UndecidedError,
    batch_norms,
    split_gradient,
    without_dropout,
)
from autobatch._distributed.sharding import is_sharded
from autobatch._loaders.epochs import samples_of
from autobatch._memory import memory_budget, parse_memory_limit
from autobatch._memory.ledger import eager
from autobatch._report.accumulation_notes import batch_norm, not_additive
from autobatch._trials.batches import listed, row_counts
from autobatch._trials.workload import free_after_failure
from autobatch.errors import AutobatchError
from autobatch.lightning._trainer_notes import batches_trained
from autobatch.lightning._training import on_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._plan import BatchPlan
    from autobatch._trials.time_limit import TimeLimit
    from autobatch.lightning._dataloaders import Loaders
    from autobatch.lightning._resources import TrialResources
    from autobatch.lightning._training import TrainingSteps

_log = logging.getLogger("autobatch")

_MAX_SAMPLES: Final = 32  # of the batch that is split: enough for the effect, and cheap
# Change of the gradient, as a share of its norm, by precision. Rounding alone changes 5e-7 in 32
# bits, 3e-4 under fp16 autocast and 2e-3 under bf16 autocast. Other precisions, such as eight bits,
# round too much for a test.
THRESHOLDS: Final = {
    "64-true": 0.01,
    "32-true": 0.01,
    "16-true": 0.01,
    "16-mixed": 0.01,
    "bf16-true": 0.02,
    "bf16-mixed": 0.02,
}
_FP16_LOSS_SCALE: Final = 2.0**10  # keeps small gradients above zero in 16 bits


@dataclass(frozen=True, slots=True)
class SplittingTest:
    """Test of the training step: does splitting a batch change its gradient?"""

    trainer: Any  # the Trainer, on new loops
    module: Any  # the trained module
    steps: TrainingSteps  # runs the training steps
    resources: TrialResources
    memory_limit: float | str  # share or amount of device memory for the test

    def notes(self, plan: BatchPlan, time_limit: TimeLimit) -> tuple[str, ...]:
        """Return notes on the gradients of a plan that accumulates; every rank calls it.

        The test runs a few training steps, and is left out if the time limit does not allow them.
        """
        if plan.accumulate_grad_batches == 1:
            return ()
        norms = batch_norms(self.module.modules())
        size = min(plan.micro_batch_size, _MAX_SAMPLES) // 2 * 2  # 0 for one sample
        is_tested = self.module.automatic_optimization and not norms and size > 0
        if is_tested and not time_limit.allows(size, time_limit.nearest(size), 0.0):
            limit = f"time_limit={time_limit.limit or 0.0:g} seconds"
            untested = "whether micro-batches give the gradient of one batch"
            return (f"{limit} left no time to test {untested}.",)
        # Gathered without a test as well: no rank may wait for another. Each rank has data of its
        # own, and the result of the first counts
        found, *_ = self.resources.context.ranks.gather(self._tested(size) if is_tested else None)
        if found is None:
            return batch_norm(norms, plan)
        return (*batch_norm(norms, plan), not_additive(found, plan))

    def _tested(self, size: int) -> Splitting | None:
        """Run the test; None without a result, which must not stop training."""
        try:
            return self._measured(size)
        except Exception as error:
            _log.debug("Splitting a batch was not tested: %r", error)
            free_after_failure(error, self.resources.context.probe)
            return None
        finally:
            self.resources.context.snapshot.restore()

    def _measured(self, size: int) -> Splitting | None:
        precision = self.trainer.precision
        if precision not in THRESHOLDS:
            raise UndecidedError(f"precision={precision!r} rounds too much")
        if is_sharded(self.trainer.strategy.model):
            raise UndecidedError("each rank has a part of the gradient")
        host_batch = self.resources.samples.ordinary(size)
        if host_batch is None:
            raise UndecidedError("there are too few samples")
        probe = self.resources.context.probe
        probe.attach(*self.resources.context.snapshot.alive)
        probe.release()
        budget = memory_budget(probe.read(), parse_memory_limit(self.memory_limit))
        with (
            self.resources.context.ranks.dry(),
            probe.limited(budget),
            eager(),  # this batch size alone is not worth compiling for
            without_dropout(self.module),
            torch.enable_grad(),
            self.steps.shown(size, 1),
        ):
            self.steps.start()
            batch = on_device(self.trainer, host_batch, 0)
            return split_gradient(self._gradient, batch, size, threshold=THRESHOLDS[precision])

    def _gradient(self, batch: Any) -> Sequence[torch.Tensor | None]:
        loss = self.steps.loss(batch)
        if loss is None:
            raise UndecidedError("training_step returned no loss")
        weights = [each for each in self.module.parameters() if each.requires_grad]
        scale = _FP16_LOSS_SCALE if self.trainer.precision.startswith("16") else 1.0
        return torch.autograd.grad(scale * loss, weights, allow_unused=True)


def check_repairable(trainer: Any, module: Any) -> None:
    """Refuse `repair_last_window` with modules and optimizers that it cannot correct."""
    if not module.automatic_optimization:
        raise AutobatchError(
            "repair_last_window=True corrects how Lightning accumulates, and this module uses "
            "manual optimization (automatic_optimization=False): it weights its own updates. "
            "Leave repair_last_window out."
        )
    if any(isinstance(each, torch.optim.LBFGS) for each in trainer.optimizers):
        raise AutobatchError(_evaluates_again("LBFGS"))


def last_samples(trainer: Any, loaders: Loaders, batch_size: int) -> int | None:
    """Return the samples in the last batch of a rank in an epoch; None if unknown."""
    batches = batches_trained(trainer, loaders, batch_size)
    samples = _countable_samples(loaders.each[0], loaders.shards[0])
    if not batches or samples is None:
        return None
    return _samples_after(batches - 1, samples, batch_size)


def update_notes(
    trainer: Any, loaders: Loaders, plan: BatchPlan, *, repaired: bool
) -> tuple[str, ...]:
    """Return notes on the updates of an epoch with a plan."""
    whole = plan.accumulate_grad_batches
    if whole == 1:
        return ()
    if not trainer.lightning_module.automatic_optimization:
        note: str | None = (
            "This module uses manual optimization: to reach "
            f"{plan.effective_batch_size:,} samples per update its training_step has to step every "
            f"{whole:,} micro-batches. Trials ran it as it steps now."
        )
    elif isinstance(trainer.optimizers[0], torch.optim.LBFGS):
        note = (
            "LBFGS evaluates the last micro-batch of an update several times, and Lightning adds "
            "up the gradients of all evaluations: give a target_batch_size that fits at once."
        )
    else:
        note = None if repaired else _last_window(trainer, loaders, plan)
    return (note,) if note else ()


def _last_window(trainer: Any, loaders: Loaders, plan: BatchPlan) -> str | None:
    """Note the weights that Lightning gives to the last update of an epoch."""
    size, whole = plan.micro_batch_size, plan.accumulate_grad_batches
    batches = batches_trained(trainer, loaders, size)
    if not batches:
        return None
    samples = last_samples(trainer, loaders, size) or size
    micro_batches = (batches - 1) % whole + 1
    sentences = []
    if micro_batches < whole:
        made = f"{micro_batches:,} micro-batch{'es' if micro_batches > 1 else ''}"
        sentences.append(
            f"The last update of an epoch is made of {made} instead of {whole:,}, and Lightning "
            f"still divides by {whole:,}: its gradient is {100 * micro_batches / whole:.3g} % of "
            "what it should be"
        )
    if samples < size and micro_batches > 1:
        sentences.append(
            f"The last micro-batch of an epoch has {samples:,} of {size:,} samples, and Lightning "
            f"counts it as a full one: its samples weigh {size / samples:.3g} times as much as "
            "others"
        )
    return f"{'. '.join(sentences)}; repair_last_window=True corrects it." if sentences else None


def _samples_after(batches: int, samples: int, batch_size: int) -> int:
    """Return the size of the batch that follows a number of full ones in an epoch of `samples`."""
    return min(batch_size, samples - batches * batch_size)


class LastWindowCorrection:
    """Gives the last update of an epoch the gradient of the mean loss over exactly its samples.

    Lightning 2.6 divides the loss of every micro-batch by the accumulation k. It does so as well if
    the last window of an epoch has fewer than k micro-batches, or if the last micro-batch has s
    samples instead of b. Of r micro-batches, the gradients of the first r - 1 are multiplied by b/s
    before the last is added, and the sum by k·s / ((r-1)·b + s) before clipping. Both are linear:
    scaling of the loss has no effect, even if gradients are unscaled in between.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._batches_read = 0  # in this epoch, since its loader began
        self._samples = batch_size  # of the current micro-batch
        self._is_last = False  # micro-batch of its epoch
        self._is_weighted = False  # this micro-batch is counted in the window
        self._window_samples = 0  # with accumulated gradients

    def start_epoch(self) -> None:
        """Reset the counts: no window continues in the next epoch."""
        self._batches_read = self._window_samples = 0

    def start_batch(self, trainer: Any, batch: Any, index: int) -> None:
        """Count the samples of the last micro-batch; all others have the batch size."""
        self._is_last = trainer.is_last_batch or index + 1 == trainer.num_training_batches
        self._is_weighted = False
        if self._batches_read == 0 or self._is_last:
            self._check_countable(trainer.train_dataloader, batch)
        self._samples = self._batch_size
        if self._is_last:
            self._samples = self._samples_of_last(trainer.train_dataloader, batch, index)
        self._batches_read += 1

    def before_backward(self, trainer: Any) -> None:
        """Weight the accumulated gradients by their samples, relative to this micro-batch."""
        if trainer.accumulate_grad_batches == 1:
            return
        if self._is_weighted:
            raise AutobatchError(_evaluates_again(type(trainer.optimizers[0]).__name__))
        self._is_weighted = True
        if self._window_samples and self._samples != self._batch_size:
            _scale_gradients(trainer.optimizers[0], self._batch_size / self._samples)
        self._window_samples += self._samples

    def before_step(self, trainer: Any, optimizer: Any) -> None:
        """Divide by the samples of the window instead of the accumulation."""
        accumulate = trainer.accumulate_grad_batches
        if self._is_last and self._window_samples and accumulate > 1:
            # A last training_step that returned None has added nothing to the window
            unit = self._samples if self._is_weighted else self._batch_size
            if accumulate * unit != self._window_samples:
                _scale_gradients(optimizer, accumulate * unit / self._window_samples)
        self._window_samples = 0

    def _samples_of_last(self, loader: Any, batch: Any, index: int) -> int:
        samples = _countable_samples(loader)
        if samples is not None:
            # A resumed epoch continues with its batch index, but only a loader with a state
            # continues with its data
            is_resumable = hasattr(loader, "load_state_dict")
            batches = index if is_resumable else self._batches_read
            return _samples_after(batches, samples, self._batch_size)
        (rows,) = row_counts(batch)
        return rows

    def _check_countable(self, loader: Any, batch: Any) -> None:
        if _countable_samples(loader) is not None:
            return
        rows = row_counts(batch)
        if len(rows) == 1 and (self._is_last or rows == {self._batch_size}):
            return
        raise AutobatchError(
            "repair_last_window=True has to count the samples of a batch, and the tensors in a "
            f"batch of {self._batch_size} have {listed(rows)} rows. Leave repair_last_window out, "
            "or train from a data set with a length and without a batch sampler of your own."
        )


def _countable_samples(loader: Any, shards: int = 1) -> int | None:
    """Return the samples of a rank per epoch; None if unknown, or if batches may vary in size."""
    if isinstance(loader, DataLoader) and type(loader.batch_sampler) is BatchSampler:
        return samples_of(loader, shards)
    return None


def _scale_gradients(optimizer: Any, factor: float) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def _evaluates_again(optimizer: str) -> str:
    return (
        f"repair_last_window=True weights each micro-batch once, and {optimizer} evaluates one "
        "several times in a step, which under accumulation adds up all their gradients. "
        "Leave repair_last_window out."
    )
