"""Record of the memory events of a step: allocations, releases and scratch memory, in order."""

from __future__ import annotations

import sys
import time
import weakref
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autobatch._memory.estimate.events import SCRATCH, Event, Kind, Origin, Phase, UntraceableError
from autobatch._memory.estimate.scratch import attention_scratch, axes_of_sum, convolution_scratch
from autobatch._memory.in_place import InPlaceSums
from autobatch._memory.storages import address_of
from autobatch._undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

    from autobatch._memory.estimate.scratch import Gpu

_SCALAR: Final = 8  # bytes
# Operators that take tensors of one dtype only
_PRODUCTS: Final = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten.convolution.")


class RunningModules(Undo):
    """The modules that run, the innermost last; known while it lasts.

    Args:
        model: The model; other modules have the name of their class.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._names = {id(part): name for name, part in model.named_modules()}
        self._running: list[str] = []

    def start(self) -> None:
        self.hook(register_module_forward_pre_hook, self._begin)
        # Checkpoints end a forward pass by an exception, too
        self.hook(register_module_forward_hook, self._end, always_call=True)

    @property
    def innermost(self) -> str:
        """Name of the innermost module; empty if none runs."""
        return self._running[-1] if self._running else ""

    def _begin(self, module: torch.nn.Module, _: Any) -> None:
        self._running.append(self._names.get(id(module), type(module).__name__))

    def _end(self, *_: Any) -> None:
        self._running.pop()


class Recorder(TorchDispatchMode):
    """Record allocations and releases of every operator, in order."""

    def __init__(self, gpu: Gpu | None, running: RunningModules, deadline: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._running = running
        self.events: list[Event] = []
        self._gpu = gpu
        self._deadline = deadline
        self._phase = Phase.BUILD
        self._operator = str(Phase.BUILD)
        self._module = ""
        self._blocks = 0
        self._live: dict[int, _Live] = {}  # by address
        self._in_place = InPlaceSums()
        self._sum = 0  # address of the sum that the latest operator allocated; 0 for none

    def begin(self, phase: Phase) -> None:
        self._phase = phase
        self.events.append(Event(Kind.PHASE, 0, phase))

    def attach(self, things: Iterable[Any], origin: Origin) -> None:
        """Record tensors that are there already."""
        self._operator = str(origin)
        for thing in things:
            if isinstance(thing, torch.Tensor):
                self._record(thing)

    def attach_model(self, model: torch.nn.Module) -> None:
        """Record parameters and buffers in the order of `Module.to`: those of children first."""
        for name, part in reversed(list(model.named_modules())):
            self._module = name
            tensors = (*part.parameters(recurse=False), *part.buffers(recurse=False))
            self.attach(tensors, Origin.PARAMETERS)
        self._module = ""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "prim":  # type: ignore[attr-defined]  # an OpOverload
            # The device of a fake tensor: an exception here would end the process (torch 2.13)
            return func(*args, **(kwargs or {}))
        if time.perf_counter() > self._deadline:
            raise UntraceableError("tracing the step takes too long")
        self._operator = str(func)
        self._module = self._module_of(args)
        if "_local_scalar_dense" in self._operator:
            if self._phase is Phase.OPTIMIZER:
                return 1.0  # the count of steps
            if self._gpu is not None and args[0].dtype is torch.bool and _tests_a_mask():
                return True
        if self._phase is Phase.FORWARD and self._operator.startswith(_PRODUCTS):
            _check_dtypes(args)
        self._sum, is_sum = 0, self._in_place.recognises(func)
        # Recomputed activations too: peaks of a checkpointed GPT-2 are then nearest to measured ones
        is_sum |= self._phase is Phase.BACKWARD and func is torch.ops.aten.add.Tensor
        results = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
        if self._gpu is not None and "convolution_backward" in self._operator:
            self._record_convolution(args, results)
            return results
        for tensor in tensors:
            self._record(tensor)
        if is_sum:
            self._sum = address_of(results.untyped_storage())
        if self._gpu is not None:
            self._record_scratch(args, self._gpu)
        return results

    def _record(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = address_of(storage), storage.nbytes()
        live = self._live.get(key)
        if live is not None and live.nbytes == nbytes:
            return
        if live is not None:  # resized
            self._forget(key, live.ref)
        block = 0 if self._is_on_host(nbytes) or not nbytes else self._allocate(nbytes)
        ref = weakref.ref(storage, partial(self._forget, key))
        self._live[key] = _Live(block, nbytes, self._module, ref)

    def _module_of(self, args: tuple[Any, ...]) -> str:
        """Return the module that runs; for a gradient, the one that owns the last tensor it reads."""
        if self._running.innermost or self._phase is not Phase.BACKWARD:
            return self._running.innermost
        for leaf in reversed(tree_leaves(args)):
            if isinstance(leaf, torch.Tensor):
                live = self._live.get(address_of(leaf.untyped_storage()))
                if live is not None and live.module:
                    return live.module
        return ""

    def _is_on_host(self, nbytes: int) -> bool:
        """Return True for constants: without a GPU those of `torch.tensor` are not counted.

        On a GPU they are copied to the device, but for the step counts of an optimizer.
        """
        if self._gpu is None:
            return "lift" in self._operator
        is_constant = "lift" in self._operator or "scalar" in self._operator
        return is_constant and nbytes <= _SCALAR and self._phase is Phase.OPTIMIZER

    def _allocate(self, nbytes: int) -> int:
        self._blocks += 1
        event = Event(Kind.ALLOCATE, self._blocks, self._operator, (nbytes,), self._module)
        self.events.append(event)
        return self._blocks

    def _free(self, block: int) -> None:
        self.events.append(Event(Kind.FREE, block, self._operator))

    def _forget(self, key: int, ref: weakref.ref[torch.UntypedStorage]) -> None:
        live = self._live.get(key)
        if live is not None and live.ref is ref:
            del self._live[key]
            if live.block and not self._is_taken_over(live):
                self._free(live.block)

    def _is_taken_over(self, term: _Live) -> bool:
        """Give the block of a term to its sum, if that was the last allocation."""
        total = self._live.get(self._sum)
        if total is None or total.nbytes != term.nbytes or self.events[-1].block != total.block:
            return False
        self.events.pop()
        self._live[self._sum] = replace(total, block=term.block)
        self._sum = 0
        return True

    def _record_scratch(self, args: tuple[Any, ...], gpu: Gpu) -> None:
        name = self._operator
        if name.startswith(("aten.sum.", "aten.mean.")):
            dims = args[1] if len(args) > 1 else None
            numbers = axes_of_sum(args[0], dims)
            if numbers:
                self.events.append(Event(Kind.SUM, 0, name, numbers, self._module))
        elif "attention_backward" in name:
            dropout = args[10] if "flash" in name else 0.0
            self._hold(attention_scratch(name, args[1], dropout, gpu))

    def _record_convolution(self, args: tuple[Any, ...], results: Any) -> None:
        """Record the gradients one by one: cuDNN computes that of the input first."""
        for at, gradient in enumerate(results):
            if gradient is None:
                continue
            self._record(gradient)
            if at <= 1:
                self._hold(convolution_scratch(args, of_input=at == 0))

    def _hold(self, scratch: tuple[int, ...]) -> None:
        """Record memory that is allocated and freed within the operator."""
        operator = self._operator
        self._operator += SCRATCH
        for block in [*map(self._allocate, scratch)][::-1]:
            self._free(block)
        self._operator = operator


def _tests_a_mask() -> bool:
    """Return True if transformers (5) asks if an attention mask leaves out nothing: assumed."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 -- as inspect does
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.masking_utils":
            return True
        frame = frame.f_back
    return False


@dataclass(frozen=True, slots=True)
class _Live:
    block: int  # 0 if it is not on the device
    nbytes: int
    module: str
    ref: weakref.ref[torch.UntypedStorage]


def _check_dtypes(factors: tuple[Any, ...]) -> None:
    """Refuse what kernels refuse, and fake tensors do not."""
    dtypes = {str(each.dtype) for each in factors if isinstance(each, torch.Tensor)}
    if len(dtypes) > 1:
        raise UntraceableError(
            f"the step multiplies tensors of {' and '.join(sorted(dtypes))}, which torch refuses; "
            "give model and batch one dtype"
        )
