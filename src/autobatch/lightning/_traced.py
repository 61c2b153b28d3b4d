"""The training step of a Trainer, for a trace that predicts its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._memory.estimate.events import UntraceableError
from autobatch._memory.estimate.tracer import TrainingStep
from autobatch._report.tradeoff import unwrapped
from autobatch.lightning._compat import before_batch_transfer, build_step_kwargs

if TYPE_CHECKING:
    from autobatch._loaders.samples import Samples
    from autobatch.lightning._trainer import Trainer

_AUTOCAST: Final = {
    "32-true": None,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
_TRANSFER_HOOKS: Final = ("transfer_batch_to_device", "on_after_batch_transfer")


def traceable_step(
    trainer: Trainer, module: Any, samples: Samples, accumulate: int
) -> TrainingStep:
    """Return the step that automatic optimization takes, without its callbacks and logging.

    Raises:
        UntraceableError: The step is another one.
    """
    if not module.automatic_optimization:
        raise UntraceableError("the module optimizes by itself")
    if trainer.precision not in _AUTOCAST:
        raise UntraceableError(f"precision {trainer.precision} is not modelled")
    if samples.batches_at_once > 1:
        raise UntraceableError("steps take batches of several loaders in turn")
    for hook in _TRANSFER_HOOKS:
        if any(_overrides(owner, hook) for owner in (module, trainer.datamodule)):
            raise UntraceableError(f"{hook} is not traced")

    def batch(size: int) -> Any:
        made = trainer.precision_plugin.convert_input(next(samples.batches(size)))
        return before_batch_transfer(module, made, 0)

    def loss(model: Any, batch: Any) -> Any:
        arguments = build_step_kwargs(trainer.fit_loop.epoch_loop, batch, 0)
        return model.training_step(*arguments.values())

    return TrainingStep(
        module,
        unwrapped(trainer.optimizers[0]),
        loss,
        batch,
        _AUTOCAST[trainer.precision],
        accumulate,
        zeroes_after_forward=True,
    )


def _overrides(owner: Any, hook: str) -> bool:
    """Return True if a module or datamodule has a hook of its own."""
    function = getattr(type(owner), hook, None)
    return function is not None and not function.__module__.endswith("core.hooks")
