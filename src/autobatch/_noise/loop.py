"""noise_scale(): measure the gradient noise scale in a plain PyTorch loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autobatch._noise import NoiseReading
from autobatch._noise.hooks import GradientNormHook, NoiseRecord, is_compiled, obstacle


def noise_scale(
    model: torch.nn.Module,
    *,
    micro_batch_size: int,
    optimizer: torch.optim.Optimizer | None = None,
    every: int = 5,
) -> NoiseWatch:
    """Measure the gradient noise scale while the body of a `with` statement trains.

    It compares the gradients of micro-batches with the gradient of the update they accumulate to.
    With `DistributedDataParallel` it compares the gradients of ranks as well. An update needs two
    backward passes at least, counted over ranks, of one micro-batch each. Training is not changed.
    Scaling of the loss and gradient clipping have no effect.

    Args:
        model: The trained module; in a job of several processes, the `DistributedDataParallel`
            around it.
        micro_batch_size: Samples per rank and backward pass. An update with fewer is left out.
        optimizer: The optimizer whose steps end an update. None: the first optimizer of the
            model's parameters that steps.
        every: Interval of the measured updates, in updates.

    Returns:
        A context manager with a `reading`, a `NoiseReading`, at any time.

    Raises:
        ValueError: An argument is invalid.

    Example:
        >>> with autobatch.noise_scale(model, micro_batch_size=32) as noise:  # doctest: +SKIP
        ...     train()
        >>> noise.reading.samples  # doctest: +SKIP
    """
    if type(micro_batch_size) is not int or micro_batch_size < 1:
        raise ValueError(
            f"micro_batch_size={micro_batch_size!r} is not a number of samples; "
            "give a whole number of 1 or more."
        )
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"model={type(model).__name__} has no parameters to watch; give a torch.nn.Module."
        )
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer={type(optimizer).__name__} is no torch.optim.Optimizer; "
            "give the optimizer that steps, or None."
        )
    return NoiseWatch(model, micro_batch_size, optimizer, checked_interval("every", every))


def checked_interval(name: str, interval: object) -> int:
    """Return an interval in updates; `ValueError` for anything else."""
    if type(interval) is not int or interval < 1:
        raise ValueError(
            f"{name}={interval!r} is not an interval in updates; "
            "give a whole number of 1 or more, such as 5."
        )
    return interval


@dataclass(eq=False, repr=False)
class NoiseWatch:
    """Measures every few updates between `__enter__` and `__exit__`."""

    model: torch.nn.Module
    micro_batch_size: int
    optimizer: torch.optim.Optimizer | None
    every: int
    _record: NoiseRecord = field(default_factory=NoiseRecord)
    _hook: GradientNormHook = field(default_factory=GradientNormHook)
    _handles: list[Any] = field(default_factory=list)
    _group: Any | None = None
    _world_size: int = 1
    _usual_passes: int = 0  # backward passes of the last measured update
    _is_partial: bool = False  # an input of this update has fewer samples
    _batch_axis: int | None = None  # of the model's inputs
    _has_ended: bool = False

    @property
    def reading(self) -> NoiseReading:
        """The noise scale measured so far."""
        reading = self._record.reading
        # Before the end, the first update may still come
        if reading.state != "settling" or not self._has_ended or self._record.updates:
            return reading
        reason = "no torch.optim optimizer of the model's parameters stepped"
        if self.optimizer is not None:
            reason = "the optimizer that was given never stepped"
        return NoiseReading("unavailable", reason=f"{reason}, and its steps end updates")

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError(
                "This noise_scale() is entered already; call noise_scale() for another."
            )
        self._has_ended = False
        self._find_ranks()
        self._record.give_up(obstacle(self.model, self.optimizer))
        self._handles.append(register_optimizer_step_pre_hook(self._before_step))
        if not is_compiled(self.model):
            # A hook would make a module that was compiled in place compile again
            hook = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            self._handles.append(hook)
        self._begin_update()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended = True
        self._hook.close()
        while self._handles:
            self._handles.pop().remove()

    def _find_ranks(self) -> None:
        is_distributed = dist.is_available() and dist.is_initialized()
        if not is_distributed or dist.get_world_size() == 1:
            return
        if isinstance(self.model, DistributedDataParallel):
            self._group = self.model.process_group
            self._world_size = dist.get_world_size(self._group)
        else:
            self._record.give_up(
                "in a job of several processes it has to be given the DistributedDataParallel "
                "around the model"
            )

    def _begin_update(self) -> None:
        self._is_partial = False
        # A rank with an obstacle still takes part in the sums of the other ranks
        goes_on = self._record.obstacle is None or self._world_size > 1
        if goes_on and self._record.updates % self.every == 0:
            self._hook.open(self._parameters(), self._after_pass)

    def _parameters(self) -> list[torch.Tensor]:
        parameters: list[torch.Tensor] = list(self.model.parameters())
        if self.optimizer is None:
            return parameters
        stepped = {id(each) for each in _parameters_of(self.optimizer)}
        return [each for each in parameters if id(each) in stepped]

    def _before_forward(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the first tensor among the inputs for a whole micro-batch."""
        if not self._hook.is_open:
            return
        for each in (*args, *kwargs.values()):
            if isinstance(each, torch.Tensor) and each.ndim:
                self._is_partial |= self._has_fewer_samples(tuple(each.shape))
                return

    def _has_fewer_samples(self, shape: tuple[int, ...]) -> bool:
        """Check a shape; the batch dimension need not be the first."""
        size = self.micro_batch_size
        if self._batch_axis is None and size in shape:
            self._batch_axis = shape.index(size)
        if self._batch_axis is None or self._batch_axis >= len(shape):
            return shape[0] < size
        return shape[self._batch_axis] != size

    def _after_pass(self) -> None:
        if self._hook.passes >= self._usual_passes:
            self._hook.take_whole()

    def _before_step(self, optimizer: Any, *_: object) -> None:
        """End an update when the model's optimizer steps."""
        if optimizer is not self.optimizer and not self._adopts(optimizer):
            return
        if self._hook.is_open:
            self._record.watch_rate(optimizer)
            self._end_update()
        self._record.updates += 1
        self._begin_update()

    def _adopts(self, optimizer: Any) -> bool:
        """Take the first optimizer of the model's parameters for the one that ends updates."""
        parameters = {id(each) for each in self.model.parameters()}
        is_other = parameters.isdisjoint(map(id, _parameters_of(optimizer)))
        if is_other or self.optimizer is not None:
            return False
        self.optimizer = optimizer
        self._record.give_up(obstacle(self.model, optimizer))
        return True

    def _end_update(self) -> None:
        passes = self._hook.passes
        is_usual, self._usual_passes = self._usual_passes in {0, passes}, passes
        self._record.end_update(
            self._hook,
            self._flaw(passes, is_usual=is_usual),
            group=self._group,
            world_size=self._world_size,
            part_size=self.micro_batch_size,
            unit=1.0,
        )

    def _flaw(self, passes: int, *, is_usual: bool) -> str | None:
        """Return a reason not to count an update of this rank."""
        if passes * self._world_size == 1:
            return (
                "an update has one backward pass, so there are no two batch sizes to compare; "
                "accumulate over two or more micro-batches, or use autobatch.NoiseScale in a "
                "Lightning Trainer"
            )
        if passes == 0:
            return "no backward pass reached the model's parameters"
        if self._is_partial:
            return f"the model is given fewer samples than micro_batch_size={self.micro_batch_size}"
        return None if is_usual else "updates differ in their number of backward passes"


def _parameters_of(optimizer: Any) -> list[torch.Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]
