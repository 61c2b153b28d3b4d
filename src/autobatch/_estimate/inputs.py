"""Arguments of an estimate, checked once, and the step that is traced."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from autobatch._memory.estimate.events import UntraceableError
from autobatch._memory.estimate.prediction import MemoryEstimate
from autobatch._memory.estimate.tracer import TrainingStep
from autobatch._trials.batches import listed, map_leaves, row_counts
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autobatch._memory.estimate.scratch import Gpu

Optimizer = torch.optim.Optimizer | Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]

AUTOCAST: Final = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # by precision
PARAMETERS: Final = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}
_SHARDED: Final = ("torch.distributed", "deepspeed", "fairscale", "megatron")
_QUANTISED: Final = ("bitsandbytes", "torchao")


@dataclass(frozen=True, slots=True)
class Inputs:
    """A step to be estimated."""

    step: TrainingStep  # the step: model, optimizer, loss and batches
    precision: str  # precision as a Trainer names it

    @classmethod
    def checked(
        cls,
        model: Any,
        step: Any,
        batch: Any,
        optimizer: Optimizer,
        precision: str,
        accumulate: int,
    ) -> Inputs:
        """Return the inputs; `ValueError` for a bad argument, `AutobatchError` for a refusal."""
        if not isinstance(model, nn.Module):
            raise ValueError(f"model={model!r} is not a torch.nn.Module; give the model to train.")
        if not callable(step):
            raise ValueError(f"step={step!r} is not a function; give step(model, batch) -> loss.")
        try:
            inspect.signature(step).bind(model, batch)
        except TypeError as error:
            raise ValueError(f"step is not callable as step(model, batch): {error}.") from None
        if precision not in (*AUTOCAST, *PARAMETERS):
            raise ValueError(
                f"precision={precision!r} is not modelled; give one of "
                f"{', '.join((*AUTOCAST, *PARAMETERS))}."
            )
        if type(accumulate) is not int or accumulate < 1:
            raise ValueError(
                f"accumulate={accumulate!r} is not a count; give micro-batches per update, 1 or "
                "more."
            )
        rows = row_counts(batch)
        if len(rows) != 1 or not all(rows):
            raise ValueError(
                f"batch has tensors of {listed(rows)} rows, and one batch has to be repeated row "
                "by row; give a collated batch whose tensors have one row per sample."
            )
        made = _optimizer_of(model, optimizer)
        repeated = partial(_repeated, batch, rows.pop())
        return cls.of(TrainingStep(model, made, step, repeated, accumulate=accumulate), precision)

    @classmethod
    def of(cls, step: TrainingStep, precision: str) -> Inputs:
        """Return the inputs of a step; `AutobatchError` for one that is not modelled."""
        for reason in _reasons(step.model, precision):
            raise refusal(reason)
        return cls(step, precision)

    def estimated(self, gpu: Gpu) -> MemoryEstimate:
        """Trace the step; `AutobatchError` if its memory cannot be predicted."""
        step = replace(self.step, autocast=AUTOCAST.get(self.precision))
        try:
            return MemoryEstimate.of(step, gpu)
        except UntraceableError as error:
            raise refusal(str(error)) from error.__cause__

    def without_data(self) -> Inputs:
        """Return the step with copies of model and optimizer on "meta", which may be changed."""
        model = self.step.model
        trainer = getattr(model, "_trainer", None)
        memo: dict[int, Any] = {} if trainer is None else {id(trainer): None}
        for tensor in (*model.parameters(), *model.buffers()):
            empty = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        copied, optimizer = copy.deepcopy((model, self.step.optimizer), memo)
        return replace(self, step=replace(self.step, model=copied, optimizer=optimizer))


def _repeated(batch: Any, rows: int, size: int) -> Any:
    """Return a batch of so many samples, the rows of the given one in turn."""

    def repeat(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.ndim:
            return leaf
        return leaf[torch.arange(size, device=leaf.device) % rows]

    return map_leaves(repeat, batch)


def _optimizer_of(model: nn.Module, optimizer: Optimizer) -> torch.optim.Optimizer:
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("model has no parameter that is trained; set requires_grad of some.")
    made = optimizer(trained) if callable(optimizer) else None
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer={optimizer!r} is neither an optimizer nor a function of parameters that "
            "returns one; give for example torch.optim.AdamW."
        )
    return made


def _reasons(model: nn.Module, precision: str) -> Iterator[str]:
    if not model.training:
        yield "the model is in eval mode; call model.train() to estimate its training"
    for name, part in model.named_modules():
        shown, kind = name or "the model", type(part)
        if isinstance(part, nn.DataParallel) or kind.__module__.startswith(_SHARDED):
            yield f"{shown} is a {kind.__name__}, and models on several devices are not modelled"
        if hasattr(part, "_orig_mod"):
            yield f"{shown} is compiled, and compiled steps hold other tensors"
        if kind.__module__.startswith(_QUANTISED):
            yield f"{shown} is a {kind.__name__}, whose kernels are not modelled"
        if getattr(part, "sparse", False) is True:
            yield f"{shown} has sparse gradients, which are not modelled"
    for name, parameter in model.named_parameters():
        kinds = type(parameter), type(parameter.data)
        if any(kind.__module__.startswith(_SHARDED) for kind in kinds):
            yield f"{name} is sharded, and models on several devices are not modelled"
    kept = PARAMETERS.get(precision)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if kept is not None and dtypes - {kept}:
        yield (
            f"precision={precision!r} needs parameters of {kept}, and the model has others; "
            "convert it with model.to first"
        )


def refusal(reason: str) -> AutobatchError:
    """Return the error of a step that is not modelled, for a reason."""
    return AutobatchError(
        f"The memory of this step cannot be estimated: {reason}. To find the batch size on the "
        "GPU, use autobatch.find or AutoBatch."
    )
