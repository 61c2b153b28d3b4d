"""The training data of a Trainer as one loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch.utils.data import BatchSampler, DataLoader

from autobatch._loaders.epochs import samples_of
from autobatch.errors import FixedBatchSizeError
from autobatch.transformers._compat import shown, unprepared_loaders

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._loaders.batch_size import SetBatchSize


@dataclass(frozen=True, slots=True)
class TrainingLoader:
    """The loader that a Trainer makes for training, with all data of all ranks.

    Args:
        loader: The loader.
        batch_size: Its batch size.
    """

    loader: DataLoader[Any]
    batch_size: int

    is_set_by_user: ClassVar = False
    is_sequential: ClassVar = False
    setters: ClassVar[Sequence[SetBatchSize | None]] = (None,)

    @classmethod
    def of(cls, trainer: Any) -> TrainingLoader:
        """Return the loader; `FixedBatchSizeError` if its batch size is not the Trainer's."""
        loader, size = _loader_at(trainer, trainer.args.per_device_train_batch_size)
        if size is None or _loader_at(trainer, size + 1)[1] != size + 1:
            raise FixedBatchSizeError(
                f"The training loader of this {type(trainer).__name__} has batches of {size} "
                "samples whatever per_device_train_batch_size is. Make it with that size in "
                "get_train_dataloader, or set the batch size manually."
            )
        return cls(loader, size)

    @property
    def each(self) -> Sequence[DataLoader[Any]]:
        return (self.loader,)

    @property
    def own_sizes(self) -> Sequence[int]:
        return (self.batch_size,)

    @property
    def samples(self) -> int | None:
        """Samples of an epoch over all ranks; None for a stream."""
        return samples_of(self.loader, 1)

    def sizes_at(self, batch_size: int) -> Sequence[int]:
        return (batch_size,)

    def structured(self, parts: Sequence[Any]) -> Any:
        return parts[0]


def _loader_at(trainer: Any, batch_size: int) -> tuple[DataLoader[Any], int | None]:
    """Return the loader of a Trainer at a batch size, and the size of its batches."""
    accumulate = trainer.args.gradient_accumulation_steps
    with shown(trainer, batch_size, accumulate), unprepared_loaders(trainer):
        loader = trainer.get_train_dataloader()
    is_plain = type(loader.batch_sampler) is BatchSampler
    return loader, loader.batch_size if is_plain else None
