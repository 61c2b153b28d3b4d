"""Steps that differ in one thing, with the batch that each of them would let fit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from autobatch._estimate.inputs import Inputs

# Methods that let a model recompute its activations, and the attribute that shows it
_SWITCHES: Final = {
    "gradient_checkpointing_enable": "is_gradient_checkpointing",  # transformers 5
    "set_grad_checkpointing": "grad_checkpointing",  # timm 1.0
}
_MOMENTUM: Final = 0.9


# Of block-wise quantised state, as AdamW8bit of bitsandbytes and of torchao have it
_BLOCK: Final = 256  # values that share one scale, in float32
_LEAST_QUANTISED: Final = 4096  # values of a parameter below which its state stays in float32


def changed(inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """Yield each change that applies to a step, in words, and the changed step."""
    step = inputs.step
    if inputs.precision == "32-true":
        yield "precision bf16-mixed", replace(inputs, precision="bf16-mixed")
    if (checkpointed := _checkpointed(inputs)) is not None:
        yield "gradient checkpointing", checkpointed
    if not isinstance(step.optimizer, torch.optim.SGD):
        trained = [p for group in step.optimizer.param_groups for p in group["params"]]
        sgd = torch.optim.SGD(trained, 1e-3, momentum=_MOMENTUM)
        yield "SGD with momentum", replace(inputs, step=replace(step, optimizer=sgd))
    if type(step.optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        eight_bit = AdamW8bit(step.optimizer.param_groups, {})
        yield "8-bit optimizer state", replace(inputs, step=replace(step, optimizer=eight_bit))
    if step.accumulate == 1:
        yield "2 micro-batches per update", replace(inputs, step=replace(step, accumulate=2))


class AdamW8bit(torch.optim.Optimizer):
    """The memory of Adam with 8-bit state and a fused kernel; its values are of no use."""

    def step(self, _: Any = None) -> None:  # type: ignore[override]
        """Create the state, and write into the parameters."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            for name in () if state else ("exp_avg", "exp_avg_sq"):
                state[name] = _state_of(parameter)
            parameter.data.add_(parameter.grad)


def _state_of(parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    count = parameter.numel()
    if count < _LEAST_QUANTISED:
        return (torch.zeros_like(parameter, dtype=torch.float32),)
    scales = parameter.new_zeros(-(-count // _BLOCK), dtype=torch.float32)
    return torch.zeros_like(parameter, dtype=torch.uint8), scales


def _checkpointed(inputs: Inputs) -> Inputs | None:
    """Return the step with checkpointing by the switch of the model; None without one, or if on."""
    if _switch(inputs.step.model) is None:
        return None
    copied = inputs.without_data()
    switch = _switch(copied.step.model)
    switch()
    return copied


def _switch(model: nn.Module) -> Any:
    """Return the method of the outermost module that has one which is off."""
    for part in model.modules():
        for method, state in _SWITCHES.items():
            if hasattr(part, method):
                return None if getattr(part, state, False) is True else getattr(part, method)
    return None
