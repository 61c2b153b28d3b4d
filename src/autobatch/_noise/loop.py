"""noise_scale(): measure the gradient noise scale in a plain PyTorch loop."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autobatch._noise import NoiseReading
from autobatch._noise.hooks import GradientNormHook, GradientNorms, NoiseRecord, obstacle


def noise_scale(
    model: torch.nn.Module,
    *,
    micro_batch_size: int,
    optimizer: torch.optim.Optimizer | None = None,
    every: int = 5,
) -> NoiseWatch:
    """Measure the gradient noise scale while the body of a `with` statement trains.

    It compares the gradients of micro-batches with that of the update they are accumulated to, or, through
    `DistributedDataParallel`, those of ranks with that of all: an update has to have two backward passes at least, of
    one micro-batch each, counted over ranks. Training is not changed. How the loss is scaled does not matter, and
    neither does clipping.

    Args:
        model: What is trained; in a job of several processes the `DistributedDataParallel` around it.
        micro_batch_size: Samples per rank and backward pass. An update in which the model gets fewer is left out.
        optimizer: Whose steps end an update. None: the optimizer of the model's parameters that steps first.
        every: Measure one update in so many.

    Returns:
        A context manager, whose `reading` is a `NoiseReading` at any time.

    Raises:
        ValueError: An argument is not what it should be.

    Example:
        >>> with autobatch.noise_scale(model, micro_batch_size=32) as noise:  # doctest: +SKIP
        ...     train()
        >>> noise.reading.samples  # doctest: +SKIP
    """
    if type(micro_batch_size) is not int or micro_batch_size < 1:
        raise ValueError(
            f"micro_batch_size={micro_batch_size!r} is not a number of samples; give a whole number of 1 or more."
        )
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"model={type(model).__name__} has no parameters to watch; give a torch.nn.Module."
        )
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer={type(optimizer).__name__} is no torch.optim.Optimizer; give the one that steps, or None."
        )
    return NoiseWatch(model, micro_batch_size, optimizer, checked_every(every))


def checked_every(every: object) -> int:
    """The interval, refused where it is none."""
    if type(every) is not int or every < 1:
        raise ValueError(
            f"every={every!r} is not an interval in updates; give a whole number of 1 or more, such as 5."
        )
    return every


class NoiseWatch:
    """Measures one update in a few, from where it is entered to where it is left."""

    def __init__(
        self,
        model: torch.nn.Module,
        micro_batch_size: int,
        optimizer: torch.optim.Optimizer | None,
        every: int,
    ) -> None:
        self._model = model
        self._micro_batch_size = micro_batch_size
        self._optimizer = optimizer
        self._every = every
        self._record = NoiseRecord()
        self._gauge = GradientNormHook()
        self._handles: list[Any] = []
        self._group: Any | None = None
        self._world_size = 1
        self._expected = 0  # backward passes of an update, by the last that was measured
        self._is_partial = False
        self._axis: int | None = None  # of the samples in what the model is given
        self._is_left = False

    @property
    def reading(self) -> NoiseReading:
        """The noise scale by what was measured so far."""
        reading = self._record.reading
        # Before the end, an update may still be on its way
        if reading.state == "settling" and self._is_left and not self._record.updates:
            return NoiseReading("unavailable", reason=self._without_updates())
        return reading

    def _without_updates(self) -> str:
        if self._optimizer is not None:
            return "the optimizer that was given never stepped, and its steps end updates"
        return (
            "no torch.optim optimizer of the model's parameters stepped, and its steps end updates"
        )

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError(
                "This noise_scale() is entered already; call noise_scale() for another."
            )
        self._is_left = False
        self._find_ranks()
        why = obstacle(self._model, self._optimizer)
        if why is not None:
            self._record.give_up(why)
        self._handles = [register_optimizer_step_pre_hook(self._before_step)]
        if getattr(self._model, "_compiled_call_impl", None) is None:
            # A hook on a module that was compiled in place would have it compiled anew
            look = self._model.register_forward_pre_hook(self._look, with_kwargs=True)
            self._handles.append(look)
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_left = True
        self._gauge.close()
        while self._handles:
            self._handles.pop().remove()

    def _find_ranks(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        if not together or dist.get_world_size() == 1:
            return
        if isinstance(self._model, DistributedDataParallel):
            self._group = self._model.process_group
            self._world_size = dist.get_world_size(self._group)
        else:
            self._record.give_up(
                "in a job of several processes it has to be given the DistributedDataParallel around the model"
            )

    def _open(self) -> None:
        """Measure the update that begins, where it is one of those to be measured."""
        self._is_partial = False
        # A rank that has given up still answers the others
        goes_on = self._record.obstacle is None or self._world_size > 1
        if goes_on and self._record.updates % self._every == 0:
            self._gauge.open(self._parameters(), self._after_pass)

    def _parameters(self) -> list[torch.Tensor]:
        of_model = self._model.parameters()
        if self._optimizer is None:
            return list(of_model)
        stepped = {id(each) for each in _parameters_of(self._optimizer)}
        return [each for each in of_model if id(each) in stepped]

    def _look(self, _: object, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """See whether the model is given a whole micro-batch."""
        if not self._gauge.is_open:
            return
        for each in (*arguments, *named.values()):
            if isinstance(each, torch.Tensor) and each.ndim:
                self._is_partial |= self._has_fewer(tuple(each.shape))
                return

    def _has_fewer(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor is of fewer samples, which need not be its first dimension."""
        size = self._micro_batch_size
        if self._axis is None and size in shape:
            self._axis = shape.index(size)
        if self._axis is None or self._axis >= len(shape):
            return shape[0] < size
        return shape[self._axis] != size

    def _after_pass(self) -> None:
        if self._gauge.passes >= self._expected:
            self._gauge.take_whole()

    def _before_step(self, optimizer: Any, *_: object) -> None:
        """End an update where the model's optimizer steps."""
        if optimizer is not self._optimizer and not self._adopts(optimizer):
            return
        if self._gauge.is_open:
            self._record.watch_rate(optimizer)
            self._end()
        self._record.updates += 1
        self._open()

    def _adopts(self, optimizer: Any) -> bool:
        own = {id(each) for each in self._model.parameters()}
        if own.isdisjoint(map(id, _parameters_of(optimizer))):
            return False
        if self._optimizer is None:
            self._optimizer = optimizer
            why = obstacle(self._model, optimizer)
            if why is not None:
                self._record.give_up(why)
            return True
        return False

    def _end(self) -> None:
        gauge, passes = self._gauge, self._gauge.passes
        is_usual, self._expected = self._expected in {0, passes}, passes
        sums = gauge.sums(self._group, sound=is_usual and not self._is_partial)
        problem = gauge.problem
        parts = passes * self._world_size
        gauge.close()
        if problem is not None:
            self._record.give_up(problem)
        elif parts == 1:
            self._record.skip(
                "an update has one backward pass, so there are no two batch sizes to compare; accumulate over two or "
                "more micro-batches, or use autobatch.NoiseScale in a Lightning Trainer"
            )
        elif passes == 0:
            self._record.skip("no backward pass reached the model's parameters")
        elif self._world_size == 1 and self._is_partial:
            self._record.skip(
                f"the model is given fewer samples than micro_batch_size={self._micro_batch_size}"
            )
        elif self._world_size == 1 and not is_usual:
            self._record.skip("updates differ in their number of backward passes")
        else:
            self._record.add(
                GradientNorms(
                    update=self._record.updates + 1,
                    passes=passes,
                    world_size=self._world_size,
                    part_size=self._micro_batch_size,
                    batch_size=parts * self._micro_batch_size,
                    unit=1.0,
                    sums=sums,
                )
            )


def _parameters_of(optimizer: Any) -> list[torch.Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]
