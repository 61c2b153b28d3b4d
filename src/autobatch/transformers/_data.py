"""The data of a Trainer as loaders."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch.utils.data import BatchSampler, DataLoader

from autobatch._loaders.epochs import samples_of
from autobatch.errors import FixedBatchSizeError
from autobatch.transformers._compat import shown, shown_to_evaluation, unprepared_loaders

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from autobatch._loaders.batch_size import SetBatchSize


@dataclass(frozen=True, slots=True)
class TrainerLoaders:
    """The loaders that a Trainer makes for training or evaluation, with all data of all ranks."""

    each: Sequence[DataLoader[Any]]
    batch_size: int  # their batch size

    is_sequential: ClassVar = True

    @classmethod
    def of_training(cls, trainer: Any) -> TrainerLoaders:
        """Return the loader; `FixedBatchSizeError` if its batch size is not the Trainer's."""
        accumulate = trainer.args.gradient_accumulation_steps
        at_size = partial(shown, trainer, accumulate=accumulate)
        loader = _following(trainer, trainer.get_train_dataloader, at_size, "train")
        return cls((loader,), trainer.args.per_device_train_batch_size)

    @classmethod
    def of_evaluation(cls, trainer: Any) -> TrainerLoaders:
        """Return a loader for each data set; `FixedBatchSizeError` as for training."""
        at_size, make = partial(shown_to_evaluation, trainer), trainer.get_eval_dataloader
        data = trainer.eval_dataset
        makers = [partial(make, name) for name in data] if isinstance(data, dict) else [make]
        loaders = [_following(trainer, each, at_size, "eval") for each in makers]
        return cls(loaders, trainer.args.per_device_eval_batch_size)

    @property
    def setters(self) -> Sequence[SetBatchSize | None]:
        return (None,) * len(self.each)

    @property
    def samples(self) -> int | None:
        """Samples of an epoch over all ranks and loaders; None for a stream."""
        lengths = [samples_of(loader, 1) for loader in self.each]
        known = [length for length in lengths if length is not None]
        return sum(known) if len(known) == len(lengths) else None

    def sizes_at(self, batch_size: int) -> Sequence[int]:
        return (batch_size,) * len(self.each)

    def structured(self, parts: Sequence[Any]) -> Any:
        return parts[0]


def _following(
    trainer: Any,
    make: Callable[[], DataLoader[Any]],
    at_size: Callable[[int], AbstractContextManager[object]],
    name: str,
) -> DataLoader[Any]:
    """Return the loader at the batch size in the arguments, if it follows that."""
    argument = f"per_device_{name}_batch_size"
    own = getattr(trainer.args, argument)
    with unprepared_loaders(trainer):
        with at_size(own):
            loader = make()
        with at_size(own + 1):
            other = make()
    if _size_of(loader) != own or _size_of(other) != own + 1:
        raise FixedBatchSizeError(
            f"A loader of this {type(trainer).__name__} has batches of {_size_of(loader)} samples "
            f"whatever {argument} is. Make it with that size in get_{name}_dataloader, or set the "
            "batch size manually."
        )
    return loader


def _size_of(loader: DataLoader[Any]) -> int | None:
    return loader.batch_size if type(loader.batch_sampler) is BatchSampler else None
