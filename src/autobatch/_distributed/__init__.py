"""Agreement between the ranks of a distributed job."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, Self, TypeVar

from autobatch import errors
from autobatch._distributed.dry import DryCollectives
from autobatch._distributed.sharding import data_parallel_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch.nn import Module

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

_LONGEST_WAIT: Final = timedelta(minutes=5)  # for the other ranks to come
_WAIT_FOR_READERS: Final = timedelta(seconds=10)  # of a rank that stops, whose process may end
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
        """Number of processes that agree with each other."""

    @property
    def replicas(self) -> int:
        """Number of ranks that train on different data: an update has the samples of all."""

    @property
    def as_if(self) -> int | None:
        """Ranks of a job that does not run, for which this process stands; None: it runs."""

    def gather(self, value: T) -> Sequence[T]:
        """Return the values of all ranks, in the order of their indices; every rank calls it.

        Raises:
            AutobatchError: Another rank raised an exception within `abort_together`; of the same
                class, if that was an error of autobatch.
        """

    def abort_together(self) -> AbstractContextManager[None]:
        """Raise an exception of one rank on every rank, at its next gather or at the end."""

    def in_step(self) -> AbstractContextManager[None]:
        """Raise an exception of one rank on every rank whose collective it breaks."""

    def dry(self) -> AbstractContextManager[object]:
        """Let collectives of the body wait for no other rank; `gather` goes on as before."""


@dataclass(frozen=True, slots=True)
class SingleProcess:
    """A single process, or one rank of a job that does not run.

    Args:
        replicas: Number of ranks that train on different data.
        as_if: Number of ranks of that job; None without one.
        alone: Entered with dry collectives.
    """

    replicas: int = 1
    as_if: int | None = None
    alone: AbstractContextManager[object] = field(default_factory=nullcontext)

    rank: ClassVar = 0
    world_size: ClassVar = 1

    def gather(self, value: T) -> Sequence[T]:
        return (value,)

    def abort_together(self) -> AbstractContextManager[None]:
        """Do nothing: no other rank could wait."""
        return nullcontext()

    in_step = abort_together

    @contextmanager
    def dry(self) -> Iterator[None]:
        """Let collectives of a job that does not run give the memory of those that would."""
        with DryCollectives() if self.as_if else nullcontext(), self.alone:
            yield


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

    Args:
        replicas: Number of ranks that train on different data.
        alone: Entered with dry collectives.
    """

    as_if = None

    def __init__(self, replicas: int, alone: AbstractContextManager[object]) -> None:
        import torch.distributed as dist

        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.replicas = replicas
        self._alone = alone
        self._group: Any = None
        self._nesting = 0  # of abort_together

    def __enter__(self) -> Self:
        import torch.distributed as dist

        _Meeting().wait()  # a group of its own would wait for a missing rank for ever
        self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(self, *_: object) -> None:
        import torch.distributed as dist

        dist.destroy_process_group(self._group)

    def gather(self, value: T) -> Sequence[T]:
        messages = self._exchange(_Message(value))
        _raise_error_in(messages)
        return tuple(message.value for message in messages)

    @contextmanager
    def abort_together(self) -> Iterator[None]:
        """Share an exception with the other ranks.

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
                self._exchange(_Message.about(_shared(error)))
            raise
        finally:
            self._nesting -= 1

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Leave an exception for the other ranks, and wait for nobody.

        They may be in a collective with this rank, where no message reaches them: they stop when
        its process ends, or at the timeout of their group.
        """
        meeting = _Meeting()
        try:
            yield
        except BaseException as error:
            meeting.leave(_shared(error))
            raise

    @contextmanager
    def dry(self) -> Iterator[None]:
        with DryCollectives(self._group), self._alone:
            yield

    def _exchange(self, message: _Message) -> list[_Message]:
        import torch.distributed as dist

        messages: list[Any] = [None] * self.world_size
        dist.all_gather_object(messages, message, group=self._group)
        return messages


