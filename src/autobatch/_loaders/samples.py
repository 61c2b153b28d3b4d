"""Batches for trials, a fresh one for each step."""

from __future__ import annotations

from functools import cached_property, partial
from itertools import cycle, islice
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeAlias

import torch
from torch.utils.data import default_collate

from autobatch._loaders.epochs import samples_of
from autobatch._loaders.reader import Copied, Reader
from autobatch._loaders.reading import LARGEST_KEPT, data_size
from autobatch._loaders.remaking import Remaking
from autobatch._memory.ledger import unobserved
from autobatch._report.result import Look
from autobatch._settings import checked_function
from autobatch._trials.batches import leaves, listed, map_leaves, rows_of_each, sample_counts
from autobatch.errors import FixedBatchSizeError, WorstCaseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.utils.data import DataLoader

    from autobatch._loaders.batch_size import SetBatchSize
    from autobatch._loaders.reader import Fresh
    from autobatch._loaders.reading import Seen
    from autobatch._trials.snapshot import Snapshot


Counts: TypeAlias = list[list[int | None]]  # of samples in batches, in several ways

_MEAN_CHANGE: Final = 0.25  # of batches that vary in size, by chance


def checked_worst_case(worst_case: Callable[[int], Any] | None) -> Callable[[int], Any] | None:
    choice = "a function of a batch size that returns a batch"
    return checked_function("worst_case", worst_case, choice)


class NoDataError(Exception):
    """A loader makes no batch, as an empty stream."""


class Loaders(Protocol):
    """The loaders of a step as one object, whose batch size counts samples of the first."""

    @property
    def each(self) -> Sequence[DataLoader[Any]]:
        """The loaders."""

    @property
    def setters(self) -> Sequence[SetBatchSize | None]:
        """For each the function that sets its batch size; None for in place."""

    @property
    def batch_size(self) -> int:
        """Batch size of the first."""

    @property
    def is_sequential(self) -> bool:
        """True if a step takes a batch of one loader at a time, and not of all."""

    def sizes_at(self, batch_size: int) -> Sequence[int]:
        """Return the batch size of each loader for one of the first."""

    def structured(self, parts: Sequence[Any]) -> Any:
        """Return one value for each loader, in the containers of the loaders."""


