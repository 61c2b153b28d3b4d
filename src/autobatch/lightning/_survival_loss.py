"""Test of whether the loss of a training step may be computed in pieces."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from autobatch._accumulation import Splitting, UndecidedError, compare_halves, without_dropout
from autobatch._memory.ledger import eager
from autobatch._memory.oom import is_oom
from autobatch._report.units import percent
from autobatch._trials.batches import divisible_samples, view
from autobatch._trials.snapshot import Snapshot
from autobatch._undo import Undo
from autobatch.lightning._accumulation import THRESHOLDS
from autobatch.lightning._half_batch import log_nothing, step_gradient
from autobatch.lightning._isolation import silenced
from autobatch.lightning._survival_state import NotUndoneError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from autobatch.lightning._trainer import Trainer

_log = logging.getLogger("autobatch")

_MAX_SAMPLES: Final = 8  # and half of the batch: memory has just run out
_MOST_ELEMENTS: Final = 2**20  # of the gradients that are compared, from the smallest on


def is_sum(
    trainer: Trainer, batch: Any, index: int, parameters: Sequence[torch.Tensor]
) -> bool | None:
    """Return True if a loss is a sum over samples, False for a mean; restore all state.

    It compares the gradient of a few samples with that of their halves, without dropout and batch
    statistics. None if it cannot tell, since random numbers or rounding hide the difference, or
    memory is too short.

    Raises:
        NotUndoneError: The loss mixes samples.
    """
    samples = divisible_samples(batch)
    for count in few(samples):
        rows = view(batch, samples, slice(0, count))
        try:
            found = _measured(trainer, rows, count, index, parameters)
            break
        except Exception as error:
            _log.debug("Splitting the batch was not tested with %s samples: %r", count, error)
            if not is_oom(error):
                return None
    else:
        return None
    if found is None:
        return False
    if found.is_sum:
        return True
    raise NotUndoneError(
        f"its loss mixes samples or does not weigh them equally: halves of a batch of {count} "
        f"change the gradient by {percent(found.change)} of its norm"
    )


def few(samples: int) -> Iterator[int]:
    """Yield even numbers of samples that a test takes of a batch, fewer as long as none fits."""
    count = max(2, min(samples // 2, _MAX_SAMPLES) // 2 * 2)
    while count:
        yield count
        count = count // 4 * 2


def _measured(
    trainer: Trainer, batch: Any, samples: int, index: int, parameters: Sequence[torch.Tensor]
) -> Splitting | None:
    module = trainer.lightning_module
    if trainer.precision not in THRESHOLDS:
        raise UndecidedError(f"precision={trainer.precision!r} rounds too much")
    weights = _smallest(parameters)
    with Snapshot() as snapshot, silenced(trainer):
        snapshot.capture_beside_parameters(module)
        vars(module)["log"] = log_nothing  # the snapshot deletes it, as everything new
        gradient = partial(_gradient, trainer, index, weights)
        with without_dropout(module), _without_batch_statistics(module), eager():
            return compare_halves(gradient, batch, samples, THRESHOLDS[trainer.precision])


def _gradient(trainer: Trainer, index: int, weights: Sequence[Any], batch: Any) -> Any:
    return step_gradient(trainer, batch, index, weights)


def _smallest(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the smallest parameters, whose gradients are small as well; at least one."""
    taken: list[torch.Tensor] = []
    elements = 0
    for each in sorted((p for p in parameters if p.requires_grad), key=torch.numel):
        elements += each.numel()
        if taken and elements > _MOST_ELEMENTS:
            break
        taken.append(each)
    return taken


@contextmanager
def _without_batch_statistics(module: torch.nn.Module) -> Iterator[None]:
    """Let BatchNorm normalize with its running statistics."""
    with Undo() as undo:
        for part in module.modules():
            if isinstance(part, _BatchNorm) and part.training:
                if part.running_mean is None:
                    raise UndecidedError("a BatchNorm has no running statistics")
                undo.add(partial(setattr, part, "training", True))
                part.training = False
        yield