class _Meeting:
    """A point that every rank comes to, found in the store of the job; each rank counts them.

    A rank that stops before the next one leaves its error there. Unlike a collective, this can be
    used around code of the user and of Lightning that has collectives of its own.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        # The store of the job has no public accessor (torch 2.13)
        from torch.distributed.distributed_c10d import _get_default_store

        self._store: Any = _get_default_store()
        self._rank, self._ranks = dist.get_rank(), range(dist.get_world_size())
        self._number = self._store.add(f"autobatch/meetings/{self._rank}", 1)

    def wait(self) -> None:
        """Wait until every rank is here.

        Raises:
            AutobatchError: A rank has stopped on its way, or has not come in time.
        """
        self._put(_Message())
        timeout = min(self._store.timeout, _LONGEST_WAIT)
        for rank in self._ranks:
            try:
                self._store.wait([self._key(rank)], timeout)
            except RuntimeError as error:  # DistStoreError
                message = (
                    f"Rank {rank} has not come to tune within {timeout.total_seconds():g} seconds: "
                    "all ranks tune together. Give every rank the same callbacks and arguments."
                )
                raise _shared(errors.AutobatchError(message)) from error
        _raise_error_in(self._read())

    def leave(self, error: BaseException) -> None:
        """Leave an error for the other ranks; raise theirs if theirs broke a collective here."""
        own = _Message.about(error)
        self._put(own)
        others = [_Message() if each == own else each for each in self._read()]
        if isinstance(error, RuntimeError):  # as a lost connection is
            _raise_error_in(others)

    def stop(self, error: BaseException) -> None:
        """Leave an error, and let the other ranks read it."""
        self.leave(error)
        if isinstance(error, Exception):
            with suppress(RuntimeError):  # a rank may have ended
                readers = [self._key(rank, "read") for rank in self._ranks]
                self._store.wait(readers, _WAIT_FOR_READERS)

    def _put(self, message: _Message) -> None:
        text = json.dumps([message.error_class, message.error_message])
        self._store.set(self._key(self._rank), text)

    def _read(self) -> list[_Message]:
        """Return the messages that are here."""
        here = [rank for rank in self._ranks if self._store.check([self._key(rank)])]
        read = {rank: json.loads(self._store.get(self._key(rank))) for rank in here}
        self._store.set(self._key(self._rank, "read"), "")
        return [_Message(None, *read.get(rank, ())) for rank in self._ranks]

    def _key(self, rank: int, what: str = "message") -> str:
        return f"autobatch/{self._number}/{what}/{rank}"


def _raise_error_in(messages: Sequence[_Message]) -> None:
    for rank, message in enumerate(messages):
        if message.error_class is not None:
            error_class = getattr(errors, message.error_class, errors.AutobatchError)
            raise _shared(error_class(f"Rank {rank} stopped: {message.error_message}"))


def _shared(error: E) -> E:
    """Mark an exception of which the other ranks know, and return it."""
    vars(error)[_SHARED] = True
    return error


@contextmanager
def stopping_together() -> Iterator[None]:
    """Raise an exception of one rank on every rank at the end, or where it broke a collective."""
    if not _is_distributed():
        yield
        return
    try:
        yield
    except BaseException as error:
        if _SHARED not in vars(error):
            _Meeting().stop(_shared(error))
        raise
    _Meeting().wait()


def current_ranks(
    replicas: int | None = None, alone: AbstractContextManager[object] | None = None
) -> AbstractContextManager[Ranks]:
    """Return all ranks of the current `torch.distributed` job, or this process alone.

    In a job on the fake back end of torch no other rank runs, and this process stands for all.

    Args:
        replicas: Number of ranks that train on different data; None: all of them.
        alone: Entered with dry collectives: lets what is beside process groups wait for no rank.
    """
    size, alone = job_size(), alone or nullcontext()
    if _is_distributed():
        return ProcessGroup(replicas or size, alone)
    if size > 1:
        return nullcontext(SingleProcess(replicas or size, size, alone))
    return nullcontext(SingleProcess())


def checked_replicas(given: int | None, modules: Iterable[Module]) -> int | None:
    """Return the number of ranks that train on different data: as given, or as modules are divided.

    Raises:
        ValueError: The number given does not divide the ranks.
    """
    size = job_size()
    if given is None:
        derived = data_parallel_size(modules, size) if size > 1 else None
        return None if derived is None or size % derived else derived
    if type(given) is not int or given < 1 or size % given:
        raise ValueError(
            f"data_parallel_size={given!r} does not divide the {size} ranks of this job; give the "
            "number of ranks that train on different data."
        )
    return given


def job_size() -> int:
    """Return the number of ranks of the current job, whether they run or not."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _is_distributed() -> bool:
    """Return True if other ranks run."""
    import torch.distributed as dist

    return job_size() > 1 and dist.get_backend() != "fake"
