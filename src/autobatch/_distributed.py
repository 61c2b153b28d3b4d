"""Agreement between the ranks of a distributed job."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeVar

from autobatch import errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


T = TypeVar("T")

_LONGEST_WAIT: Final = timedelta(minutes=5)  # for the other ranks to begin
# Marks an exception that every rank raises already; a reference to it would keep the tensors in
# its frames alive
_SHARED: Final = "_autobatch_shared"


class Ranks(Protocol):
    """The processes that train together, as seen by one of them."""

    @property
    def rank(self) -> int:
        """Index of this process."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    def gather(self, value: T) -> Sequence[T]:
        """Return the values of all ranks, in the order of their indices; every rank calls it."""

    def abort_together(self) -> AbstractContextManager[None]:
        """Raise an exception of one rank on every rank, at its next gather or at the end."""


class SingleProcess:
    """A single process."""

    rank = 0
    world_size = 1

    def gather(self, value: T) -> Sequence[T]:
        """Return the value as the only one."""
        return (value,)

    def abort_together(self) -> AbstractContextManager[None]:
        """Do nothing: no other rank could wait."""
        return nullcontext()


@dataclass(frozen=True, slots=True)
class _Message:
    """A value of one rank, or the error that stopped it."""

    value: Any = None
    error_class: str | None = None  # a name in autobatch.errors
    error_message: str = ""

    @classmethod
    def about(cls, error: BaseException) -> _Message:
        name = type(error).__name__
        if isinstance(error, errors.AutobatchError):
            return cls(error_class=name, error_message=str(error))
        return cls(error_class="AutobatchError", error_message=f"{name}: {error}")


class ProcessGroup:
    """All processes of a `torch.distributed` job, connected by a gloo group of their own.

    That group needs no GPU memory, and stays usable when a training step fails in the middle of a
    collective. Every rank has to enter and leave it as a context manager; a rank that does not
    enter it ends the others in one sentence.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._group: Any = None
        self._nesting = 0  # of abort_together

    def __enter__(self) -> Self:
        import torch.distributed as dist

        self._await_ranks()
        self._group = dist.new_group(backend="gloo")
        return self

    def _await_ranks(self) -> None:
        """Wait until every rank is here: a group of its own would wait for a missing one for ever.

        Raises:
            AutobatchError: A rank has not come in time.
        """
        # The store of the job has no public accessor (torch 2.13)
        from torch.distributed.distributed_c10d import _get_default_store

        store: Any = _get_default_store()
        entry = store.add(f"autobatch/entries/{self.rank}", 1)  # the same on every rank
        store.set(f"autobatch/{entry}/{self.rank}", "here")
        timeout = min(store.timeout, _LONGEST_WAIT)
        for rank in range(self.world_size):
            try:
                store.wait([f"autobatch/{entry}/{rank}"], timeout)
            except RuntimeError as error:  # DistStoreError
                raise errors.AutobatchError(
                    f"Rank {rank} has not come to tune within {timeout.total_seconds():g} seconds: "
                    "all ranks tune together. Give every rank the same callbacks and arguments."
                ) from error

    def __exit__(self, *_: object) -> None:
        import torch.distributed as dist

        dist.destroy_process_group(self._group)

    def gather(self, value: T) -> Sequence[T]:
        """Return the values of all ranks, in the order of their indices; every rank calls it.

        Raises:
            AutobatchError: Another rank raised an exception within `abort_together`; of the same
                class, if that was an error of autobatch.
        """
        messages = self._exchange(_Message(value))
        for rank, message in enumerate(messages):
            if message.error_class is not None:
                error_class = getattr(errors, message.error_class, errors.AutobatchError)
                error = error_class(f"Rank {rank} stopped: {message.error_message}")
                vars(error)[_SHARED] = True
                raise error
        return tuple(message.value for message in messages)

    @contextmanager
    def abort_together(self) -> Iterator[None]:
        """Raise an exception of one rank on every rank, at its next gather or at the end.

        A rank that fails takes part in the next exchange of the other ranks, so that none of them
        waits for it. The outermost block ends with such an exchange: a rank that fails after the
        last gather stops the others as well. Blocks may be nested, and an exception that an inner
        block has shared may be caught around it, if every rank does so.
        """
        self._nesting += 1
        try:
            yield
            if self._nesting == 1:
                self.gather(None)
        except BaseException as error:
            if _SHARED not in vars(error):
                vars(error)[_SHARED] = True
                self._exchange(_Message.about(error))
            raise
        finally:
            self._nesting -= 1

    def _exchange(self, message: _Message) -> list[_Message]:
        import torch.distributed as dist

        messages: list[Any] = [None] * self.world_size
        dist.all_gather_object(messages, message, group=self._group)
        return messages


def current_ranks() -> AbstractContextManager[Ranks]:
    """Return all ranks of the current `torch.distributed` job, or this process alone."""
    import torch.distributed as dist

    is_initialized = dist.is_available() and dist.is_initialized()
    if is_initialized and dist.get_world_size() > 1:
        return ProcessGroup()
    return nullcontext(SingleProcess())