class Samples:
    """Batches of any size from a Trainer's loaders: of their largest samples, where they allow.

    The loaders themselves make them, in a process of its own; see `Reader`. Leaving the context
    ends the process.

    Args:
        loaders: The loaders.
        snapshot: Restores everything that reading changes in this process.
        device: The device of the steps.
        worst_case: The user's function for the largest batch of a size; nothing is read then.
    """

    def __init__(
        self,
        loaders: Loaders,
        snapshot: Snapshot,
        device: torch.device,
        worst_case: Callable[[int], Any] | None = None,
    ) -> None:
        self._loaders = loaders
        self._own_sizes = loaders.sizes_at(loaders.batch_size)
        self._is_set_by_user = any(
            not (each is None or isinstance(each, Remaking)) for each in loaders.setters
        )
        self._reader = Reader(loaders.each, loaders.setters, snapshot)
        self._device = device
        self._worst_case = worst_case
        self._worst_case_data: dict[int, int] = {}  # amount of data by batch size
        self._counted: dict[tuple[int, int], Counts] = {}  # by loader and size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def check(self) -> None:
        """Read some batches of each loader.

        Raises:
            NoDataError: A loader makes none.
            FixedBatchSizeError: The number of samples in them does not follow the batch size.
        """
        if self._worst_case is not None:
            return
        if any(seen.look.read == 0 for seen in self._seen):
            raise NoDataError("A loader makes no batch: there are no samples to try.")
        for at, own in enumerate(self._own_sizes):
            self._check_following(at, 2 * own + 1)

    def check_size(self, batch_size: int) -> None:
        """Read some batches at the size of a plan; `FixedBatchSizeError` if they have another."""
        if self._worst_case is None:
            for at, size in enumerate(self._loaders.sizes_at(batch_size)):
                self._check_following(at, size)

    def _check_following(self, at: int, size: int) -> None:
        own = self._own_sizes[at]
        before = self._counts(at, own)
        try:
            after = self._counts(at, size)
        except Exception:
            return  # a size that is refused: trials find those that are not
        is_users, loader = self._is_set_by_user, self._loaders.each[at]
        rest = -1 if is_users else (samples_of(loader, 1) or 0) % size
        if not before or not after or _follows(before, after, own, size, rest):
            return
        if is_users:
            raise FixedBatchSizeError(
                f"{_set_by_user(size, after)} let all of its batches follow the size, in samples "
                "of the first batch."
            )
        raise FixedBatchSizeError(
            "AutoBatch cannot change the batch size of this loader, a "
            f"{type(loader).__name__} with a {type(loader.batch_sampler).__name__}: it makes "
            f"batches of {_rows(after)} samples when batch_size is {size}; pass set_batch_size, a "
            "function that makes all of its batches follow, or make the loader in "
            "train_dataloader, or leave AutoBatch out."
        )

    def _check_rounding(self, at: int, size: int) -> None:
        """Refuse a size for which a `set_batch_size` makes even batches of another one."""
        own = self._own_sizes[at]
        before, after = self._counts(at, own), self._counts(at, size)
        if before and after and not _is_exact(before, after, own, size):
            raise ValueError(f"{_set_by_user(size, after)} other sizes are tried.")

    def _counts(self, at: int, size: int) -> Counts:
        """Return the `sample_counts` of some batches, as `Reading` reads them once."""
        if (at, size) not in self._counted:
            with unobserved():
                self._counted[at, size] = self._reader.read(at, "counts", size)()
        return self._counted[at, size]

    @property
    def batches_at_once(self) -> int:
        """Batches of a round: one of each loader where steps take them in turn, or one of all."""
        is_in_turn = self._worst_case is None and self._loaders.is_sequential
        return len(self._loaders.each) if is_in_turn else 1

    def batches(self, batch_size: int) -> Iterator[Any]:
        """Yield batches for steps without end, each as it came out of the loader.

        A step may write into its batch, which is its own. On an accelerator, where a step has a
        copy on the device, the next step gets the same batch if it is still the same.
        """
        with unobserved():
            makers = self._makers(batch_size)
        while self._device.type == "cpu" or len(makers) > 1:
            for make in makers:
                yield make()
        (make,) = makers
        while True:
            batch = make()
            versions = _versions(batch)
            yield batch
            while _is_plain(batch) and versions == _versions(batch):
                yield batch

    def ordinary(self, batch_size: int) -> Any:
        """Return a batch of samples in reading order, each once; None if too few were read."""
        with unobserved():
            if self._worst_case is not None:
                return self._worst_case(batch_size)
            sizes = enumerate(self._loaders.sizes_at(batch_size))
            parts = [self._reader.read(at, "first", size)() for at, size in sizes]
        if any(part is None for part in parts):
            return None
        return self._loaders.structured(parts)

    @property
    def bytes_each(self) -> tuple[int, ...]:
        """Size of the largest sample of each loader; empty with a `worst_case`."""
        if self._worst_case is not None:
            return ()
        return tuple(seen.bytes_each for seen in self._seen)

    @property
    def rows_each(self) -> int:
        """Rows that a sample of the first loader becomes in a batch; 1 where they vary."""
        if self._worst_case is not None or self._is_set_by_user:
            return 1
        seen, own = self._seen[0], self._loaders.batch_size
        if not seen.look.is_even:
            return 1
        counts = self._counts(0, own)
        with unobserved():
            if not counts:
                own = min(own, LARGEST_KEPT)
                counts = [sample_counts(self._reader.read(0, "largest", own)())]
        return rows_of_each(counts[0], own)

    @property
    def look(self) -> Look | None:
        """Number and sizes of the samples read, over all loaders; None with a `worst_case`."""
        if self._worst_case is not None:
            return None
        found = [seen.look for seen in self._seen]
        known = [each.among for each in found if each.among is not None]
        return Look(
            read=sum(each.read for each in found),
            among=sum(known) if len(known) == len(found) else None,
            is_even=all(each.is_even for each in found),
        )

    @cached_property
    def _seen(self) -> list[Seen]:
        with unobserved():
            return [self._reader.read(at, "seen")() for at in range(len(self._loaders.each))]

    def _makers(self, batch_size: int) -> Sequence[Fresh]:
        """Return one function that makes batches, or one for each sequential loader."""
        if self._worst_case is not None:
            make = Copied(partial(self._worst_case, batch_size))
            self._check_growth(batch_size, make())
            return [make]
        sizes = self._loaders.sizes_at(batch_size)
        if self._is_set_by_user:
            for at, size in enumerate(sizes):
                self._check_rounding(at, size)
        parts = [self._largest(at, size) for at, size in enumerate(sizes)]
        if self._loaders.is_sequential:
            return parts
        return [lambda: self._loaders.structured([part() for part in parts])]

    def _largest(self, at: int, batch_size: int) -> Fresh:
        """Return the largest samples; repeated where that is the same as collating them again."""
        seen = self._seen[at]
        kept = min(LARGEST_KEPT, seen.look.read)
        is_default = self._loaders.each[at].collate_fn is default_collate
        if batch_size > kept and is_default and seen.are_collated:
            few = self._reader.read(at, "largest", kept)()
            if repeated(few, kept, batch_size) is not None:
                return partial(repeated, few, kept, batch_size)
        return self._reader.read(at, "largest", batch_size)

    def _check_growth(self, batch_size: int, batch: Any) -> None:
        data = data_size(batch)
        self._worst_case_data[batch_size] = data
        for other, other_data in self._worst_case_data.items():
            if other != batch_size and other_data == data:
                raise WorstCaseError(
                    f"worst_case made as much data for {batch_size} samples as for {other}; "
                    "it has to make a batch of the size it is called with."
                )


