"""The estimate of a training step in a Trainer, and the step for a trace of its memory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from autobatch._estimate import estimate_of
from autobatch._estimate.inputs import AUTOCAST, PARAMETERS, Inputs, refusal
from autobatch._memory import parse_memory_limit
from autobatch._memory.estimate.events import UntraceableError
from autobatch._memory.estimate.prediction import SIZES
from autobatch._memory.estimate.tracer import TrainingStep
from autobatch._report.tradeoff import unwrapped
from autobatch.lightning._compat import before_batch_transfer, build_step_kwargs, data_parallel_size
from autobatch.lightning._hooks import overrides
from autobatch.lightning._resources import trial_resources

if TYPE_CHECKING:
    from pathlib import Path

    from autobatch._estimate import Estimate
    from autobatch._estimate.device import TargetGpu
    from autobatch._loaders.samples import Samples
    from autobatch.lightning._resources import CallbackArguments
    from autobatch.lightning._trainer import Trainer

_TRANSFER_HOOKS: Final = ("transfer_batch_to_device", "on_after_batch_transfer")


def estimate_training(
    trainer: Any,
    module: Any,
    arguments: CallbackArguments,
    target: TargetGpu,
    calibrate: str | Path | None,
) -> Estimate:
    """Estimate a step on batches of the training loader; restore all state.

    With a target batch size that one micro-batch does not reach, the step accumulates.

    Raises:
        AutobatchError: The memory of the step cannot be estimated.
    """
    with trial_resources(trainer, module, arguments, None) as resources:
        wanted = arguments.settings.target_batch_size
        accumulate = trainer.accumulate_grad_batches if wanted is None else 1
        try:
            step = traceable_step(trainer, module, resources.samples, accumulate)
            batches = {size: step.batch(size) for size in SIZES}
        except UntraceableError as error:
            raise refusal(str(error)) from None
        step = replace(step, batch=batches.__getitem__)
        limit = parse_memory_limit(arguments.settings.memory_limit)
        estimate = estimate_of(Inputs.of(step, trainer.precision), target, limit, calibrate)
        if wanted is not None and estimate.largest < wanted // data_parallel_size(trainer):
            # Gradients live through all forward passes but the first, however many there are
            step = replace(step, accumulate=2)
            estimate = estimate_of(Inputs.of(step, trainer.precision), target, limit, calibrate)
    return estimate


def traceable_step(
    trainer: Trainer, module: Any, samples: Samples, accumulate: int
) -> TrainingStep:
    """Return the step that automatic optimization takes, without its callbacks and logging.

    Raises:
        UntraceableError: The step is another one.
    """
    if not module.automatic_optimization:
        raise UntraceableError("the module optimizes by itself")
    if trainer.precision not in (*AUTOCAST, *PARAMETERS):
        raise UntraceableError(f"precision {trainer.precision} is not modelled")
    if samples.batches_at_once > 1:
        raise UntraceableError("steps take batches of several loaders in turn")
    for hook in _TRANSFER_HOOKS:
        if any(overrides(owner, hook) for owner in (module, trainer.datamodule)):
            raise UntraceableError(f"{hook} is not traced")

    autocast = AUTOCAST.get(trainer.precision)
    # In half precision new tensors are in it too; the context of autocast would be that of the CPU
    default_dtype = nullcontext if autocast else trainer.precision_plugin.forward_context

    def batch(size: int) -> Any:
        made = trainer.precision_plugin.convert_input(next(samples.batches(size)))
        return before_batch_transfer(module, made, 0)

    def loss(model: Any, batch: Any) -> Any:
        arguments = build_step_kwargs(trainer.fit_loop.epoch_loop, batch, 0)
        with default_dtype():
            return model.training_step(*arguments.values())

    optimizer = unwrapped(trainer.optimizers[0])
    return TrainingStep(
        module, optimizer, loss, batch, autocast, accumulate, zeroes_after_forward=True
    )
