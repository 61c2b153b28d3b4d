"""Check accumulation on the training step, and correct the last, partial accumulation window."""

from __future__ import annotations

import importlib
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
from autobatch._memory import memory_budget, parse_memory_limit
from autobatch._memory.ledger import eager
from autobatch._report.notes import (
    batch_norm,
    by_hand,
    last_window,
    not_additive,
    not_tested,
    repeated_closures,
)
from autobatch._trials.workload import free_after_oom
from autobatch.errors import AutobatchError
from autobatch.lightning._dataloaders import samples_of
from autobatch.lightning._workloads import on_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch._distributed import Ranks
    from autobatch._memory import MemoryProbe
    from autobatch._plan import BatchPlan
    from autobatch._trials.snapshot import Snapshot
    from autobatch._trials.time_limit import TimeLimit
    from autobatch.lightning._dataloaders import Loaders
    from autobatch.lightning._trial_data import Samples
    from autobatch.lightning._workloads import TrainingSteps

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
    steps: TrainingSteps
    named: Callable[[int], None]
    probe: MemoryProbe
    memory_limit: float | str
    snapshot: Snapshot
    ranks: Ranks

    def told(self, plan: BatchPlan, deadline: TimeLimit) -> tuple[str, ...]:
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
        found, *_ = self.ranks.gather(self._tested(size) if is_tested else None)
        notes = (not_additive(found, plan),) if found else ()
        return (*batch_norm(norms, plan), *notes)

    def _tested(self, size: int) -> Splitting | None:
        """What the test found; None also where it could not be made, which must not keep anyone from training."""
        try:
            return self._measured(size)
        except Exception as error:
            _log.debug("Whether a batch can be split was not tested: %r", error)
            free_after_oom(error, self.probe)
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
            return split_gradient(self._gradient, batch, size, threshold=_THRESHOLDS[precision])

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


def check_switch(repair_last_window: object) -> bool:
    """The keyword, refused where it is neither True nor False."""
    if not isinstance(repair_last_window, bool):
        raise ValueError(
            f"repair_last_window={repair_last_window!r} is not a switch; give True to weight the last update of an "
            "epoch by its samples, or False to leave it as Lightning makes it."
        )
    return repair_last_window


def check_repairable(trainer: Any, module: Any) -> None:
    """Refuse what no window can be weighted for, before anything is touched."""
    if not module.automatic_optimization:
        raise AutobatchError(
            "repair_last_window=True corrects how Lightning accumulates, and this module optimises by hand "
            "(automatic_optimization=False): it weights its own updates. Leave repair_last_window out."
        )
    if any(isinstance(each, torch.optim.LBFGS) for each in trainer.optimizers):
        raise AutobatchError(_evaluated_again("LBFGS"))


def batches_trained(trainer: Any, loaders: Loaders, batch_size: int) -> int | None:
    """Batches of a rank that an epoch trains on after `limit_train_batches`; None where that is not known."""
    batches, limit = loaders.batches(batch_size), trainer.limit_train_batches
    if batches is None:
        return None
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def last_samples(trainer: Any, loaders: Loaders, batch_size: int) -> int | None:
    """Samples in the last batch that each rank trains on in an epoch; None where that is not known."""
    batches = batches_trained(trainer, loaders, batch_size)
    samples = _samples_counted(loaders.each[0], loaders.shards[0])
    if not batches or samples is None:
        return None
    return _left(samples, batches - 1, batch_size)


def told(trainer: Any, loaders: Loaders, plan: BatchPlan, *, repaired: bool) -> tuple[str, ...]:
    """What a person should know of how the updates of an epoch are made with a plan."""
    if not trainer.lightning_module.automatic_optimization:
        notes = [by_hand(plan)]
    elif isinstance(trainer.optimizers[0], torch.optim.LBFGS):
        notes = [repeated_closures(plan)]
    else:
        notes = [None if repaired else _last_window(trainer, loaders, plan)]
    return tuple(note for note in notes if note)


def _last_window(trainer: Any, loaders: Loaders, plan: BatchPlan) -> str | None:
    size, whole = plan.micro_batch_size, plan.accumulate_grad_batches
    batches = batches_trained(trainer, loaders, size)
    if not batches or whole == 1:
        return None
    left = last_samples(trainer, loaders, size) or size
    return last_window(plan, (batches - 1) % whole + 1, left)


