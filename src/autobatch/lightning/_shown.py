"""Loaders and numbers of batches that a Trainer shows to steps, at the batch size of a trial."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from math import inf
from typing import TYPE_CHECKING, Any

from torch.utils.data import RandomSampler

from autobatch._loaders.epochs import length_of
from autobatch._undo import patched
from autobatch.lightning._compat import (
    combined_loader,
    data_source,
    prepared_loader,
    showing_evaluation,
    showing_training,
    validation_interval,
)
from autobatch.lightning._package import Imported

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from autobatch.lightning._dataloaders import Loaders
    from autobatch.lightning._trainer import CombinedLoader, PredictionLoop, Trainer


@contextmanager
def training_shown(trainer: Trainer, loaders: Loaders, batch_size: int) -> Iterator[int | float]:
    """Show the training loaders at a batch size while the body runs; yield batches per epoch."""
    with loaders.at(batch_size) as combined:
        shown = _distributed(trainer, combined, loaders.shards)
        batches = loaders.epoch_length(_lengths(shown, trainer.limit_train_batches))
        with (
            showing_training(trainer.fit_loop, shown, batches),
            patched(trainer, val_check_batch=_val_check_batch(trainer, batches)),
        ):
            yield batches


@contextmanager
def evaluation_shown(
    trainer: Trainer, loop: PredictionLoop, loaders: Loaders, batch_size: int, limit: float
) -> Iterator[Sequence[int | float]]:
    """Show the loaders of another loop while the body runs; yield the batches of each."""
    with loaders.at(batch_size) as combined:
        shown = _distributed(trainer, combined, loaders.shards)
        batches = _lengths(shown, limit)
        with showing_evaluation(loop, shown, batches):
            yield batches


def show_validation(trainer: Trainer) -> None:
    """Ask for the validation loaders, as the Trainer does before it trains; for scratch loops."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if not trainer.enable_validation or combined_loader(loop) is not None:
        return
    given, kind = data_source(loop).dataloader(), Imported.COMBINED_LOADER.of(trainer)
    shown = given if isinstance(given, kind) else kind(given, "sequential")
    showing_evaluation(loop, shown, _lengths(shown, trainer.limit_val_batches)).apply()


def _val_check_batch(trainer: Trainer, batches: float) -> int | float | None:
    """Return the batches between validations, as `_FitLoop.setup_data` of Lightning 2.6."""
    interval = validation_interval(trainer)
    if interval is None or isinstance(interval, int):
        return interval
    return inf if batches == inf else max(1, int(batches * interval))


def _distributed(
    trainer: Trainer, loaders: CombinedLoader, shards: Sequence[int]
) -> CombinedLoader:
    """Return the loaders of this rank, if Lightning will distribute their samples over ranks."""
    if max(shards, default=1) == 1:
        return loaders
    shown = copy.copy(loaders)
    shown.flattened = [
        _of_this_rank(trainer, loader) if ranks > 1 else loader
        for loader, ranks in zip(loaders.flattened, shards, strict=True)
    ]
    return shown


def _of_this_rank(trainer: Trainer, loader: Any) -> Any:
    # Lightning 2.6 shuffles whatever it trains on
    shuffle = trainer.training or isinstance(loader.sampler, RandomSampler)
    try:
        return prepared_loader(trainer, loader, shuffle=shuffle, mode=trainer.state.stage)
    except Exception:
        # A loader of a class of the user's, which Lightning can copy only if it saw it being made
        return loader


def _lengths(loaders: CombinedLoader, limit: float) -> list[int | float]:
    """Return the batches of each loader, with a limit as `_parse_num_batches` of Lightning 2.6."""
    # Lightning counts the batches of a loader without a length as infinite, too
    lengths = [length_of(loader) for loader in loaders.flattened]
    return [limited(inf if length is None else length, limit) for length in lengths]


def limited(length: float, limit: float) -> int | float:
    """Return the batches that Lightning takes of a loader: up to a number, or a share."""
    if isinstance(limit, int):
        return min(length, limit)
    return length if length == inf else int(length * limit)
