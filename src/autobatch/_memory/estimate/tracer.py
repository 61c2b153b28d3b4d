"""Trace of a training step on fake tensors: nothing is computed, and no state of the user changes.

Fake tensors and the dicts of global hooks have no public names in torch 2.13.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import sys
import warnings
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
from torch.nn.modules import module as module_hooks
from torch.optim import optimizer as optimizer_hooks
from torch.utils._pytree import tree_leaves

from autobatch._memory.estimate.cuda import CudaOperators
from autobatch._memory.estimate.events import Event, Origin, Phase, UntraceableError
from autobatch._memory.estimate.recorder import Recorder, RunningModules
from autobatch._memory.ledger import unobserved
from autobatch._undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable

    from autobatch._memory.estimate.scratch import Gpu

# The first step creates gradients and optimizer state, the second runs with them
_STEPS: Final = 2
_STEPS_OF_LSTM: Final = 3  # memory reserved on an H200 still grew in the third
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# The one hook in it lets embeddings need gradients, for checkpoints (transformers 5.24)
_KEEPS_NOTHING: Final = "transformers.modeling_utils"
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
        with _Untouched(), unobserved(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a copy without its Trainer
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            model, optimizer = _fake_copy(step, fake)
            if gpu is not None:
                _choose_foreach(optimizer)
            running = RunningModules(model)
            recorder = Recorder(gpu, running, deadline)
            recorder.attach_model(model)
            recorder.attach(tree_leaves(list(optimizer.state.values())), Origin.OPTIMIZER_STATE)
            batch, tensors = _fake_batch(step.batch(batch_size), fake)
            recorder.attach(tensors, Origin.BATCH)
            operators = contextlib.nullcontext() if gpu is None else CudaOperators(gpu)
            with operators, fake, recorder, running:
                _run(step, model, optimizer, batch, recorder)
    except UntraceableError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UntraceableError(
            f"the step depends on values of tensors ({error.func}), and a trace has only their shapes"
        ) from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].partition(". ")[0]
        raise UntraceableError(f"the step does not run on fake tensors ({reason})") from error
    return recorder.events


def _run(
    step: TrainingStep,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    recorder: Recorder,
) -> None:
    autocast = torch.autocast("cpu", step.autocast or torch.bfloat16, step.autocast is not None)
    has_lstm = any(isinstance(part, torch.nn.LSTM) for part in model.modules())
    for _ in range(_STEPS_OF_LSTM if has_lstm else _STEPS):
        for micro_batch in range(step.accumulate):
            recorder.begin(Phase.FORWARD)
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
            recorder.begin(Phase.BACKWARD)
            (loss / step.accumulate if step.accumulate > 1 else loss).backward()
        recorder.begin(Phase.OPTIMIZER)
        optimizer.step()
        if not step.zeroes_after_forward:
            optimizer.zero_grad()
        recorder.begin(Phase.END)


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__


def _check(model: torch.nn.Module, gpu: Gpu | None) -> None:
    """Refuse models whose memory is not modelled, or that the trace might change."""
    for name, part in model.named_modules():
        is_plain_lstm = isinstance(part, torch.nn.LSTM) and not part.proj_size
        if isinstance(part, torch.nn.RNNBase) and not (gpu and is_plain_lstm):
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
        copies = func in (torch.Tensor.__deepcopy__, torch.Tensor.clone)
        if not copies or args[0].device.type == "cpu":
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[arg-type]
        if func is torch.Tensor.clone:  # of a parameter
            return _on_fake_cpu(args[0], self.fake_mode)
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = _on_fake_cpu(tensor, self.fake_mode)
        return memo[id(tensor)]


def _choose_foreach(optimizer: torch.optim.Optimizer) -> None:
    """Update many parameters at a time, the default on CUDA."""
    for group in optimizer.param_groups:
        if group.get("foreach", True) is None and not group.get("fused"):
            group["foreach"] = True


def _on_fake_cpu(tensor: torch.Tensor, fake: FakeTensorMode) -> torch.Tensor:
    with fake:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


class _Untouched(Undo):
    """Global state in the body of which nothing is left: random numbers, hooks, autocast, modes."""

    def start(self) -> None:
        self.add(partial(random.setstate, random.getstate()))
        self.add(partial(torch.set_rng_state, torch.get_rng_state()))
        if (numpy := sys.modules.get("numpy")) is not None:
            self.add(partial(numpy.random.set_state, numpy.random.get_state()))
        for hooks in _global_hooks():
            self.add(partial(_refill, hooks, dict(hooks)))
            hooks.clear()
        self.enter_context(torch.enable_grad())
        # A context of autocast would keep the casts of those within it
        self.add(partial(torch.set_autocast_enabled, "cpu", torch.is_autocast_enabled("cpu")))
        torch.set_autocast_enabled("cpu", False)
        if "torch._dynamo" in sys.modules:
            self.enter_context(torch.compiler.set_stance("force_eager"))


def _global_hooks() -> list[dict[int, Any]]:
    return [
        module_hooks._global_forward_hooks,
        module_hooks._global_forward_pre_hooks,
        module_hooks._global_backward_hooks,
        module_hooks._global_backward_pre_hooks,
        optimizer_hooks._global_optimizer_pre_hooks,
        optimizer_hooks._global_optimizer_post_hooks,
    ]


def _refill(hooks: dict[int, Any], former: dict[int, Any]) -> None:
    hooks.clear()
    hooks.update(former)
