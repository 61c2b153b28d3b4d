"""A process that reads batches, so that loaders and data sets of this one stay as they are."""

from __future__ import annotations

import copy
import fcntl
import gc
import io
import multiprocessing
import os
import pickle
import signal
import stat
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
from torch.utils.data import DataLoader

from autobatch._loaders.epochs import capture_order, layers, take_iterator
from autobatch._loaders.reading import alike, reading_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection

    from autobatch._loaders.batch_size import SetBatchSize
    from autobatch._loaders.reading import Reading
    from autobatch._trials.snapshot import Snapshot

# Longest waits for an answer where the loader has no worker, so that its data set may be one that
# hangs in a forked process: without and with processor time that is used
_MAX_IDLE: Final = 10.0  # seconds
_ANSWERED_AT_ONCE: Final = 0.05  # seconds: too short a wait to look at processor time
_MAX_SILENCE: Final = 60.0  # seconds
_SECONDS_TO_END: Final = 2.0
_MAX_CACHED: Final = 2**28  # bytes of answers that are kept for the next time
# Words of errors that only a forked process has: of CUDA, and of torch's autograd
_FORKED_WORDS: Final = ("CUDA", "fork")

# Returns a value that was read; every call makes a copy as it came out of the loader
Fresh: TypeAlias = Callable[[], Any]


class Copied:
    """A value of this process; read again where it cannot be copied."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read
        self._value = read()

    def __call__(self) -> Any:
        try:
            return copy.deepcopy(self._value)
        except Exception:  # whatever a batch holds, the loader can make another one
            return self._read()


class Reader:
    """Reads loaders in a forked process; in this one where that cannot be done.

    A forked process reads what is in memory here, and whatever reading changes, changes there: the
    order of the data, counters, random states, caches. In this process a snapshot restores them.

    Args:
        loaders: The loaders.
        setters: For each the function that sets its batch size; None for in place.
        snapshot: Restores what reading changes in this process.
    """

    def __init__(
        self,
        loaders: Sequence[DataLoader[Any]],
        setters: Sequence[SetBatchSize | None],
        snapshot: Snapshot,
    ) -> None:
        self._loaders = loaders
        self._setters = setters
        self._snapshot = snapshot
        self._here: dict[int, Reading] = {}  # loaders that this process reads
        self._process: _ReaderProcess | None = None
        self._can_fork = sys.platform == "linux"

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def read(self, at: int, method: str, *arguments: Any) -> Fresh:
        """Call a method of the `Reading` of a loader; errors of the user pass through."""
        if self._can_fork and at not in self._here:
            answer = self._asked(at, method, *arguments)
            if answer is not None:
                return answer
        # This process can read it, since it has CUDA, locks and threads and need not pickle
        return Copied(lambda: self._read_here(at, method, *arguments))

    def _asked(self, at: int, method: str, *arguments: Any) -> Fresh | None:
        """Ask the other process; None if it cannot read or send that, or has ended."""
        if self._process is None:
            self._process = _ReaderProcess(self._loaders, self._setters)
            try:
                self._process.start()
            except (AssertionError, OSError):  # in a daemonic process, or without memory
                self._can_fork = False
                return None
        request = at, method, arguments
        answer = self._process.answer(request, may_hang=not self._loaders[at].num_workers)
        if self._process.has_ended:
            # A fork may die or hang where this process would not, as by locks of other threads;
            # killed for memory, it would happen here again
            is_killed = self._process.is_killed
            self.close()
            if is_killed:
                raise MemoryError(
                    "The process that reads batches for trials was killed, as systems do when "
                    "their memory ends."
                )
            self._can_fork = False
        return answer

    def _read_here(self, at: int, method: str, *arguments: Any) -> Any:
        loader = self._loaders[at]
        capture_order(loader, self._snapshot)
        self._snapshot.capture_small_values(*layers(loader.collate_fn), *layers(loader.dataset))
        if at not in self._here:
            self._here[at] = reading_of(alike(loader), self._setters[at])
        return getattr(self._here[at], method)(*arguments)


class _ReaderProcess:
    """The forked process, and the connection to it."""

    def __init__(
        self, loaders: Sequence[DataLoader[Any]], setters: Sequence[SetBatchSize | None]
    ) -> None:
        self.has_ended = False  # or hangs
        forked = multiprocessing.get_context("fork")
        self._connection, self._theirs = forked.Pipe()
        # Not daemonic, since a loader may have a worker
        serving = self._theirs, self._connection, loaders, setters, _with_iterators()
        self._process = forked.Process(target=_serve, args=serving, daemon=False)

    def start(self) -> None:
        with warnings.catch_warnings():
            # Python 3.12 warns of threads; those of torch are not needed there
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        self._theirs.close()

    def answer(self, request: tuple[Any, ...], *, may_hang: bool) -> Fresh | None:
        """Return the answer; None if there is none. Errors of the user are raised."""
        try:
            self._connection.send(request)
            if may_hang and self._hangs():
                self.has_ended = True
                return None
            kind = self._connection.recv()
            data = self._connection.recv_bytes()
        except (EOFError, OSError):  # the other end of the connection is closed
            self.has_ended = True
            return None
        if kind == "error":
            raise pickle.loads(data)  # noqa: S301 -- made by a process forked from this one
        return partial(pickle.loads, data) if kind == "value" else None

    def _hangs(self) -> bool:
        """Wait until there is an answer or the process has ended; True if it does nothing."""
        ends: list[Connection | int] = [self._connection, self._process.sentinel]
        if connection.wait(ends, _ANSWERED_AT_ONCE):
            return False
        pid, began = self._process.pid or 0, time.monotonic()
        used = _processor_ticks(pid)
        while not connection.wait(ends, _MAX_IDLE):
            before, used = used, _processor_ticks(pid)
            if used == before or time.monotonic() - began > _MAX_SILENCE:
                return True
        return False

    @property
    def is_killed(self) -> bool:
        """True after the end by another process, as for lack of memory."""
        self._process.join(_SECONDS_TO_END)
        return self._process.exitcode == -signal.SIGKILL

    def close(self) -> None:
        """End the process and its workers."""
        self._connection.close()  # which it waits for
        self._theirs.close()
        pid = self._process.pid
        if pid is None:
            return
        self._process.join(_SECONDS_TO_END)
        if self._process.is_alive():
            self._process.kill()
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            self._process.join()
        self._process.close()


def _processor_ticks(group: int) -> int:
    """Return the processor time of a group of processes: the one that reads and its worker."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += int(fields[11]) + int(fields[12])  # user and system; see proc(5)
    return ticks


