"""Record gradient norms of every backward pass with hooks."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.autograd.function import BackwardCFunction

from autobatch._noise import MAX_WINDOWS, NoiseReading, Window, estimate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_SHARDED: Final = frozenset({"FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"})
# The norm of a mean exceeds the mean norm by rounding only; more is gradient of other passes
_ROUNDING: Final = 1.001
_MIN_SKIPPED: Final = 2  # skipped updates before a reading shows the reason


def obstacle(model: torch.nn.Module, optimizer: Any) -> str | None:
    """Return a reason to measure no gradient of this model, if one is known at the start."""
    classes = {kind.__name__ for part in model.modules() for kind in type(part).__mro__}
    sharded = sorted(classes & _SHARDED)
    if not sharded and any(type(each).__name__ == "DTensor" for each in model.parameters()):
        sharded = ["DTensor"]
    if sharded:
        return f"the parameters are sharded ({sharded[0]}): no rank sees a whole gradient"
    if isinstance(optimizer, torch.optim.LBFGS):
        return "LBFGS evaluates the same batch several times in a step"
    return None


@dataclass(frozen=True, slots=True)
class GradientNorms:
    """Squared gradient norms of one update, still on the device."""

    update: int  # from 1
    passes: int  # backward passes of each rank
    world_size: int  # ranks over which the norms were summed
    part_size: float  # samples of a backward pass; of passes of several sizes the harmonic mean
    batch_size: int  # samples of the update, over all ranks
    unit: float | torch.Tensor  # factor of the loss, divided out so that windows compare
    # Four sums over ranks: squared norms of the passes, of the whole gradient, of the gradient
    # before the update, and the number of ranks without a problem
    sums: torch.Tensor

    def window(self) -> Window | None:
        """Fetch the numbers; None if the gradient is not the sum over these passes."""
        small, big, before, sound = self.sums.tolist()
        unit = float(self.unit) ** 2
        small /= self.passes * self.world_size * unit
        big /= self.passes**2 * self.world_size * unit
        if sound < self.world_size or before > 0 or big > _ROUNDING * small:
            return None
        return Window(self.update, small, big, self.part_size, self.batch_size)


class NoiseRecord:
    """The measured and the skipped windows of a run."""

    def __init__(self) -> None:
        self.updates = 0  # so far, measured or not
        self.obstacle: str | None = None  # reason to measure nothing more
        self._pending: deque[GradientNorms] = deque(maxlen=MAX_WINDOWS)  # still on the device
        self._windows: deque[Window] = deque(maxlen=MAX_WINDOWS)
        self._skipped = 0
        self._skip_reason: str | None = None
        self._rate: float | None = None
        self._is_warming_up = False
        self._has_fallen = False

    def add(self, norms: GradientNorms) -> None:
        self._pending.append(norms)

    def end_update(
        self,
        hook: GradientNormHook,
        flaw: str | None,
        *,
        group: Any | None,
        world_size: int,
        part_size: int,
        unit: float | torch.Tensor,
    ) -> None:
        """Keep the norms of the update that `hook` measured, if it has no flaw on this rank."""
        # A rank with a flaw still takes part in the sums of the other ranks
        passes, sums = hook.passes, hook.sums(group, sound=flaw is None)
        problem = hook.problem
        hook.close()
        if problem is not None:
            self.give_up(problem)
        elif flaw is not None:
            self.skip(flaw)
        else:
            samples = passes * world_size * part_size
            number = self.updates + 1
            self.add(GradientNorms(number, passes, world_size, part_size, samples, unit, sums))

    def skip(self, reason: str) -> None:
        """Count an update that could not be measured."""
        self._skipped += 1
        self._skip_reason = reason

    def give_up(self, reason: str | None) -> None:
        """Measure nothing more if there is a reason; the first one stays."""
        self.obstacle = self.obstacle or reason

    def watch_rate(self, optimizer: Any) -> None:
        """Check for a learning rate that has only risen since the start of the run."""
        rate = optimizer.param_groups[0].get("lr")
        if not isinstance(rate, float | int):
            return  # a tensor: reading it would wait for the device
        if self._rate is not None:
            self._has_fallen |= rate < self._rate
            self._is_warming_up = rate > self._rate and not self._has_fallen
        self._rate = rate

    @property
    def reading(self) -> NoiseReading:
        if self.obstacle is not None:
            return NoiseReading("unavailable", reason=self.obstacle)
        self._fetch()
        reading = estimate(
            tuple(self._windows), updates=self.updates, is_warming_up=self._is_warming_up
        )
        if not reading.windows and self._skipped >= _MIN_SKIPPED:
            return NoiseReading("unavailable", reason=self._skip_reason)
        return reading

    def _fetch(self) -> None:
        while self._pending:
            window = self._pending.popleft().window()
            if window is None:
                self.skip("the gradient of an update is not that of its backward passes")
            else:
                self._windows.append(window)

    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume from, in plain numbers."""
        self._fetch()
        return {
            "updates": self.updates,
            "windows": [list(astuple(window)) for window in self._windows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self._windows.clear()
        self._windows.extend(Window(*numbers) for numbers in state["windows"])


class GradientNormHook:
    """Measures one update: the norm of each backward pass, and of the gradient they add up to.

    A hook on a parameter receives the gradient of the current pass, before it is accumulated and
    before the gradients of other ranks are added. The hook adds one squared norm to a scalar on the
    device; it copies nothing, changes nothing and does not wait for the device.
    """

    def __init__(self) -> None:
        self._parameters: list[torch.Tensor] = []
        self._handles: list[Any] = []
        self._passes: set[int] = set()  # ids of the backward passes so far
        self._sums: dict[torch.device, torch.Tensor] = {}  # squared norms of the passes
        self._before: torch.Tensor | None = None  # squared norm at the start of the update
        self._whole: torch.Tensor | None = None
        self._passes_in_whole = 0
        self._after_pass: Callable[[], None] | None = None
        self.problem: str | None = None

    @property
    def is_open(self) -> bool:
        """True while an update is measured."""
        return bool(self._handles)

    @property
    def passes(self) -> int:
        """Backward passes of this update so far."""
        return len(self._passes)

    def open(
        self, parameters: Iterable[torch.Tensor], after_pass: Callable[[], None] | None = None
    ) -> None:
        """Begin an update; `after_pass` runs after a pass, with the gradients of all ranks."""
        self.close()
        self._parameters = [each for each in parameters if each.requires_grad]
        self._after_pass = after_pass
        for each in self._parameters:
            self._handles.append(each.register_hook(self._on_gradient))

    def close(self) -> None:
        """Remove the hooks and forget the update."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._parameters = []
        self._passes = set()
        self._sums = {}
        self._before = self._whole = self._after_pass = None
        self._passes_in_whole = 0

    def take_whole(self) -> None:
        """Measure the accumulated gradient; call it before anything clips or rescales it."""
        gradients = [each.grad for each in self._parameters if each.grad is not None]
        self._whole = self._squared_norm(gradients)
        self._passes_in_whole = self.passes

    def sums(self, group: Any | None, *, sound: bool = True) -> torch.Tensor:
        """Return `GradientNorms.sums` of this update over a group; every rank calls it.

        A rank that found a problem takes part with `sound=False`, so that no rank waits for it.
        """
        sound = sound and self.passes == self._passes_in_whole > 0
        device = next(iter(self._sums), torch.device("cpu"))
        if not self._sums and self._parameters:
            device = self._parameters[0].device
        zero = torch.zeros((), dtype=_sum_dtype(device), device=device)
        parts = [each.to(zero) for each in self._sums.values()]
        small = torch.stack(parts).sum() if parts else zero
        whole = zero if self._whole is None else self._whole.to(zero)
        before = zero if self._before is None else self._before.to(zero)
        sums = torch.stack((small, whole, before, torch.full_like(zero, sound)))
        if group is not None:
            torch.distributed.all_reduce(sums, group=group)
        return sums

    def _on_gradient(self, gradient: torch.Tensor) -> None:
        current = _current_backward_pass()
        if current not in self._passes:
            self._begin_pass(current)
        if gradient.requires_grad:
            self.problem = "a gradient is differentiated again (create_graph=True)"
        try:
            self._add(gradient.detach())
        except Exception as error:  # of a dtype or layout without a norm; it would end training
            self.problem = _unmeasurable(error)

    def _add(self, gradient: torch.Tensor) -> None:
        device = gradient.device
        if device not in self._sums:
            self._sums[device] = torch.zeros((), dtype=_sum_dtype(device), device=device)
        values = _values(gradient)
        norm = torch.linalg.vector_norm(values, dtype=_norm_dtype([values]))
        self._sums[device].addcmul_(norm, norm)

    def _squared_norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor | None:
        try:
            return squared_norm(gradients)
        except Exception as error:
            self.problem = _unmeasurable(error)
            return None

    def _begin_pass(self, current: int) -> None:
        if not self._passes:
            existing = [each.grad for each in self._parameters if each.grad is not None]
            self._before = self._squared_norm(existing)
        self._passes.add(current)
        if _is_nested_backward():
            self.problem = (
                "a reentrant checkpoint runs backward passes within a backward pass; "
                "use use_reentrant=False"
            )
        if self._after_pass is not None:
            # Queued twice: the second call comes after the callback in which
            # DistributedDataParallel puts the gradients of all ranks in place
            after = self._after_pass
            _at_end_of_backward(lambda: _at_end_of_backward(after))


def squared_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the squared norm of all tensors together, as a scalar on the device of the first."""
    if not tensors:
        return None
    norms = _foreach_norm([_values(each.detach()) for each in tensors])
    device = norms[0].device
    total = torch.stack([each.to(device) for each in norms]).to(_sum_dtype(device))
    return total.square().sum()


def real(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient as real numbers; a complex one as pairs of them."""
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def _values(gradient: torch.Tensor) -> torch.Tensor:
    """Return the real numbers of a gradient; of a sparse one those that are not zero."""
    return real(gradient.coalesce().values() if gradient.is_sparse else gradient)


def _norm_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """Return the dtype of norms: float32, or float64 where a norm would otherwise be refused."""
    is_double = any(each.dtype is torch.float64 for each in tensors)
    return torch.float64 if is_double else torch.float32


def _unmeasurable(error: Exception) -> str:
    message = str(error).partition("\n")[0]
    return f"a gradient has no norm ({type(error).__name__}: {message})"


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


# Private API of torch, read from torch 2.6 to 2.13


def is_compiled(module: torch.nn.Module) -> bool:
    """Return True for a module compiled in place with `module.compile()`."""
    return getattr(module, "_compiled_call_impl", None) is not None


def write_counts(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Return for each tensor the number of times it was changed in place."""
    return [each._version for each in tensors]


def _current_backward_pass() -> int:
    """Return the id of the running backward pass."""
    return torch._C._current_graph_task_id()


def _at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run a callback when the running backward pass is complete, as FSDP of torch does."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _is_nested_backward() -> bool:
    """Check for a backward pass within another, as a reentrant checkpoint runs."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back
    return False


def _foreach_norm(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    return torch._foreach_norm(tensors, 2, dtype=_norm_dtype(tensors))
