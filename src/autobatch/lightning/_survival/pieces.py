"""Results of the pieces of a batch, merged into those of the whole."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._trials.batches import row_counts
from autobatch._undo import patched
from autobatch.lightning._compat import (
    logged_on_step,
    logged_results,
    reduction_on_step,
    set_logged_on_step,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from autobatch.lightning._trainer import Trainer

# Reductions of `self.log` other than the mean
_REDUCTIONS: Final[dict[str, Callable[..., torch.Tensor]]] = {
    "sum": torch.sum,
    "max": torch.amax,
    "min": torch.amin,
}


class Pieces:
    """Samples of the pieces that were run, their outputs, and the values they have logged.

    In words they are "64 done in 2 × 32".
    """

    def __init__(self, trainer: Trainer) -> None:
        self.sizes: list[int] = []
        self.lost_seconds = 0.0  # in attempts that failed
        self._trainer = trainer
        self._outputs: list[dict[str, Any]] = []
        self._logged: list[dict[str, torch.Tensor]] = []

    def __str__(self) -> str:
        is_even = len(set(self.sizes)) == 1
        if is_even:
            cut = f"{len(self.sizes)} × {self.sizes[0]}"
        else:
            cut = " + ".join(map(str, self.sizes))
        return f"{sum(self.sizes)} done in {cut}"

    def add(self, samples: int, outputs: dict[str, Any]) -> None:
        """Add a piece that has just run."""
        self.sizes.append(samples)
        self._outputs.append({name: _detached(value) for name, value in outputs.items()})
        self._logged.append(logged_on_step(self._trainer))

    def merged(self, sums: Collection[str] = ()) -> dict[str, Any]:
        """Return the outputs of all pieces, and reduce values logged on this step.

        Outputs are means over samples, as are values without another `reduce_fx`; those named in
        `sums` are sums of scalars.
        """
        first, *others = self._logged
        for name in first:
            if all(name in each for each in others):
                values = [each[name] for each in self._logged]
                if reduce := _REDUCTIONS.get(reduction_on_step(self._trainer, name)):
                    value = reduce(torch.stack(values), 0)
                else:
                    value = _weighted(values, self._shares)
                set_logged_on_step(self._trainer, name, value)
        return {name: self._merged(name, is_sum=name in sums) for name in self._outputs[0]}

    @property
    def _shares(self) -> list[float]:
        return [samples / sum(self.sizes) for samples in self.sizes]

    def _merged(self, name: str, *, is_sum: bool) -> Any:
        """Return an output of all pieces: rows one after the other, means, or else the last."""
        values: list[Any] = [each.get(name) for each in self._outputs]
        if not all(isinstance(value, torch.Tensor) for value in values):
            return values[-1]
        if all(value.ndim == 0 and value.is_floating_point() for value in values):
            return _weighted(values, [1.0] * len(values) if is_sum else self._shares)
        is_of_samples = all(
            value.ndim and len(value) == samples
            for value, samples in zip(values, self.sizes, strict=True)
        )
        return torch.cat(values) if is_of_samples else values[-1]


@contextmanager
def shown(trainer: Trainer, batch: Any, piece: Any) -> Iterator[None]:
    """Let `self.log` in the body take the batch size from a piece of a batch.

    A `batch_size` that the step gives is scaled to the piece if it is that of the whole batch, or
    of the loader.
    """
    module, results = trainer.lightning_module, logged_results(trainer)
    samples, total = max(row_counts(piece)), max(row_counts(batch))
    of_whole = {total, *_loader_batch_sizes(trainer)} - {samples, None}
    log = module.log

    def log_piece(*arguments: Any, **options: Any) -> None:
        if options.get("batch_size") in of_whole:
            options["batch_size"] *= samples / total
        log(*arguments, **options)

    try:
        results.batch, results.batch_size = piece, None
        with patched(module, log=log_piece):
            yield
    finally:
        results.batch, results.batch_size = batch, None


def _loader_batch_sizes(trainer: Trainer) -> set[int | None]:
    """Return the batch sizes of the loaders of this stage."""
    if trainer.training:
        loaders = trainer.train_dataloader
    else:
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    each = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    return {getattr(loader, "batch_size", None) for loader in each}


def _weighted(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    pairs = zip(values, weights, strict=True)
    return torch.stack([value * weight for value, weight in pairs]).sum(0)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
