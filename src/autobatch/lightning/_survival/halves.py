"""Tests of whether results of the pieces of a batch are those of the whole batch."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from autobatch._accumulation import UndecidedError, compare_halves, without_dropout
from autobatch._memory.ledger import eager
from autobatch._memory.oom import is_oom
from autobatch._report.units import percent
from autobatch._trials.batches import divisible_samples, is_plain_list, leaves, map_leaves
from autobatch._trials.snapshot import Snapshot
from autobatch._undo import Undo
from autobatch.lightning._accumulation import THRESHOLDS
from autobatch.lightning._half_batch import log_nothing, step_gradient
from autobatch.lightning._isolation import silenced
from autobatch.lightning._survival.state import Kept, NotUndoneError, is_metric

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from autobatch._accumulation import Splitting
    from autobatch.lightning._trainer import Trainer

_log = logging.getLogger("autobatch")

_MAX_SAMPLES: Final = 8  # and half of the batch: memory has just run out
# Of the gradients that are compared, from the smallest on, and of rows that are summed at a time
_MOST_ELEMENTS: Final = 2**20
_MOST_VALUES: Final = 8  # of a sample in a mask or in labels; an image has more
_LARGE_SUM: Final = 2.0**60  # in place of infinity, as in additive masks
# Share of the norm by which results of halves may differ: of 16 bits, and of others
_ROUNDING: Final = {2: 0.03, 4: 1e-3, 8: 1e-6}


def is_sum(
    trainer: Trainer, kept: Kept, index: int, parameters: Sequence[torch.Tensor]
) -> bool | None:
    """Return True if a loss is a sum over samples, False for a mean; restore all state.

    It compares the gradient of a few samples with that of their halves, without dropout and batch
    statistics. None if it cannot tell, since random numbers or rounding hide the difference, or
    memory is too short. Metrics that differ as well are named in the log.

    Raises:
        NotUndoneError: The loss mixes samples.
    """
    for count in few(divisible_samples(kept.batch)):
        try:
            found = _measured(trainer, kept, count, index, parameters)
            break
        except NotUndoneError:
            raise
        except Exception as error:
            _log.debug("Splitting the batch was not tested with %s samples: %r", count, error)
            if not is_oom(error):
                return None
    else:
        return None
    if found is None or found.is_sum:
        return found is not None
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


def telling_samples(batch: Any, count: int) -> Any:
    """Return the samples of a batch that differ most in their labels and masks, in copies.

    Labels that a loss ignores, such as -100 or 255, then are among them, and more of them in one
    half than in the other, and so are the shortest and the longest of masked samples. Without tensors
    of few whole numbers these are the first samples.
    """
    samples = divisible_samples(batch)
    rows = _extremes([leaf for leaf in leaves(batch) if _may_be_mask(leaf)], count) or range(count)

    def take(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf[[*rows]] if leaf.ndim else leaf
        is_row_each = is_plain_list(leaf) and len(leaf) == samples
        return [leaf[row] for row in rows] if is_row_each else leaf

    return map_leaves(take, batch)


def metric_states(parts: Iterable[tuple[str, object]]) -> dict[str, torch.Tensor]:
    """Return copies of the states of metrics of torchmetrics, by their names."""
    return {
        f"{name}.{state}": torch.cat([each.flatten() for each in values])
        for name, metric in parts
        if is_metric(metric)
        for state, value in getattr(metric, "metric_state", {}).items()
        if not isinstance(value, dict)  # of a metric within a collection, which comes by itself
        if (values := value if isinstance(value, list) else [value])
    }


def is_near(one: Any, other: Any) -> bool:
    """Return True for tensors that are equal up to rounding, and for no results."""
    if one is None and other is None:
        return True
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    if one.shape != other.shape:
        return False
    rounding = _ROUNDING[max(2, min(8, one.element_size()))] if one.is_floating_point() else 0
    one, other = one.double(), other.double()
    return bool((one - other).norm() <= rounding * one.norm())


def _measured(
    trainer: Trainer, kept: Kept, count: int, index: int, parameters: Sequence[torch.Tensor]
) -> Splitting | None:
    """Compare gradients, and warn of metrics that differ."""
    module = trainer.lightning_module
    if trainer.precision not in THRESHOLDS:
        raise UndecidedError(f"precision={trainer.precision!r} rounds too much")
    weights = _smallest(parameters)
    states: list[dict[str, torch.Tensor]] = []  # of metrics, after each step

    def gradient(batch: Any) -> Sequence[torch.Tensor | None]:
        if len(states) == 2:  # noqa: PLR2004 -- both halves have run, the whole follows
            kept.restore()
        vars(module)["log"] = log_nothing  # restoring deletes it, as everything new
        made = step_gradient(trainer, batch, index, weights)
        states.append(metric_states(module.named_modules()))
        return made

    samples = telling_samples(kept.batch, count)
    with Snapshot() as snapshot, silenced(trainer):
        snapshot.capture_beside_parameters(module)
        with without_dropout(module), _without_batch_statistics(module), eager():
            found = compare_halves(gradient, samples, count, THRESHOLDS[trainer.precision])
    _, halves, whole, *_ = states
    differ = {name.rpartition(".")[0] for name in whole if not is_near(whole[name], halves[name])}
    if differ:
        _log.warning(
            "%s: updated once per batch, in which each piece counts as a batch",
            ", ".join(sorted(differ)),
        )
    return found


def _may_be_mask(leaf: Any) -> bool:
    """Check for a tensor of integers, or of floats: a few whole numbers in its first sample."""
    if not isinstance(leaf, torch.Tensor) or not leaf.ndim or not leaf.numel() or leaf.is_complex():
        return False
    if not leaf.is_floating_point():
        return True
    values = leaf[0].unique()
    return len(values) <= _MOST_VALUES and bool((values == values.round()).all())


def _extremes(tensors: list[torch.Tensor], count: int) -> list[int]:
    """Return rows with low and high sums: most of the low ones first, then most of the high ones."""
    if not tensors:
        return []
    sums = [_sums_of_rows(each) for each in tensors]
    # In standard deviations, and in the tensor where a row deviates most
    scores = torch.stack([(each - each.mean()) / (each.std() + 1e-9) for each in sums])
    score = scores.gather(0, scores.abs().argmax(0, keepdim=True))[0]
    order = score.argsort(stable=True).tolist()
    low, high = order[: count // 2], order[: -1 - count // 2 : -1]
    low[-1], high[-1] = high[-1], low[-1]
    return low + high


def _sums_of_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return finite sums of rows, a few rows at a time: sums of another type copy their tensor."""
    few_rows = max(1, _MOST_ELEMENTS // tensor[0].numel())
    parts = [
        part.reshape(len(part), -1).sum(1, dtype=torch.double) for part in tensor.split(few_rows)
    ]
    return torch.cat(parts).cpu().clamp(-_LARGE_SUM, _LARGE_SUM).nan_to_num()


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
