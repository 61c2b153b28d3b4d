"""Record gradient norms of every backward pass with hooks."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.autograd.function import BackwardCFunction

from autobatch._noise import KEPT, NoiseReading, Window, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_SHARDED: Final = frozenset({"FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"})
_EXCESS: Final = 1.001  # the mean's norm may exceed the mean norm by rounding only
_PATIENCE: Final = 2  # updates that may be skipped before it is said why


def obstacle(model: torch.nn.Module, optimizer: Any) -> str | None:
    """Why no gradient of this model can be measured, if that is plain from the start."""
    kinds = {kind.__name__ for part in model.modules() for kind in type(part).__mro__}
    sharded = sorted(kinds & _SHARDED)
    if sharded or any(type(each).__name__ == "DTensor" for each in model.parameters()):
        return f"the parameters are sharded ({sharded[0] if sharded else 'DTensor'}): no rank sees a whole gradient"
    if isinstance(optimizer, torch.optim.LBFGS):
        return "LBFGS evaluates the same batch several times in a step"
    return None


@dataclass(frozen=True, slots=True)
class GradientNorms:
    """What was taken of one update, its numbers still on the device.

    Args:
        update: Which update, from 1.
        passes: Backward passes of each rank.
        world_size: Ranks that the numbers were summed over.
        part_size: Samples of a backward pass; of passes of several sizes the harmonic mean.
        batch_size: Samples of the update, over all ranks.
        unit: What the loss of a backward pass was multiplied by, so that windows of different factors compare.
        sums: Over ranks: squared norms of the passes, of the whole gradient, of what there was before, and how many
            ranks found nothing wrong.
    """

    update: int
    passes: int
    world_size: int
    part_size: float
    batch_size: int
    unit: float | torch.Tensor
    sums: torch.Tensor

    def window(self) -> Window | None:
        """The numbers on the host; None where the gradient is not that of these passes."""
        small, big, before, sound = self.sums.tolist()
        unit = float(self.unit) ** 2
        small /= self.passes * self.world_size * unit
        big /= self.passes**2 * self.world_size * unit
        if sound < self.world_size or before > 0 or big > _EXCESS * small:
            return None
        return Window(self.update, small, big, self.part_size, self.batch_size)


class NoiseRecord:
    """The windows of a run that were measured, and those that could not be."""

    def __init__(self) -> None:
        self.updates = 0  # seen so far
        self.obstacle: str | None = None  # why nothing will be measured
        self._taken: deque[GradientNorms] = deque(maxlen=KEPT)  # waiting to be read
        self._windows: deque[Window] = deque(maxlen=KEPT)
        self._skipped = 0
        self._why: str | None = None  # the last was skipped
        self._rate: float | None = None
        self._is_warming_up = False
        self._has_fallen = False

    def add(self, taken: GradientNorms) -> None:
        """Keep one update's numbers."""
        self._taken.append(taken)

    def skip(self, reason: str) -> None:
        """Remember why an update could not be measured."""
        self._skipped += 1
        self._why = reason

    def give_up(self, reason: str) -> None:
        """Remember why nothing more will be measured."""
        self.obstacle = self.obstacle or reason

    def watch_rate(self, optimizer: Any) -> None:
        """See whether the learning rate still rises from the start of the run."""
        rate = optimizer.param_groups[0].get("lr")
        if not isinstance(rate, float | int):
            return  # on the device, where a look would wait for it
        if self._rate is not None:
            self._has_fallen |= rate < self._rate
            self._is_warming_up = rate > self._rate and not self._has_fallen
        self._rate = rate

    @property
    def reading(self) -> NoiseReading:
        """The noise scale by what is known now."""
        if self.obstacle is not None:
            return NoiseReading("unavailable", reason=self.obstacle)
        self._fetch()
        reading = read(
            tuple(self._windows),
            updates=self.updates,
            is_warming_up=self._is_warming_up,
        )
        if not reading.windows and self._skipped >= _PATIENCE:
            return NoiseReading("unavailable", reason=self._why)
        return reading

    def _fetch(self) -> None:
        while self._taken:
            window = self._taken.popleft().window()
            if window is None:
                self.skip("the gradient of an update is not that of its backward passes")
            else:
                self._windows.append(window)

    def state_dict(self) -> dict[str, Any]:
        """What there is to go on with, in plain numbers."""
        self._fetch()
        return {
            "updates": self.updates,
            "windows": [
                [each.update, each.small, each.big, each.part_size, each.batch_size]
                for each in self._windows
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.updates = state["updates"]
        self._windows.clear()
        self._windows.extend(Window(*numbers) for numbers in state["windows"])


class GradientNormHook:
    """Measures the backward passes of one update: the norm of each, and that of the gradient they add up to.

    A hook on a parameter sees the gradient of the pass that runs, before it is accumulated and before any other rank's
    is added. It adds one squared norm to a scalar on the device; nothing is copied, changed or waited for.
    """

    def __init__(self) -> None:
        self._parameters: list[torch.Tensor] = []
        self._handles: list[Any] = []
        self._passes: set[int] = set()
        self._sums: dict[torch.device, torch.Tensor] = {}  # of the passes
        self._before: torch.Tensor | None = None
        self._whole: torch.Tensor | None = None
        self._passes_in_whole = 0
        self._after_pass: Callable[[], None] | None = None
        self.problem: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether an update is being measured."""
        return bool(self._handles)

    @property
    def passes(self) -> int:
        """Backward passes of this update so far."""
        return len(self._passes)

    def open(
        self,
        parameters: Iterable[torch.Tensor],
        after_pass: Callable[[], None] | None = None,
    ) -> None:
        """Begin with an update; `after_pass` is called when a pass is complete, with all ranks' gradients."""
        self.close()
        self._parameters = [each for each in parameters if each.requires_grad]
        self._after_pass = after_pass
        self._handles = [each.register_hook(self._see) for each in self._parameters]

    def close(self) -> None:
        """Take the hooks away and forget the update."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._parameters = []
        self._passes = set()
        self._sums = {}
        self._before = self._whole = self._after_pass = None
        self._passes_in_whole = 0

    def take_whole(self) -> None:
        """Measure what the passes so far have added up to: to be called before anything clips or rescales it."""
        gradients = [each.grad for each in self._parameters if each.grad is not None]
        self._whole = squared_norm(gradients)
        self._passes_in_whole = self.passes

    def sums(self, group: Any | None, *, sound: bool = True) -> torch.Tensor:
        """Of this update over the ranks of a group, of which all have to ask: see `Taken`.

        A rank that saw something wrong says so: it must not keep the others waiting.
        """
        sound = sound and self.passes == self._passes_in_whole > 0
        device = next(iter(self._sums), torch.device("cpu"))
        if not self._sums and self._parameters:
            device = self._parameters[0].device
        nothing = torch.zeros((), dtype=_precise(device), device=device)
        parts = [each.to(nothing) for each in self._sums.values()]
        small = torch.stack(parts).sum() if parts else nothing
        whole = nothing if self._whole is None else self._whole.to(nothing)
        before = nothing if self._before is None else self._before.to(nothing)
        sums = torch.stack((small, whole, before, torch.full_like(nothing, sound)))
        if group is not None:
            torch.distributed.all_reduce(sums, group=group)
        return sums

    def _see(self, gradient: torch.Tensor) -> None:
        # The pass that runs, by the number that torch 2.6 to 2.13 gives it
        running = torch._C._current_graph_task_id()
        if running not in self._passes:
            self._begin_pass(running)
        if gradient.requires_grad:
            self.problem = "a gradient is taken to be differentiated again (create_graph=True)"
        device = gradient.device
        if device not in self._sums:
            self._sums[device] = torch.zeros((), dtype=torch.float32, device=device)
        norm = torch.linalg.vector_norm(_values(gradient.detach()), dtype=torch.float32)
        self._sums[device].addcmul_(norm, norm)

    def _begin_pass(self, running: int) -> None:
        if not self._passes:
            left = [each.grad for each in self._parameters if each.grad is not None]
            self._before = squared_norm(left) if left else None
        self._passes.add(running)
        if _is_nested():
            self.problem = (
                "a reentrant checkpoint runs backward passes within a backward pass; "
                "use_reentrant=False does without"
            )
        if self._after_pass is not None:
            # Called when the pass is complete; there it is queued again, after the callback in which
            # DistributedDataParallel puts the gradients of all ranks in place.
            after = self._after_pass
            _queue(lambda: _queue(after))


def _queue(callback: Callable[[], None]) -> None:
    # The way of torch's own FSDP to the end of a backward pass; torch 2.6 to 2.13 have no public one
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _is_nested() -> bool:
    """Whether this pass was started by the backward of a function in another, as reentrant checkpoints do."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back
    return False


def squared_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The squared norm of all of them together, as a scalar on the first one's device."""
    if not tensors:
        return None
    norms = torch._foreach_norm(
        [_values(each.detach()) for each in tensors], 2, dtype=torch.float32
    )
    device = norms[0].device
    total = torch.stack([each.to(device) for each in norms]).to(_precise(device))
    return total.square().sum()


def _values(gradient: torch.Tensor) -> torch.Tensor:
    """The numbers of a gradient: of a sparse one those that are not zero."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