def _serve(
    requests: Connection,
    other_end: Connection,
    loaders: Sequence[DataLoader[Any]],
    setters: Sequence[SetBatchSize | None],
    with_iterators: Sequence[DataLoader[Any]],
) -> None:
    """Answer requests until the process that sends them closes the connection, or ends."""
    other_end.close()
    os.setpgid(0, 0)  # Ctrl-C is for the other process, which ends this one and its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _separate_file_positions()
    os.register_at_fork(after_in_child=_separate_file_positions)  # of workers
    # Kept here, since their end would stop workers of the other process
    abandoned = list(map(take_iterator, with_iterators))
    gc.freeze()  # a collection here must not end iterators that belong to the other process
    warnings.simplefilter("ignore")  # training shows them
    torch.set_num_threads(1)
    readings = list(map(reading_of, loaders, setters))
    answers: dict[Any, bytes] = {}
    parent = multiprocessing.parent_process()
    if parent is not None:  # some code asks for the main process by name
        multiprocessing.current_process().name = parent.name
    ends: list[Any] = [requests, *([parent.sentinel] if parent else [])]
    with suppress(EOFError, ConnectionError):  # the other process has ended
        while connection.wait(ends) == [requests]:
            request = requests.recv()
            if request in answers:
                kind, data = "value", answers[request]
            else:
                kind, data = _answer(readings, *request)
                if kind == "value" and sum(map(len, answers.values())) + len(data) < _MAX_CACHED:
                    answers[request] = data
            requests.send(kind)
            requests.send_bytes(data)
    del abandoned


def _separate_file_positions() -> None:
    """Open the files that are read again: a forked process shares their positions.

    A stream may read a file that was opened before, from where it is.
    """
    for name in list(Path("/proc/self/fd").iterdir()):
        number = int(name.name)
        with suppress(OSError):  # the one of this listing is closed
            is_file = stat.S_ISREG(os.fstat(number).st_mode)
            if is_file and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                position = os.lseek(number, 0, os.SEEK_CUR)
                again = os.open(name, os.O_RDONLY)
                os.lseek(again, position, os.SEEK_SET)
                os.dup2(again, number, inheritable=os.get_inheritable(number))
                os.close(again)


def _with_iterators() -> list[DataLoader[Any]]:
    """Return all loaders that may have workers here, which a forked process must leave alone.

    This process looks for them: to touch all objects in a forked one would copy all memory.
    """
    if not multiprocessing.active_children():
        return []
    return [thing for thing in gc.get_objects() if issubclass(type(thing), DataLoader)]


def _answer(
    readings: Sequence[Reading], at: int, method: str, arguments: tuple[Any, ...]
) -> tuple[str, bytes]:
    """Return "value" or "error" with the pickle of it, or "unreadable"."""
    kind = "value"
    try:
        value = getattr(readings[at], method)(*arguments)
    except BaseException as error:
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _FORKED_WORDS):
            return "unreadable", b""
        error.add_note(f"In the process that reads batches for trials:\n{traceback.format_exc()}")
        kind, value = "error", error
    with suppress(Exception):  # of a class that cannot be pickled, or not read again
        data = packed(value)
        if _is_alike(value, pickle.loads(data)):  # noqa: S301 -- made in the line above
            return kind, data
    return "unreadable", b""


def _is_alike(value: Any, other: Any) -> bool:
    """Check that a pickle kept the attributes of a batch."""
    return getattr(value, "__dict__", {}).keys() == getattr(other, "__dict__", {}).keys()


def packed(value: Any) -> bytes:
    """Pickle a value with the data of its tensors.

    A DataLoader sends tensors in shared memory, each with an open file; a large batch of lists
    would have too many.
    """
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles the elements of a plain tensor, where torch would pickle the storage behind it."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or not _is_simple(value):
            return NotImplemented
        if _extent(value) > 2 * value.numel():
            value = value.contiguous()
        array: Any = _bytes(value).numpy()
        data = pickle.PickleBuffer(array)
        return _tensor, (data, value.dtype, tuple(value.shape), value.stride())


def _is_simple(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.requires_grad or tensor.is_quantized or vars(tensor))
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
    )


def _tensor(
    data: bytearray, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    """Return a tensor with a storage of its own."""
    tensor = torch.empty_strided(shape, stride, dtype=dtype)
    if tensor.numel():
        _bytes(tensor).copy_(torch.frombuffer(data, dtype=torch.uint8))
    return tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a tensor, and those between, as they lie in memory."""
    return tensor.as_strided((_extent(tensor),), (1,)).view(torch.uint8)


def _extent(tensor: torch.Tensor) -> int:
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((length - 1) * stride for length, stride in steps)
