"""The training loop as a counted generator, and the clean-up after out-of-memory."""

from __future__ import annotations

import gc
import operator
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from autobatch._memory.oom import is_oom
from autobatch.errors import ShortTrialError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from autobatch._memory import MemoryProbe
    from autobatch._trials.optimizers import OptimizerWatch

T = TypeVar("T")

# (batch size, accumulation) -> a training loop that yields after every optimizer step
Workload: TypeAlias = Callable[[int, int], Iterator[Any]]


@dataclass(frozen=True, slots=True)
class Bench:
    """What trials run on.

    Args:
        probe: The device.
        budget: Reads how many bytes this process may hold now.
        optimizers: Counts and times optimizer steps.
        first_touch: Watches for modules that no one has seen yet.
        times_later: Whether sizes are timed after all trials, so that a trial need not do it.
    """

    probe: MemoryProbe
    budget: Callable[[], int]
    optimizers: OptimizerWatch
    first_touch: Callable[[], AbstractContextManager[None]]
    times_later: bool = False


class Running:
    """A running workload: its steps counted, started again when it ends after at least one of them."""

    def __init__(self, workload: Workload, batch_size: int, accumulate: int) -> None:
        self.steps = 0
        self.starts = 1
        self.counts: list[int] = []  # samples of its micro-batches, where it says
        self.accumulate = accumulate
        self._start: Callable[[], Iterator[Any]] = partial(workload, batch_size, accumulate)
        self._batch_size = batch_size
        self._steps = self._start()

    def step(self) -> None:
        """Take the next optimizer step, of another start if need be."""
        try:
            said = next(self._steps)
        except StopIteration:
            self._steps = self._start()
            self.starts += 1
            try:
                said = next(self._steps)
            except StopIteration:
                raise self._too_short() from None
        self.steps += 1
        count = _count(said)
        if count is not None:
            self.counts.append(count)

    def close(self) -> None:
        """End it, where it can be ended."""
        if hasattr(self._steps, "close"):
            self._steps.close()

    def _too_short(self) -> ShortTrialError:
        return ShortTrialError(
            f"The workload ended after {self.steps} optimizer steps at batch_size={self._batch_size}, without "
            "yielding again when it was started anew. A trial that runs no step proves nothing: yield after every "
            "optimizer step, or after every answer."
        )


def _count(said: Any) -> int | None:
    """What was yielded, where it is a count: an int, also one of numpy's."""
    if isinstance(said, bool) or not hasattr(said, "__index__"):
        return None
    try:
        return operator.index(said)
    except TypeError:  # a tensor of a loss
        return None


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """Instead of what was asked for.

    Args:
        said: What the error said.
    """

    said: str


def run_or_oom(act: Callable[[], T], batch_size: int, bench: Bench) -> T | OutOfMemory:
    """What it gives; where that ran out of memory, nothing of it is left."""
    try:
        return act()
    except Exception as error:
        if not is_oom(error):
            error.add_note(f"autobatch was trying batch_size={batch_size}")
            raise
        ended = OutOfMemory(_first_line(error))
        _forget(error)
    except BaseException as error:
        error.add_note(f"autobatch was trying batch_size={batch_size}")
        raise
    _empty_autograd(bench.probe)
    gc.collect()
    bench.probe.release()
    return ended


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def free_after_oom(error: Exception, probe: MemoryProbe) -> None:
    """Let go of what a failed step holds, and give its memory back."""
    _forget(error)
    _empty_autograd(probe)
    gc.collect()
    probe.release()


def _forget(error: BaseException) -> None:
    """Let go of what the failed step left in its frames, along the whole chain of causes."""
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
    """Run a tiny backward: one that failed leaves activations in autograd's queue until the next on its thread."""
    import torch

    from autobatch._memory.ledger import unobserved

    # On the CPU that is this thread; a CUDA device has one of its own
    ours = [getattr(probe, "device", "cpu")] if torch.cuda.is_initialized() else []
    with unobserved(), torch.enable_grad():
        for device in {"cpu", *ours}:
            torch.ones(1, device=device, requires_grad=True).sum().backward()


def uses_torch_compile() -> bool:
    """Whether torch.compile is in use: a hook that looks at modules would then break graphs."""
    return "torch._dynamo" in sys.modules
