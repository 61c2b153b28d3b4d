"""The training loop as a counted generator, and the clean-up after a failure."""

from __future__ import annotations

import gc
import operator
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

from autobatch._memory.oom import is_oom
from autobatch._trials import Outcome
from autobatch._undo import Undo
from autobatch.errors import AutobatchError, ShortTrialError

if TYPE_CHECKING:
    from types import TracebackType

    from autobatch._memory import MemoryProbe
    from autobatch._trials.context import TrialContext

# (batch size, accumulation) -> a training loop that yields after every optimizer step
Workload: TypeAlias = Callable[[int, int], Iterator[Any]]


@dataclass(frozen=True, slots=True)
class SizedWorkload:
    """A workload at one batch size."""

    workload: Workload
    batch_size: int  # samples per forward pass
    accumulate: int  # micro-batches per optimizer step
    may_be_refused: bool  # any error of the workload fails the size, and not only memory


_END: Final = object()
_PEP_479: Final = "generator raised StopIteration"


class RunningWorkload(Undo):
    """A running workload that counts its steps, and restarts when it ends after at least one.

    It ends with the block.
    """

    def __init__(self, sized: SizedWorkload) -> None:
        super().__init__()
        self.steps = 0
        self.starts = 1
        self.sample_counts: list[int] = []  # of micro-batches, if the workload yields them
        self.accumulate = sized.accumulate
        self._begin = partial(sized.workload, sized.batch_size, sized.accumulate)
        self._batch_size = sized.batch_size
        self._iterator = self._begin()
        self.add(self._end)

    def step(self) -> None:
        """Take the next optimizer step, of another start if need be.

        A StopIteration of a step is raised as it is, not as the RuntimeError that Python makes of
        it in a generator (PEP 479).
        """
        stopped: BaseException | None = None
        yielded: Any = _END
        try:
            yielded = next(self._iterator, _END)
            if yielded is _END:
                self._iterator = self._begin()
                self.starts += 1
                yielded = next(self._iterator, _END)
        except RuntimeError as error:
            stopped = error.__cause__
            if not isinstance(stopped, StopIteration) or str(error) != _PEP_479:
                raise
        if stopped is not None:
            raise stopped
        if yielded is _END:
            raise self._too_short()
        self.steps += 1
        count = _as_count(yielded)
        if count is not None:
            self.sample_counts.append(count)

    def _end(self) -> None:
        """Close the workload if it can be closed, and drop it: it may hold tensors."""
        if hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator = iter(())

    def _too_short(self) -> ShortTrialError:
        return ShortTrialError(
            f"The workload ended after {self.steps} optimizer steps at "
            f"batch_size={self._batch_size}, and did not yield when it was started again. A trial "
            "needs at least one step: yield after every optimizer step, or after every answer."
        )


def _as_count(yielded: Any) -> int | None:
    """Return a yielded number of samples, an int or one of numpy's; None for other objects."""
    try:
        return None if isinstance(yielded, bool) else operator.index(yielded)
    except TypeError:  # nothing, or a tensor of a loss
        return None


class FailureCleanup:
    """A context manager that catches the error of a failed size, and frees what the step held.

    An error fails the size if memory ran out, or if the workload may refuse the size. Other errors,
    and those of autobatch itself, pass through with a note that names the batch size. So does the
    error of a refused size if the state cannot be restored after it.
    """

    def __init__(self, sized: SizedWorkload, context: TrialContext) -> None:
        self.outcome: Outcome | None = None  # of a size that failed
        self.message: str | None = None  # class and first line of the error
        self._sized = sized
        self._context = context

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is None:
            return False
        self.outcome = self._outcome_of(error)
        if self.outcome is Outcome.REFUSED and not self._restores():
            self.outcome = None
        if self.outcome is None or not isinstance(error, Exception):
            note_size(error, self._sized.batch_size)
            return False
        self.message = f"{type(error).__name__}: {error}".partition("\n")[0]
        free_after_failure(error, self._context.probe)
        return True

    def _outcome_of(self, error: BaseException) -> Outcome | None:
        if not isinstance(error, Exception):
            return None
        if is_oom(error):
            return Outcome.OUT_OF_MEMORY
        is_ours = isinstance(error, AutobatchError)
        return Outcome.REFUSED if self._sized.may_be_refused and not is_ours else None

    def _restores(self) -> bool:
        try:
            self._context.snapshot.restore()
        except Exception:  # the snapshot notes it at the error when it is left
            return False
        return True


def note_size(error: BaseException, batch_size: int) -> None:
    """Name the batch size that was being tried in an error."""
    error.add_note(f"autobatch was trying batch_size={batch_size}")


def free_after_failure(error: Exception, probe: MemoryProbe) -> None:
    """Free everything that a failed step holds, and return its memory to the device."""
    _clear_frames(error)
    _empty_autograd(probe)
    gc.collect()
    probe.release()


def _clear_frames(error: BaseException) -> None:
    """Clear the local variables of the failed step, along the whole chain of causes."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        pending += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]


def _empty_autograd(probe: MemoryProbe) -> None:
    """Run a tiny backward pass.

    A failed one leaves activations in autograd's queue until the next backward on its thread.
    """
    import torch

    from autobatch._memory.ledger import unobserved

    # On the CPU that is this thread; a CUDA device has one of its own
    ours = [getattr(probe, "device", "cpu")] if torch.cuda.is_initialized() else []
    with unobserved(), torch.inference_mode(mode=False), torch.enable_grad():
        for device in {"cpu", *ours}:
            torch.ones(1, device=device, requires_grad=True).sum().backward()


def uses_torch_compile() -> bool:
    """Return whether torch.compile is in use: a hook on modules would then break graphs."""
    return "torch._dynamo" in sys.modules
