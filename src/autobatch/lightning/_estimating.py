"""The estimate of a training step in a Trainer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autobatch._estimate import estimate_of
from autobatch._estimate.inputs import Inputs, refusal
from autobatch._loaders.samples import Samples
from autobatch._memory import parse_memory_limit
from autobatch._memory.estimate.events import UntraceableError
from autobatch._memory.estimate.prediction import SIZES
from autobatch.lightning._attribute import FormerBatchSize
from autobatch.lightning._compat import data_parallel_size
from autobatch.lightning._resources import trial_resources
from autobatch.lightning._traced import traceable_step

if TYPE_CHECKING:
    from pathlib import Path

    from autobatch._estimate import Estimate
    from autobatch._estimate.device import TargetGpu
    from autobatch.lightning._resources import CallbackArguments


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
    with (
        FormerBatchSize(module, arguments.batch_arg_name),
        trial_resources(trainer, module, arguments, None) as resources,
        Samples(
            resources.loaders, resources.context.snapshot, module.device, arguments.worst_case
        ) as samples,
    ):
        samples.check()
        try:
            step = traceable_step(trainer, module, samples, trainer.accumulate_grad_batches)
            batches = {size: step.batch(size) for size in SIZES}
        except UntraceableError as error:
            raise refusal(str(error)) from None
        step = replace(step, batch=batches.__getitem__)
        limit = parse_memory_limit(arguments.settings.memory_limit)
        wanted = arguments.settings.target_batch_size
        if wanted is not None:
            step = replace(step, accumulate=1)
        estimate = estimate_of(Inputs.of(step, trainer.precision), target, limit, calibrate)
        if wanted is not None and estimate.largest < wanted // data_parallel_size(trainer):
            # Gradients live through all forward passes but the first, however many there are
            step = replace(step, accumulate=2)
            estimate = estimate_of(Inputs.of(step, trainer.precision), target, limit, calibrate)
    return estimate
