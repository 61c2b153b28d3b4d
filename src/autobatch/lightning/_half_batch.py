"""Gradient of half a batch, beside the training step of a Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._noise.hooks import GradientNorms, is_compiled, real, squared_norm, write_counts
from autobatch._trials.batches import NotDividedError, cut, divisible_samples
from autobatch._trials.snapshot import Snapshot
from autobatch.lightning._compat import build_step_kwargs
from autobatch.lightning._isolation import silenced

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.nn import Parameter

# The mean gradient of two halves may differ from the gradient of the batch by this share of its
# norm; rounding under bf16 is below
_ROUNDING: Final = 0.02


class HalfBatch:
    """Runs the training step on halves of a batch, without a trace in training.

    The first time it runs both halves, with a full snapshot of the module's state. If their
    gradients add up to the gradient of the batch, the gradient of one half follows from the other,
    and later only one half runs. Otherwise both halves run every time: a step may draw random
    numbers, as for dropout, or use batch statistics, or its loss may not be a mean.
    """

    def __init__(self) -> None:
        self._add_up: bool | None = None  # None until the first time

    def measure(
        self, trainer: Any, batch: Any, index: int, *, update: int, unit: float | torch.Tensor
    ) -> GradientNorms:
        """Return the norms of an update of one batch, whose gradient is in `.grad`, and its halves.

        Raises:
            NotDividedError: The batch or the module cannot be measured in halves.
        """
        parts = trainer.lightning_module.modules()
        parameters = [each for each in trainer.lightning_module.parameters() if each.requires_grad]
        if any(is_compiled(part) or type(part).__name__ == "OptimizedModule" for part in parts):
            raise NotDividedError("torch.compile would compile it again for half a batch")
        samples = divisible_samples(batch)
        first, second = samples // 2, samples - samples // 2
        rows = [slice(0, first)] if self._add_up else [slice(0, first), slice(first, samples)]
        halves = [cut(batch, samples, each) for each in rows]
        gradients = self._gradients(trainer, halves, index, parameters)
        if self._add_up is None:
            _check_no_reentrant_checkpoint(parameters, gradients)
        one, *rest = [
            [_dense(*pair) for pair in zip(gradient, parameters, strict=True)]
            for gradient in gradients
        ]
        whole = [_dense(parameter.grad, parameter) for parameter in parameters]
        if rest:
            (other,) = rest
            both = [(a * first + b * second) / samples for a, b in zip(one, other, strict=True)]
            if self._add_up is None:
                self._add_up = _is_near(both, whole)
            small, big = (_norm(one) + _norm(other)) / 2, _norm(both)
        else:
            small, big = _norms_from_one(whole, one, first / samples)
        before = torch.zeros_like(big)
        sums = torch.stack((small, big, before, before + 1))
        return GradientNorms(
            update,
            passes=1,
            world_size=1,
            part_size=2 * first * second / samples,
            batch_size=samples,
            unit=unit,
            sums=sums,
        )

    def _gradients(
        self, trainer: Any, batches: Sequence[Any], index: int, parameters: Sequence[Parameter]
    ) -> list[Sequence[torch.Tensor | None]]:
        """Return the gradients of batches, and restore the module and the random state."""
        module = trainer.lightning_module
        with Snapshot() as snapshot, silenced(trainer):
            if self._add_up is None:
                snapshot.capture(module)
            else:
                snapshot.capture_beside_parameters(module)
            known = snapshot.parameters
            before = write_counts(known)
            vars(module)["log"] = log_nothing  # the snapshot deletes it, as everything new
            gradients = [step_gradient(trainer, each, index, parameters) for each in batches]
            if before != write_counts(known):
                raise NotDividedError("its training_step changes parameters itself")
        return gradients


def step_gradient(
    trainer: Any, batch: Any, index: int, parameters: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor | None]:
    """Return the gradient of one training step, scaled as in training; `.grad` stays as it is."""
    arguments = build_step_kwargs(trainer.fit_loop.epoch_loop, batch, index)
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


def _check_no_reentrant_checkpoint(
    parameters: Sequence[Parameter], gradients: Sequence[Sequence[torch.Tensor | None]]
) -> None:
    """Refuse gradients that only `backward()` makes, and `torch.autograd.grad` does not."""
    for parameter, *halves in zip(parameters, *gradients, strict=True):
        if parameter.grad is not None and all(half is None for half in halves):
            raise NotDividedError(
                "some of its gradients are made by a reentrant checkpoint; use use_reentrant=False"
            )


def _dense(gradient: torch.Tensor | None, parameter: torch.Tensor) -> torch.Tensor:
    if gradient is None:
        return real(torch.zeros_like(parameter, requires_grad=False))
    gradient = gradient.detach()
    return real(gradient.to_dense() if gradient.layout is not torch.strided else gradient)


def _norms_from_one(
    whole: Sequence[torch.Tensor], one: Sequence[torch.Tensor], share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean squared norm of two parts and the squared norm of the whole.

    The other part follows from one part and its share of the samples:
    (whole - share * one) / (1 - share).
    """
    big, own = _norm(whole), _norm(one)
    products = [torch.sum(a * b, dtype=big.dtype) for a, b in zip(whole, one, strict=True)]
    product = torch.stack([each.to(big) for each in products]).sum()
    other = (big - 2 * share * product + share**2 * own) / (1 - share) ** 2
    return (own + other) / 2, big


def _norm(gradient: Sequence[torch.Tensor]) -> torch.Tensor:
    norm = squared_norm(gradient)
    if norm is None:
        raise NotDividedError("no parameter is trained")
    return norm


def _is_near(both: Sequence[torch.Tensor], whole: Sequence[torch.Tensor]) -> bool:
    difference = _norm([a - b for a, b in zip(both, whole, strict=True)])
    return bool(difference <= _ROUNDING**2 * _norm(whole))


def log_nothing(*_: Any, **__: Any) -> None:
    """Replace `self.log`."""
