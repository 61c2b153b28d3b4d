"""The NoiseScale callback."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, fields, is_dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.parallel import DistributedDataParallel

from autobatch._memory.oom import is_oom
from autobatch._noise.hooks import (
    GradientNormHook,
    GradientNorms,
    NoiseRecord,
    obstacle,
    squared_norm,
)
from autobatch._noise.loop import checked_every
from autobatch._report.units import plain
from autobatch._trials.snapshot import Snapshot
from autobatch.errors import AutobatchError
from autobatch.lightning._compat import callback_class
from autobatch.lightning._isolation import silenced

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from autobatch._noise import NoiseReading


# What NoiseScale uses of a Trainer of Lightning 2.6 that Lightning does not promise to keep
_PRIVATE: Final = (
    "fit_loop._data_fetcher",
    "fit_loop.epoch_loop._batches_that_stepped",
    "fit_loop.epoch_loop._build_kwargs",
    "fit_loop.epoch_loop._should_accumulate",
)

_KEY: Final = "autobatch.NoiseScale"  # in a checkpoint


if TYPE_CHECKING:
    _Callback: type = object
else:
    _Callback = callback_class()


class NoiseScale(_Callback):  # type: ignore[misc]  # a class made at run time
    """Measures the gradient noise scale while a Trainer trains, and changes nothing of the training.

    It compares the gradients of micro-batches, of all ranks, with that of the update they add up to. Where an update
    is one batch on one device, it runs the training step once more in some updates, on half of the batch, and gives
    back what that changes in the module and in the random state. Where `AutoBatch` is in the same Trainer, the report
    is completed with the reading when training ends. Loggers get `noise_scale`, `noise_scale_low` and
    `noise_scale_high`.

    Args:
        every: Measure one update in so many.
        split_every: The same where an update is one batch on one device.

    Raises:
        ValueError: An argument is not what it should be.

    Example:
        >>> noise = NoiseScale()  # doctest: +SKIP
        >>> trainer = pl.Trainer(callbacks=[noise], accumulate_grad_batches=4)  # doctest: +SKIP
        >>> trainer.fit(model, loader)  # doctest: +SKIP
        >>> noise.reading.samples  # doctest: +SKIP
    """

    def __init__(self, *, every: int = 5, split_every: int = 20) -> None:
        super().__init__()
        self._every = checked_every(every)
        try:
            self._split_every = checked_every(split_every)
        except ValueError as error:
            raise ValueError(f"split_{error}") from None
        self._record = NoiseRecord()
        self._gauge = GradientNormHook()
        self._reset()

    def _reset(self) -> None:
        self._gauge.close()
        self._halves = HalfBatch()
        self._world_size = 1
        self._group: Any | None = None
        self._is_within = False  # an update, between its first batch and its step
        self._is_split = False  # by this callback, since it is of one batch
        self._is_last = False  # this batch, of its update
        self._sizes: list[int | None] = []  # samples of its batches
        self._unit: float | torch.Tensor = 1.0
        self._taken: GradientNorms | None = None
        self._logged = 0  # the last update of the reading that was logged

    @property
    def reading(self) -> NoiseReading:
        """The noise scale by what was measured so far."""
        return self._record.reading

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin anew with every fit."""
        alike = [each for each in trainer.callbacks if isinstance(each, NoiseScale)]
        if len(alike) > 1:
            raise AutobatchError(
                f"callbacks holds {len(alike)} NoiseScale, and a Trainer takes one: their readings would be the same."
            )
        if stage == "fit":
            self._record = NoiseRecord()
            self._reset()

    # Not by `state_dict`: of two callbacks that have one, Lightning 2.6 speaks before `setup` can say what is wrong

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the windows measured, in plain numbers."""
        checkpoint[_KEY] = self._record.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on with them."""
        if _KEY in checkpoint:
            self._record.load_state_dict(checkpoint[_KEY])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look whether anything can be measured; all ranks find the same."""
        why = _obstacle(trainer, pl_module)
        if why is not None:
            self._record.give_up(why)
        elif trainer.world_size > 1:
            self._group = trainer.strategy.model.process_group
            self._world_size = trainer.world_size

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin with an update, where it is one of those to be measured."""
        # A rank that has given up still answers the others
        if self._record.obstacle is not None and self._world_size == 1:
            return
        loop = trainer.fit_loop.epoch_loop
        self._is_last = not loop._should_accumulate()
        if not self._is_within:
            self._begin(trainer, pl_module)
        if self._gauge.is_open:
            self._sizes.append(_samples(trainer, batch))
        self._batch, self._index = batch, batch_idx

    def _begin(self, trainer: Any, module: Any) -> None:
        self._is_within = True
        self._sizes = []
        self._taken = None
        parts = trainer.accumulate_grad_batches * self._world_size
        self._is_split = parts == 1
        every = self._split_every if self._is_split else self._every
        is_measured = self._record.updates % every == 0
        self._is_split &= is_measured
        if is_measured and not self._is_split:
            self._gauge.open(module.parameters())

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Measure the update's gradient, before anything unscales or clips it."""
        if not self._is_last:
            return
        if self._gauge.is_open:
            self._gauge.take_whole()
            self._unit = _unit(trainer)
        elif self._is_split:
            self._split(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what was measured, once the optimizer has stepped."""
        self._batch = None
        if not (self._is_within and self._is_last):
            return
        if self._gauge.is_open:
            self._record.watch_rate(trainer.optimizers[0])
            self._end(trainer)
        elif self._taken is not None:
            self._record.watch_rate(trainer.optimizers[0])
            self._record.add(self._taken)
        self._is_within = self._is_split = False
        self._record.updates += 1
        interval = trainer.log_every_n_steps
        if interval and self._record.updates % interval == 0:
            self._log(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log, and let no update reach into the next epoch."""
        self._stop()
        self._log(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks away."""
        self._stop()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hooks away."""
        self._stop()

    def _stop(self) -> None:
        self._gauge.close()
        self._is_within = self._is_split = False
        self._batch = None

    def _end(self, trainer: Any) -> None:
        """Keep an update of several backward passes."""
        gauge, passes = self._gauge, self._gauge.passes
        size = self._sizes[0]
        is_whole = passes == len(self._sizes) == trainer.accumulate_grad_batches
        is_even = len(set(self._sizes)) == 1 and size is not None
        sums = gauge.sums(self._group, sound=is_whole and is_even)
        problem = gauge.problem
        gauge.close()
        if problem is not None:
            self._record.give_up(problem)
        elif size is None:
            self._record.skip("the samples of a batch can not be counted")
        elif not is_whole:
            self._record.skip("updates have fewer backward passes than accumulate_grad_batches")
        elif not is_even:
            self._record.skip("the batches of an update differ in size")
        else:
            parts = passes * self._world_size
            self._record.add(
                GradientNorms(
                    update=self._record.updates + 1,
                    passes=passes,
                    world_size=self._world_size,
                    part_size=size,
                    batch_size=parts * size,
                    unit=self._unit,
                    sums=sums,
                )
            )

    def _split(self, trainer: Any, module: Any) -> None:
        """Measure an update of one backward pass by half of its batch."""
        parameters = [each for each in module.parameters() if each.requires_grad]
        try:
            parts = self._halves.measure(trainer, self._batch, self._index, parameters)
        except NotDividedError as error:
            self._record.give_up(f"a batch can not be compared with half of it: {error}")
            return
        except Exception as error:
            told = "memory" if is_oom(error) else plain(f"{type(error).__name__}: {error}")
            self._record.give_up(f"training_step fails on half a batch ({told})")
            return
        nothing = torch.zeros_like(parts.big)
        self._taken = GradientNorms(
            update=self._record.updates + 1,
            passes=1,
            world_size=1,
            part_size=parts.part_size,
            batch_size=parts.batch_size,
            unit=_unit(trainer),
            sums=torch.stack((parts.small, parts.big, nothing, nothing + 1)),
        )

    def _log(self, trainer: Any) -> None:
        """Give the loggers the reading, where it is new and says a number."""
        if not (trainer.loggers and trainer.is_global_zero):
            return
        reading = self.reading
        if reading.state not in {"ok", "at_least"} or reading.last_update == self._logged:
            return
        self._logged = reading.last_update
        values = {
            "noise_scale": reading.samples if reading.state == "ok" else None,
            "noise_scale_low": reading.low,
            "noise_scale_high": reading.high,
        }
        known = {name: value for name, value in values.items() if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(known, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def _obstacle(trainer: Any, module: Any) -> str | None:
    """Why nothing of this run can be measured, if that is plain from the start."""
    for name in _PRIVATE:
        try:
            attrgetter(name)(trainer)
        except AttributeError:
            return f"this Lightning has no {name} where NoiseScale looks for it"
    if not module.automatic_optimization:
        return "the module optimises by hand; autobatch.noise_scale() around its steps can measure that"
    wrapped = trainer.strategy.model
    is_ddp = isinstance(wrapped, DistributedDataParallel)
    if not is_ddp and (wrapped is not module or trainer.world_size > 1):
        return f"{type(trainer.strategy).__name__} keeps whole gradients from view"
    if "DataLoaderIter" in type(trainer.fit_loop._data_fetcher).__name__:
        return "training_step takes its batches from an iterator by itself"
    optimizer = trainer.optimizers[0] if trainer.optimizers else None
    return "there is no optimizer" if optimizer is None else obstacle(module, optimizer)


def _samples(trainer: Any, batch: Any) -> int | None:
    """Samples of a batch: the rows of its tensors, or what its loader says of all but the last."""
    rows = rows_in(batch)
    if len(rows) == 1:
        return rows.pop()
    size = getattr(trainer.train_dataloader, "batch_size", None)
    return size if isinstance(size, int) and not trainer.is_last_batch else None


def _unit(trainer: Any) -> float | torch.Tensor:
    """What Lightning 2.6 multiplies a loss by: one over the accumulation, and the scale of mixed precision."""
    unit: float | torch.Tensor = 1 / trainer.accumulate_grad_batches
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return unit
    # Read without waiting for the device
    scale: torch.Tensor = scaler.scale(torch.ones((), device=trainer.strategy.root_device))
    return scale * unit


_PLAIN: Final = (int, float, complex, bool, str, bytes, type(None))
# How far the gradients of two halves may be from adding up to that of the batch: rounding under bf16 is below
_ADDS_UP: Final = 0.02


class NotDividedError(Exception):
    """Why a batch can not be measured in halves."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What two halves of a batch come to.

    Args:
        small: Mean squared norm of their gradients.
        big: Squared norm of the gradient of both.
        part_size: Harmonic mean of their samples.
        batch_size: Samples of both.
    """

    small: torch.Tensor
    big: torch.Tensor
    part_size: float
    batch_size: int


def rows_in(batch: Any) -> set[int]:
    """Rows of all tensors in a batch, which are its samples where they agree."""
    return {len(leaf) for leaf in _leaves(batch) if _has_rows(leaf)}


class HalfBatch:
    """Runs the training step on halves of a batch, of which training sees nothing.

    The first time both halves are run, on a full copy of the module's state. Where their gradients add up to that of
    the batch, one half tells the other from then on. They do not where a step draws random numbers, as for dropout,
    where it takes statistics over the batch, or where the loss is no mean: then both are run every time.
    """

    def __init__(self) -> None:
        self._add_up: bool | None = None

    def measure(
        self,
        trainer: Any,
        batch: Any,
        index: int,
        parameters: Sequence[torch.nn.Parameter],
    ) -> Parts:
        """Compare half a batch with the batch, whose gradient has just been made.

        Raises:
            NotDividedError: The batch or the module is one that this can not be done with.
        """
        _check(trainer.lightning_module)
        count = _samples_of_batch(batch)
        first, second = count // 2, count - count // 2
        cuts = [(0, first)] if self._add_up else [(0, first), (first, count)]
        made = self._run(trainer, [_cut(batch, count, *cut) for cut in cuts], index, parameters)
        if self._add_up is None:
            _check_seen(parameters, made)
        one, *others = [
            [_of(*each) for each in zip(half, parameters, strict=True)] for half in made
        ]
        whole = [_of(each.grad, each) for each in parameters]
        part_size = 2 * first * second / count
        if not others:
            return Parts(*_from_one(whole, one, first / count), part_size, count)
        (other,) = others
        both = [(a * first + b * second) / count for a, b in zip(one, other, strict=True)]
        if self._add_up is None:
            self._add_up = _near(both, whole)
        return Parts((_norm(one) + _norm(other)) / 2, _norm(both), part_size, count)

    def _run(
        self,
        trainer: Any,
        batches: Sequence[Any],
        index: int,
        parameters: Sequence[torch.nn.Parameter],
    ) -> list[Sequence[torch.Tensor | None]]:
        """The gradients of these batches; the module and the random state are given back."""
        module = trainer.lightning_module
        with Snapshot() as snapshot, silenced(trainer):
            if self._add_up is None:
                snapshot.capture(module)
            else:
                snapshot.capture_beside_parameters(module)
            versions = [each._version for each in module.parameters()]
            vars(module)["log"] = _unlogged  # deleted with all that is new
            made = [_gradient(trainer, each, index, parameters) for each in batches]
            if versions != [each._version for each in module.parameters()]:
                raise NotDividedError("its training_step changes parameters itself")
        return made


def _check(module: Any) -> None:
    for part in module.modules():
        compiled = getattr(part, "_compiled_call_impl", None) is not None
        if compiled or type(part).__name__ == "OptimizedModule":
            raise NotDividedError("torch.compile would compile it anew for half a batch")


def _samples_of_batch(batch: Any) -> int:
    if not all(_is_known(leaf) for leaf in _leaves(batch)):
        raise NotDividedError("its batches are not of tensors in plain containers")
    rows = rows_in(batch)
    if len(rows) != 1:
        told = ", ".join(map(str, sorted(rows))) or "no"
        raise NotDividedError(f"the tensors in its batches have {told} rows")
    (count,) = rows
    if count < 2:  # noqa: PLR2004 -- two halves
        raise NotDividedError("its batches are of one sample")
    return count


def _gradient(
    trainer: Any, batch: Any, index: int, parameters: Sequence[torch.nn.Parameter]
) -> Sequence[torch.Tensor | None]:
    """The gradient of one training step, scaled as that of the batch was; `.grad` is not touched."""
    arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, index)
    with torch.enable_grad(), trainer.precision_plugin.train_step_context():
        output = trainer.lightning_module.training_step(*arguments.values())
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, torch.Tensor):
        raise NotDividedError("its training_step returns no loss for half a batch")
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        loss = scaler.scale(loss)
    with torch.enable_grad():
        return torch.autograd.grad(loss, parameters, allow_unused=True)


def _check_seen(
    parameters: Sequence[torch.nn.Parameter],
    made: Sequence[Sequence[torch.Tensor | None]],
) -> None:
    """Refuse gradients that only a backward pass shows."""
    for parameter, *halves in zip(parameters, *made, strict=True):
        if parameter.grad is not None and all(half is None for half in halves):
            raise NotDividedError(
                "some of its gradients are made by a reentrant checkpoint; use_reentrant=False does without"
            )


def _of(gradient: torch.Tensor | None, parameter: torch.Tensor) -> torch.Tensor:
    if gradient is None:
        return torch.zeros_like(parameter, requires_grad=False)
    gradient = gradient.detach()
    return gradient.to_dense() if gradient.layout is not torch.strided else gradient


def _from_one(
    whole: Sequence[torch.Tensor], one: Sequence[torch.Tensor], share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared norm of two parts and that of the whole, from one part and its share of the samples."""
    big, own = _norm(whole), _norm(one)
    products = [torch.sum(a * b, dtype=torch.float32) for a, b in zip(whole, one, strict=True)]
    product = torch.stack([each.to(big) for each in products]).sum()
    # The other part is (whole - share * one) / (1 - share)
    other = (big - 2 * share * product + share**2 * own) / (1 - share) ** 2
    return (own + other) / 2, big


def _norm(gradient: Sequence[torch.Tensor]) -> torch.Tensor:
    norm = squared_norm(gradient)
    if norm is None:
        raise NotDividedError("no parameter is trained")
    return norm


def _near(both: Sequence[torch.Tensor], whole: Sequence[torch.Tensor]) -> bool:
    off = _norm([a - b for a, b in zip(both, whole, strict=True)])
    return bool(off <= _ADDS_UP**2 * _norm(whole))


def _unlogged(*_: Any, **__: Any) -> None:
    """Stand for `self.log`."""


# Batches


def _leaves(batch: Any) -> Iterator[Any]:
    """What is in the containers of a batch; lists of plain values are left whole."""
    if isinstance(batch, dict):
        for value in batch.values():
            yield from _leaves(value)
    elif isinstance(batch, (list, tuple)) and not _is_plain_list(batch):
        for value in batch:
            yield from _leaves(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from _leaves(getattr(batch, field.name))
    else:
        yield batch


def _is_plain_list(value: Any) -> bool:
    return all(isinstance(each, _PLAIN) for each in value)


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0


def _is_known(leaf: Any) -> bool:
    return isinstance(leaf, (torch.Tensor, list, tuple, *_PLAIN))


def _cut(batch: Any, count: int, start: int, stop: int) -> Any:
    """The samples from `start` to `stop` of a batch of so many, in tensors of their own."""
    if isinstance(batch, torch.Tensor):
        return batch[start:stop].clone() if batch.ndim else batch.clone()
    if isinstance(batch, dict):
        cut = copy.copy(batch)
        for key, value in batch.items():
            cut[key] = _cut(value, count, start, stop)
        return cut
    if isinstance(batch, (list, tuple)) and _is_plain_list(batch):
        return batch[start:stop] if len(batch) == count else batch
    if isinstance(batch, (list, tuple)):
        parts = [_cut(value, count, start, stop) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(
            batch,
            **{
                field.name: _cut(getattr(batch, field.name), count, start, stop)
                for field in fields(batch)
                if field.init
            },
        )
    return batch
