"""Agreement between the ranks of a distributed job."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from autobatch import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


T = TypeVar("T")


class Ranks(Protocol):
    """The processes that train together, as one of them sees it."""

    @property
    def rank(self) -> int:
        """Which of them this is."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    def everywhere(self, act: Callable[[], T]) -> Sequence[T]:
        """What `act` gives on each rank, in their order; where one raises, all do, and none is left waiting."""


class SingleProcess:
    """A single process."""

    rank = 0
    world_size = 1

    def everywhere(self, act: Callable[[], T]) -> Sequence[T]:
        """What `act` gives."""
        return (act(),)


@dataclass(frozen=True, slots=True)
class _Said:
    """What one rank tells the others: a result, or why there is none."""

    result: Any
    error: str | None = None  # the class, where it is one of our own
    message: str = ""


class ProcessGroup:
    """All processes of a `torch.distributed` job, which talk over a gloo group of their own.

    That group needs no memory of a GPU, and stays sound when a training step fails halfway through a collective.
    Leaving it as a context manager gives it up; every rank has to make and leave it.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._group: Any = None

    def __enter__(self) -> Self:
        import torch.distributed as dist

        self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(self, *_: object) -> None:
        import torch.distributed as dist

        dist.destroy_process_group(self._group)

    def everywhere(self, act: Callable[[], T]) -> Sequence[T]:
        """What `act` gives on each rank, in their order.

        Raises:
            AutobatchError: It raised on another rank; of the same class, where that was one of autobatch's own.
        """
        try:
            result = act()
        except BaseException as error:
            self._exchange(_told(error))
            raise
        said = self._exchange(_Said(result))
        for rank, each in enumerate(said):
            if each.error is not None:
                kind = getattr(errors, each.error, errors.AutobatchError)
                raise kind(f"Rank {rank} stopped: {each.message}")
        return tuple(each.result for each in said)

    def _exchange(self, said: _Said) -> list[_Said]:
        import torch.distributed as dist

        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, said, group=self._group)
        return everyone


def ranks_here() -> AbstractContextManager[Ranks]:
    """Those of the `torch.distributed` job that this process is part of, or it alone."""
    import torch.distributed as dist

    together = dist.is_available() and dist.is_initialized()
    return (
        ProcessGroup() if together and dist.get_world_size() > 1 else nullcontext(SingleProcess())
    )


def _told(error: BaseException) -> _Said:
    name = type(error).__name__
    if isinstance(error, errors.AutobatchError):
        return _Said(None, name, str(error))
    return _Said(None, "AutobatchError", f"{name}: {error}")
