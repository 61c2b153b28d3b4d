"""Trace of a training step on fake tensors: nothing is computed, and no state of the user changes.

Fake tensors and dispatch modes have no public names in torch 2.13; all of them are in this module.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import time
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autobatch._memory.estimate.cuda import CudaOperators
from autobatch._memory.estimate.events import SCRATCH, Event, Kind, Origin, Phase, UntraceableError
from autobatch._memory.estimate.modules import RunningModules
from autobatch._memory.estimate.scratch import attention_scratch, axes_of_sum, convolution_scratch
from autobatch._memory.estimate.untouched import Untouched
from autobatch._memory.ledger import unobserved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

    from autobatch._memory.estimate.scratch import Gpu

# The first step creates gradients and optimizer state, the second runs with them
_STEPS: Final = 2
_STEPS_OF_LSTM: Final = 3  # memory reserved on an H200 still grew in the third
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# The one hook in it lets embeddings need gradients, for checkpoints (transformers 5.24)
_KEEPS_NOTHING: Final = "transformers.modeling_utils"
_SCALAR: Final = 8  # bytes
# Operators that take tensors of one dtype only
_PRODUCTS: Final = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten.convolution.")
_CPU: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """One optimizer step, to be run on fake tensors."""

    model: torch.nn.Module  # the model, on any device; a copy of it is traced
    optimizer: torch.optim.Optimizer  # its optimizer; copied too
    # Function of the model and a batch that returns the loss, or a dict with a key "loss"
    loss: Callable[[torch.nn.Module, Any], Any]
    # Function that returns a batch of so many samples, of tensors on the CPU
    batch: Callable[[int], Any]
    autocast: torch.dtype | None = None  # precision of automatic mixed precision; None without it
    accumulate: int = 1  # micro-batches of one update
    # True if gradients are zeroed between forward and backward, as by the Trainer of Lightning
    zeroes_after_forward: bool = False


def trace(
    step: TrainingStep, batch_size: int, gpu: Gpu | None, deadline: float = math.inf
) -> list[Event]:
    """Return the events of building a model and of some steps; without a GPU, those of the CPU.

    Args:
        step: The step.
        batch_size: Samples in a batch.
        gpu: The device; None for one that counts live tensors.
        deadline: Reading of `time.perf_counter` at which the trace is given up.

    Raises:
        UntraceableError: The step cannot run on fake tensors, does what is not modelled, or takes
            too long.
    """
    _check(step.model, gpu)
    try:
        with Untouched(), unobserved(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a copy without its Trainer
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            model, optimizer = _fake_copy(step, fake)
            if gpu is not None:
                _choose_foreach(optimizer)
            running = RunningModules(model)
            tracer = _Tracer(gpu, running, deadline)
            tracer.attach_model(model)
            tracer.attach(tree_leaves(list(optimizer.state.values())), Origin.OPTIMIZER_STATE)
            batch, tensors = _fake_batch(step.batch(batch_size), fake)
            tracer.attach(tensors, Origin.BATCH)
            with _operators_of(gpu), fake, tracer, running:
                _run(step, model, optimizer, batch, tracer)
    except UntraceableError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UntraceableError(
            f"the step depends on values of tensors ({error.func}), and a trace has only their shapes"
        ) from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].partition(". ")[0]
        raise UntraceableError(f"the step does not run on fake tensors ({reason})") from error
    return tracer.events


def _run(
    step: TrainingStep,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    tracer: _Tracer,
) -> None:
    autocast = torch.autocast("cpu", step.autocast or torch.bfloat16, step.autocast is not None)
    has_lstm = any(isinstance(part, torch.nn.LSTM) for part in model.modules())
    for _ in range(_STEPS_OF_LSTM if has_lstm else _STEPS):
        for micro_batch in range(step.accumulate):
            tracer.begin(Phase.FORWARD)
            with autocast:
                outputs = step.loss(model, batch)  # all of them live through the backward pass
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                raise UntraceableError(
                    f"the step returned {_described(loss)} instead of a loss, a scalar"
                )
            torch.clear_autocast_cache()  # as on leaving the outermost context
            if step.zeroes_after_forward and not micro_batch:
                optimizer.zero_grad()
            tracer.begin(Phase.BACKWARD)
            (loss / step.accumulate if step.accumulate > 1 else loss).backward()
        tracer.begin(Phase.OPTIMIZER)
        optimizer.step()
        if not step.zeroes_after_forward:
            optimizer.zero_grad()
        tracer.begin(Phase.END)


def _check_dtypes(factors: tuple[Any, ...]) -> None:
    """Refuse what kernels refuse, and fake tensors do not."""
    dtypes = {str(each.dtype) for each in factors if isinstance(each, torch.Tensor)}
    if len(dtypes) > 1:
        raise UntraceableError(
            f"the step multiplies tensors of {' and '.join(sorted(dtypes))}, which torch refuses; "
            "give model and batch one dtype"
        )


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__


def _operators_of(gpu: Gpu | None) -> contextlib.AbstractContextManager[Any]:
    if gpu is None:
        return contextlib.nullcontext()
    return CudaOperators(gpu)


def _check(model: torch.nn.Module, gpu: Gpu | None) -> None:
    """Refuse models whose memory is not modelled, or that the trace might change."""
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.RNNBase) and not (gpu and _is_plain_lstm(part)):
            raise UntraceableError(
                f"{name or 'the model'} is a recurrent network, of which only the LSTM of cuDNN "
                "without a projection is modelled"
            )
        hooks = [hook for kind in _HOOKS for hook in getattr(part, kind).values()]
        if not all(getattr(hook, "__module__", "") == _KEEPS_NOTHING for hook in hooks):
            raise UntraceableError(f"{name or 'the model'} has hooks, which may keep tensors")
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UntraceableError(f"{name} has hooks, which may keep tensors")
        if torch.nn.parameter.is_lazy(parameter):
            raise UntraceableError(f"{name} has no shape yet")


def _is_plain_lstm(part: torch.nn.RNNBase) -> bool:
    return isinstance(part, torch.nn.LSTM) and not part.proj_size


def _fake_copy(
    step: TrainingStep, fake: FakeTensorMode
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return copies whose tensors are fake and on the CPU, without gradients."""
    memo: dict[int, Any] = {}
    # Not the Trainer, nor what hangs on it
    trainer = getattr(step.model, "_trainer", None)
    if trainer is not None:
        memo[id(trainer)] = None
    for part in step.model.modules():  # the name of its device, by which a module makes tensors
        memo |= {id(each): _CPU for each in vars(part).values() if isinstance(each, torch.device)}
    with _CopyToCpu(fake):
        model, optimizer = copy.deepcopy((step.model, step.optimizer), memo)
    for parameter in model.parameters():
        parameter.grad = None
    return model, optimizer


