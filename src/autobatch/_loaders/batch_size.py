"""Change the batch size of one DataLoader, and restore it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch.utils.data import DataLoader

from autobatch._loaders.remaking import Remaking, resize, sampler_of, samplers_of_same_size
from autobatch._undo import Absent, Undo

if TYPE_CHECKING:
    from collections.abc import Iterator

# The user's set_batch_size, or a Remaking
SetBatchSize: TypeAlias = Callable[[DataLoader[Any], int], None]


@dataclass(frozen=True, slots=True)
class LoaderSize:
    """A batch size of a loader, and the way to set it: None for in place."""

    batch_size: int
    setter: SetBatchSize | None


def batch_size_of(loader: DataLoader[Any]) -> int:
    """Return the batch size of the batch sampler; `loader.batch_size` is None with a user's one."""
    sampler: Any = loader.batch_sampler
    return int(sampler.batch_size)


def is_writable(batch_sampler: Any) -> bool:
    """Return whether the batch size of a batch sampler can be set; a property may refuse it."""
    try:
        batch_sampler.batch_size = batch_sampler.batch_size
    except Exception:
        return False
    return True


@contextmanager
def changed_batch_size(
    loader: DataLoader[Any], batch_size: int, setter: SetBatchSize | None
) -> Iterator[None]:
    """Change the batch size of a loader while the body runs."""
    change = batch_size_change(loader, batch_size, setter)
    with Undo() as undo:
        undo.add(change.restore)
        change.make()
        yield


def batch_size_change(
    loader: DataLoader[Any], batch_size: int, setter: SetBatchSize | None
) -> BatchSizeChange:
    """Return a change of the batch size, by the user's setter if there is one."""
    if setter is None:
        samplers = samplers_of_same_size(loader)
        return _Resizing(loader, batch_size_of(loader), batch_size, samplers)
    owners = (loader, loader.batch_sampler, loader.sampler, sampler_of(loader))
    # A list of indices is a sampler without attributes
    before = [(owner, dict(vars(owner))) for owner in owners if hasattr(owner, "__dict__")]
    return _Setting(loader, batch_size, setter, before)


@dataclass
class _Resizing:
    """Another `batch_size` of the batch sampler, whose property may keep it in another object."""

    loader: DataLoader[Any]
    former: int
    batch_size: int
    samplers: list[Any]

    @property
    def holds(self) -> bool:
        """True if the batch size is still the one that was set."""
        return batch_size_of(self.loader) == self.batch_size

    def make(self) -> None:
        resize(self.loader, self.batch_size, self.samplers)

    def restore(self) -> None:
        """Give the loader its former batch size; also if `make` was interrupted."""
        resize(self.loader, self.former, self.samplers)


@dataclass
class _Setting:
    """A call of `set_batch_size`, or of a `Remaking`; only the assigned attributes are restored.

    The order of the data, in generators and counters, goes on.
    """

    loader: DataLoader[Any]
    batch_size: int
    setter: SetBatchSize
    before: list[tuple[Any, dict[str, Any]]]  # objects with their attributes
    assigned: list[_Assignment] | None = None  # None until the setter has returned

    @property
    def holds(self) -> bool:
        assigned = self.assigned or []
        if isinstance(self.setter, Remaking):
            # Others than numbers, such as lists of batches, may be replaced in each epoch
            assigned = [each for each in assigned if isinstance(each.after, int)] or assigned
        return all(each.holds for each in assigned)

    def make(self) -> None:
        try:
            self.setter(self.loader, self.batch_size)
            self.assigned = self._assignments()
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        for each in self._assignments() if self.assigned is None else self.assigned:
            each.restore()

    def _assignments(self) -> list[_Assignment]:
        return [
            _Assignment(owner, name, before.get(name, Absent), vars(owner).get(name, Absent))
            for owner, before in self.before
            for name in before.keys() | vars(owner).keys()
            if before.get(name, Absent) is not vars(owner).get(name, Absent)
        ]


BatchSizeChange: TypeAlias = _Resizing | _Setting


@dataclass(frozen=True, slots=True)
class _Assignment:
    """An attribute of an object that was assigned."""

    owner: Any
    name: str
    before: Any
    after: Any

    @property
    def holds(self) -> bool:
        return vars(self.owner).get(self.name, Absent) is self.after

    def restore(self) -> None:
        if self.before is Absent:
            vars(self.owner).pop(self.name, None)
        else:
            vars(self.owner)[self.name] = self.before