def _left(samples: int, batches: int, batch_size: int) -> int:
    """Samples of the batch that follows so many whole ones."""
    return min(batch_size, samples - batches * batch_size)


class LastWindowCorrection:
    """Gives the last update of an epoch the gradient of the mean loss over exactly its samples.

    Lightning 2.6 divides the loss of every micro-batch by the accumulation k, also where the window that ends an epoch
    has fewer, and where its last micro-batch has s samples instead of b. Of r micro-batches the gradients of all but
    the last are multiplied by b/s before it is added, and all together by k·s / ((r-1)·b + s) before clipping. Both
    are linear: a scaled loss, whose gradients are unscaled in between, changes nothing.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._read = 0  # batches of this epoch, from where its loader began
        self._samples = batch_size  # of the micro-batch that runs
        self._is_last = False  # of its epoch
        self._is_weighted = False
        self._window = 0  # samples whose gradients were accumulated

    def start_epoch(self) -> None:
        """Nothing was read of it, and no window reaches into it."""
        self._read = self._window = 0

    def start_batch(self, trainer: Any, batch: Any, index: int) -> None:
        """Count the samples of the last one; all others are of the size that was set."""
        self._is_last = trainer.is_last_batch or index + 1 == trainer.num_training_batches
        self._is_weighted = False
        if self._read == 0 or self._is_last:
            self._check_readable(trainer.train_dataloader, batch)
        self._samples = self._batch_size
        if self._is_last:
            self._samples = self._samples_in(trainer.train_dataloader, batch, index)
        self._read += 1

    def before_backward(self, trainer: Any) -> None:
        """Let the gradients so far count by the samples of their micro-batches, measured by this one's."""
        if trainer.accumulate_grad_batches == 1:
            return
        if self._is_weighted:
            raise AutobatchError(_evaluated_again(type(trainer.optimizers[0]).__name__))
        self._is_weighted = True
        if self._window and self._samples != self._batch_size:
            _scale(trainer.optimizers[0], self._batch_size / self._samples)
        self._window += self._samples

    def before_step(self, trainer: Any, optimizer: Any) -> None:
        """Divide by the samples of the window instead of by the accumulation."""
        whole = trainer.accumulate_grad_batches
        if self._is_last and self._window and whole > 1:
            # A last training_step that returned None has added nothing to the window
            unit = self._samples if self._is_weighted else self._batch_size
            if whole * unit != self._window:
                _scale(optimizer, whole * unit / self._window)
        self._window = 0

    def _samples_in(self, loader: Any, batch: Any, index: int) -> int:
        count = _samples_counted(loader)
        if count is not None:
            # An epoch resumed in its middle goes on with its index, but only a loader with a state with its data
            before = index if hasattr(loader, "load_state_dict") else self._read
            return _left(count, before, self._batch_size)
        (samples,) = _leading(batch)
        return samples

    def _check_readable(self, loader: Any, batch: Any) -> None:
        if _samples_counted(loader) is not None:
            return
        leading = _leading(batch)
        if len(leading) == 1 and (self._is_last or leading == {self._batch_size}):
            return
        raise AutobatchError(
            f"repair_last_window=True has to count the samples of a batch, and the tensors in a batch of "
            f"{self._batch_size} have {_listed(leading)} rows. Leave repair_last_window out, or train from a data set "
            "with a length and no batch sampler of one's own."
        )


def _samples_counted(loader: Any, shards: int = 1) -> int | None:
    """Samples of a rank per epoch, where they are known and all batches but the last are whole."""
    if isinstance(loader, DataLoader) and type(loader.batch_sampler) is BatchSampler:
        return samples_of(loader, shards)
    return None


def _leading(batch: Any) -> set[int]:
    """Rows of the tensors in a batch, which are its samples where they agree."""
    rows: set[int] = set()
    applying = importlib.import_module("lightning_utilities.core.apply_func")
    applying.apply_to_collection(batch, torch.Tensor, lambda tensor: rows.update(tensor.shape[:1]))
    return rows


def _listed(rows: set[int]) -> str:
    return ", ".join(map(str, sorted(rows))) or "no"


def _scale(optimizer: Any, factor: float) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def _evaluated_again(optimizer: str) -> str:
    return (
        f"repair_last_window=True weights each micro-batch once, and {optimizer} evaluates one several times in a "
        "step, which under accumulation adds up all their gradients. Leave repair_last_window out."
    )