def _fake_batch(batch: Any, fake: FakeTensorMode) -> tuple[Any, list[torch.Tensor]]:
    """Return a copy of a batch without data, and the tensors in it, whatever their containers."""
    memo: dict[int, Any] = {}
    with _CopyToCpu(fake):
        copied = copy.deepcopy(batch, memo)
    return copied, [each for each in memo.values() if isinstance(each, torch.Tensor)]


class _CopyToCpu(FakeCopyMode):
    """Let deep copies of all tensors be fake ones on the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Any:
        if func not in (torch.Tensor.__deepcopy__, torch.Tensor.clone) or _is_on_cpu(args[0]):
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[arg-type]
        if func is torch.Tensor.clone:  # of a parameter
            return _on_fake_cpu(args[0], self.fake_mode)
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = _on_fake_cpu(tensor, self.fake_mode)
        return memo[id(tensor)]


def _is_on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _choose_foreach(optimizer: torch.optim.Optimizer) -> None:
    """Update many parameters at a time, the default on CUDA."""
    for group in optimizer.param_groups:
        if group.get("foreach", True) is None and not group.get("fused"):
            group["foreach"] = True


def _on_fake_cpu(tensor: torch.Tensor, fake: FakeTensorMode) -> torch.Tensor:
    with fake:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


class _Tracer(TorchDispatchMode):
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
        results = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
        if self._gpu is not None and "convolution_backward" in self._operator:
            self._record_convolution(args, results)
            return results
        for tensor in tensors:
            self._record(tensor)
        if self._gpu is not None:
            self._record_scratch(args, self._gpu)
        return results

    def _record(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = int(storage._cdata), storage.nbytes()
        live = self._live.get(key)
        if live is not None and live.nbytes == nbytes:
            return
        if live is not None:  # resized
            self._forget(key, live.ref)
        block = 0 if self._is_on_host(nbytes) or not nbytes else self._allocate((nbytes,))
        ref = weakref.ref(storage, partial(self._forget, key))
        self._live[key] = _Live(block, nbytes, self._module, ref)

    def _module_of(self, args: tuple[Any, ...]) -> str:
        """Return the module that runs; for a gradient, the one that owns the last tensor it reads."""
        if self._running.innermost or self._phase is not Phase.BACKWARD:
            return self._running.innermost
        for leaf in reversed(tree_leaves(args)):
            if isinstance(leaf, torch.Tensor):
                live = self._live.get(int(leaf.untyped_storage()._cdata))
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

    def _allocate(self, numbers: tuple[int, ...]) -> int:
        self._blocks += 1
        self.events.append(
            Event(Kind.ALLOCATE, self._blocks, self._operator, numbers, self._module)
        )
        return self._blocks

    def _free(self, block: int) -> None:
        self.events.append(Event(Kind.FREE, block, self._operator))

    def _forget(self, key: int, ref: weakref.ref[torch.UntypedStorage]) -> None:
        live = self._live.get(key)
        if live is not None and live.ref is ref:
            del self._live[key]
            if live.block:
                self._free(live.block)

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
        for block in [self._allocate((nbytes,)) for nbytes in scratch][::-1]:
            self._free(block)
        self._operator = operator


def _tests_a_mask() -> bool:
    """Return True if transformers (5) asks if an attention mask leaves out nothing: assumed."""
    frame: FrameType | None = sys._getframe()
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