def _follows(before: Counts, after: Counts, own: int, size: int, rest: int) -> bool:
    """Check that samples, counted in any way, grow as the batch size does.

    Batches of one size have to be of one size again but for the `rest` of an epoch, which may come
    anywhere, and others to keep their mean. A negative rest leaves it at the mean.
    """
    for then, now in _compared(before, after):
        full = max(then)
        if rest >= 0 and then.count(full) >= max(1, len(then) - 1):
            others = [count * own for count in now if count * own != full * size]
            if others in ([], [full * rest]):
                return True
        elif abs(fmean(now) * own / (fmean(then) * size) - 1) < _MEAN_CHANGE:
            return True
    return False


def _is_exact(before: Counts, after: Counts, own: int, size: int) -> bool:
    """Check that batches of one size become those of another, counted in any way.

    Batches that vary in size are not compared.
    """
    for then, now in _compared(before, after):
        if len({*then}) > 1 or len({*now}) > 1 or now[0] * own == then[0] * size:
            return True
    return False


def _compared(before: Counts, after: Counts) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the counts of some batches and of others, counted in each way that counts all."""
    for ways in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True):
        then, now = ([count for count in counts if count is not None] for counts in ways)
        if len(then) == len(before) and len(now) == len(after):
            yield then, now


def _set_by_user(size: int, counts: Counts) -> str:
    return (
        f"set_batch_size was called with {size}, and the loader makes batches of {_rows(counts)} "
        "samples;"
    )


def _rows(counts: Counts) -> str:
    """Return the numbers of samples in batches, by the rows of their tensors."""
    return listed({rows for _, rows, _ in counts if rows})


def _is_plain(batch: Any) -> bool:
    """Check for a batch of tensors in containers of which a step on a device gets copies."""
    if isinstance(batch, (list, tuple, dict)):
        parts = batch.values() if isinstance(batch, dict) else batch
        return all(map(_is_plain, parts))
    return isinstance(batch, (torch.Tensor, str, bytes, int, float))


def _versions(batch: Any) -> list[int]:
    """Return a list that changes if anything is written into a plain batch."""
    # `_version` has no public name; torch 2.13 counts writes to a tensor by it
    return [number for leaf in leaves(batch) for number in (id(leaf), getattr(leaf, "_version", 0))]


def repeated(batch: Any, samples: int, batch_size: int) -> Any:
    """Repeat the samples of a collated batch up to a batch size; None if that is not possible.

    The result is the batch that collating the repeated samples would give. Collating takes time
    for each sample, and repeating next to none.

    Args:
        batch: A batch made by `torch.utils.data.default_collate` (torch 2.13).
        samples: Number of samples in it.
        batch_size: Number of samples in the result.
    """
    if not all(_is_repeatable(leaf, samples) for leaf in leaves(batch)):
        return None

    def repeat_leaf(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf[torch.arange(batch_size) % samples]
        return type(leaf)(islice(cycle(leaf), batch_size))

    return map_leaves(repeat_leaf, batch)


def _is_repeatable(leaf: Any, samples: int) -> bool:
    """Check that a leaf has one entry for each sample, or none."""
    if type(leaf) is torch.Tensor:
        return leaf.layout is torch.strided and leaf.dim() > 0 and len(leaf) == samples
    if type(leaf) not in (list, tuple):
        return False
    return not leaf or (
        len(leaf) == samples and all(isinstance(entry, (str, bytes)) for entry in leaf)
    )
