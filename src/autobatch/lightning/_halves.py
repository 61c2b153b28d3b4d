"""Half a batch beside the batch: a second batch size where an update has one backward pass only."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._gradients import squared_norm
from autobatch._snapshot import Snapshot
from autobatch.lightning._scratch import silenced

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Halves", "NotDividedError", "Parts", "rows_in"]

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


class Halves:
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
        count = _samples(batch)
        first, second = count // 2, count - count // 2
        cuts = [(0, first)] if self._add_up else [(0, first), (first, count)]
        made = self._run(
            trainer, [_cut(batch, count, *cut) for cut in cuts], index, parameters
        )
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
        both = [
            (a * first + b * second) / count for a, b in zip(one, other, strict=True)
        ]
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
            raise NotDividedError(
                "torch.compile would compile it anew for half a batch"
            )


def _samples(batch: Any) -> int:
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
    products = [
        torch.sum(a * b, dtype=torch.float32) for a, b in zip(whole, one, strict=True)
    ]
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
