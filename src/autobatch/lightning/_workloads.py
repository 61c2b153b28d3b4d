"""Training and evaluation steps of a Trainer as workloads."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from autobatch._memory.oom import is_oom
from autobatch._report.tradeoff import unwrapped
from autobatch.lightning._compat import (
    active_loop,
    before_batch_transfer,
    build_evaluation_kwargs,
    build_step_args,
    build_step_kwargs,
    call_module_hook,
    call_strategy_hook,
    logger_connector,
    package,
    patched,
    training_step_result,
)

if TYPE_CHECKING:
    from collections import OrderedDict
    from collections.abc import Callable, Generator, Iterator, Sequence

    from autobatch.lightning._trainer import ManualOptimization, PredictionLoop, Trainer
    from autobatch.lightning._trial_data import Samples

_START_HOOKS: Final = ("on_fit_start", "on_train_start", "on_train_epoch_start")
# Micro-batches in which every optimizer of a module with manual optimization has to step once
_FIRST_STEPS_WITHIN: Final = 32


class TrainingSteps:
    """Optimizer steps of a Trainer at any batch size, with its precision, clipping and hooks.

    A batch takes the path of `_TrainingEpochLoop.advance` in Lightning 2.6, without the parts that
    belong to an epoch: callbacks, batch hooks, schedulers, logging and validation.

    Args:
        trainer: The Trainer.
        samples: Makes the batches.
        set_attribute: Sets the attribute of the batch size, which a step may read.
    """

    def __init__(
        self, trainer: Trainer, samples: Samples, set_attribute: Callable[[int], None]
    ) -> None:
        self._trainer = trainer
        self._samples = samples
        self._set_attribute = set_attribute
        self._hooks = StartHooks(trainer, _START_HOOKS, "on_train_batch_start")

    def __call__(self, batch_size: int, accumulate: int) -> Generator[None]:
        """Yield after each optimizer step."""
        if self._is_automatic:
            # With manual optimization the module accumulates: the number would only disturb
            # Lightning's counters
            self._trainer.accumulate_grad_batches = accumulate
        self._set_attribute(batch_size)
        batches = cycle(self._samples.batches(batch_size))
        with _optimizers_to_step(self._trainer.optimizers) as waiting:
            self._hooks.first(partial(self._begin, next(batches)))
            taken = 1
            while waiting and not self._is_automatic and taken < _FIRST_STEPS_WITHIN:
                # Some optimizers step every few micro-batches only, and need their memory then
                self._micro_batch(next(batches), taken)
                taken += 1
        for index in count(taken):
            if index % accumulate == 0:
                yield
            self._micro_batch(next(batches), index)

    def loss(self, batch: Any) -> Any:
        """Run `training_step` alone on a batch on the device, and return its loss.

        None if the module skips the batch. A trial has to run before.
        """
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        loop.batch_progress.reset()
        self._hooks.before_run()
        logger_connector(trainer).on_batch_start(batch)
        self._hooks.before_batch(batch, 0)
        result = training_step_result(loop, build_step_kwargs(loop, batch, 0))
        logger_connector(trainer).on_batch_end()
        return result.closure_loss

    @property
    def _is_automatic(self) -> bool:
        return bool(self._trainer.lightning_module.automatic_optimization)

    def _begin(self, batch: Any) -> None:
        self._trainer.fit_loop.epoch_loop.batch_progress.reset()
        self._micro_batch(batch, 0)

    def _micro_batch(self, batch: Any, index: int) -> None:
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        batch = on_device(trainer, batch, 0)
        loop.batch_progress.increment_ready()
        logger_connector(trainer).on_batch_start(batch)
        self._hooks.before_batch(batch, index)
        loop.batch_progress.increment_started()
        arguments = build_step_kwargs(loop, batch, index)
        if self._is_automatic:
            loop.automatic_optimization.run(trainer.optimizers[0], index, arguments)
        else:
            _run_manual_optimization(loop.manual_optimization, arguments)
        loop.batch_progress.increment_processed()
        logger_connector(trainer).on_batch_end()
        loop.batch_progress.increment_completed()


def _run_manual_optimization(loop: ManualOptimization, arguments: OrderedDict[str, Any]) -> None:
    try:
        loop.run(arguments)
    except BaseException:
        # Lightning 2.6 removes its hooks from the optimizers only if the step succeeds
        loop.on_run_end()
        raise


@contextlib.contextmanager
def _optimizers_to_step(optimizers: list[Any]) -> Iterator[set[int]]:
    """Yield the ids of optimizers that have not stepped yet; the set shrinks in the body."""
    optimizers = [unwrapped(optimizer) for optimizer in optimizers]  # a wrapper may have no hooks
    waiting = set(map(id, optimizers))
    hooks = [
        optimizer.register_step_post_hook(lambda stepped, *_: waiting.discard(id(stepped)))
        for optimizer in optimizers
        if isinstance(optimizer, torch.optim.Optimizer)
    ]
    try:
        yield waiting
    finally:
        for hook in hooks:
            hook.remove()


def on_device(trainer: Trainer, batch: Any, dataloader_idx: int) -> Any:
    """Prepare a batch for a step as the loops of Lightning 2.6 do."""
    if trainer.strategy.root_device.type == "cpu":
        # The transfer copies nothing here, and a step may write into its batch
        applying = importlib.import_module("lightning_utilities.core.apply_func")
        batch = applying.apply_to_collection(batch, torch.Tensor, torch.clone)
    batch = trainer.precision_plugin.convert_input(batch)
    batch = before_batch_transfer(trainer.lightning_module, batch, dataloader_idx)
    return call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=dataloader_idx)


class StartHooks:
    """Hooks of the module at the start of a run; trials call them only if a step needs them.

    Otherwise they are left out, because their effects outside of the module could not be restored.

    Args:
        trainer: The Trainer.
        names: Hooks that are called once, in their order.
        batch: The hook that is called before each batch.
    """

    def __init__(self, trainer: Trainer, names: Sequence[str], batch: str) -> None:
        self._trainer = trainer
        self._names = names
        self._batch = batch
        self._are_needed = False

    def first(self, step: Callable[[], None]) -> None:
        """Run the first step of a trial, with the hooks if it needs them."""
        if not self._are_needed:
            try:
                step()
            except Exception as error:
                if is_oom(error) or not self._overridden(*self._names, self._batch):
                    raise
                self._are_needed = True
            else:
                return
        self.before_run()
        step()

    def before_run(self) -> None:
        """Call the hooks that start a run, if a first step needed them."""
        for hook in self._overridden(*self._names) if self._are_needed else ():
            call_module_hook(self._trainer, hook)

    def before_batch(self, *arguments: Any) -> None:
        """Call the hook before a batch, if a first step needed it."""
        if self._are_needed:
            call_module_hook(self._trainer, self._batch, *arguments)

    def _overridden(self, *names: str) -> list[str]:
        kind = package(self._trainer).LightningModule
        own = type(self._trainer.lightning_module)
        return [name for name in names if getattr(own, name, None) is not getattr(kind, name)]


@dataclass(frozen=True, slots=True)
class Stage:
    """One of the methods of a Trainer of Lightning 2.6 that run a module without training it.

    Args:
        name: Name of the method, and of the state of the Trainer meanwhile.
        hook: Name in the hooks of the module: "validation" of `on_validation_start`.
        loop: Attribute of the Trainer that holds its loop.
    """

    name: Literal["validate", "test", "predict"]
    hook: str
    loop: str

    @property
    def step(self) -> str:
        """Name of the step of the module."""
        return f"{self.hook}_step"

    def loop_of(self, trainer: Trainer) -> PredictionLoop:
        """Return the loop of a Trainer."""
        loop: PredictionLoop = getattr(trainer, self.loop)
        return loop


VALIDATION: Final = Stage("validate", "validation", "validate_loop")
STAGES: Final[dict[str, Stage]] = {
    stage.name: stage
    for stage in (
        VALIDATION,
        Stage("test", "test", "test_loop"),
        Stage("predict", "predict", "predict_loop"),
    )
}


def loaders_for(
    method: str, train_dataloaders: Any, val_dataloaders: Any, dataloaders: Any
) -> tuple[Any, ...]:
    """Return the loaders that a method of the Trainer takes; `ValueError` for any other."""
    if method == "fit":
        if dataloaders is not None:
            raise ValueError(
                "dataloaders are for validate, test and predict; give fit its train_dataloaders."
            )
        return (train_dataloaders, val_dataloaders)
    if method not in STAGES:
        raise ValueError(
            f"method={method!r} is none of a Trainer's; give 'fit', 'validate', 'test' or "
            "'predict'."
        )
    if train_dataloaders is not None or val_dataloaders is not None:
        raise ValueError(
            f"train_dataloaders and val_dataloaders are for fit; give {method} its dataloaders."
        )
    return (dataloaders,)


def before_data(trainer: Trainer, stage: Stage, act: Callable[[], None]) -> patched:
    """Return a patch to call `act` once before a loop sets up its data, with the model in place.

    It restores itself then.
    """
    loop = stage.loop_of(trainer)

    def act_and_set_up() -> None:
        patch.restore()
        # The loop has disabled gradients; trials do so by themselves
        with torch.inference_mode(mode=False), torch.enable_grad():
            act()
        loop.setup_data()

    patch = patched(loop, setup_data=act_and_set_up)
    return patch


class EvaluationSteps:
    """Steps without gradients at any batch size, with a batch of each loader in turn.

    A batch takes the path of `_EvaluationLoop._evaluation_step` and `_PredictionLoop._predict_step`
    in Lightning 2.6, without callbacks, batch hooks and logging.

    Args:
        trainer: The Trainer.
        samples: Makes the batches.
        stage: The stage.
        after: A training loop, of which one update runs first: its memory stays in use while
            validating.
    """

    def __init__(
        self,
        trainer: Trainer,
        samples: Samples,
        stage: Stage,
        after: Callable[[], Generator[Any]] | None,
    ) -> None:
        self._trainer = trainer
        self._samples = samples
        self._stage = stage
        self._after = after
        names = (f"on_{stage.hook}_start", f"on_{stage.hook}_epoch_start")
        self._hooks = StartHooks(trainer, names, f"on_{stage.hook}_batch_start")

    def __call__(self, batch_size: int, accumulate: int) -> Iterator[None]:
        """Yield after each round of the loaders; nothing is accumulated."""
        batches = self._samples.batches(batch_size)
        with contextlib.ExitStack() as after:
            if self._after is not None:
                after.enter_context(_modes_restored(self._trainer.lightning_module))
                next(after.enter_context(contextlib.closing(self._after())))
            with self._evaluating():
                self._hooks.first(lambda: self._round(batches, 0))
            for index in count(1):
                yield
                with self._evaluating():
                    self._round(batches, index)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        state = self._trainer.state
        with patched(state, stage=type(state.stage)(self._stage.name)), torch.no_grad():
            yield

    def _round(self, batches: Sequence[Any], index: int) -> None:
        call_module_hook(self._trainer, f"on_{self._stage.hook}_model_eval")
        for position, batch in enumerate(batches):
            self._step(batch, index, position if len(batches) > 1 else None)

    def _step(self, batch: Any, index: int, dataloader_idx: int | None) -> None:
        trainer, loop = self._trainer, active_loop(self._trainer)
        batch = on_device(trainer, batch, dataloader_idx or 0)
        arguments = build_evaluation_kwargs(loop, batch, index, dataloader_idx)
        loop.batch_progress.increment_ready()
        is_logging = self._stage.hook != "predict"
        if is_logging:
            logger_connector(trainer).on_batch_start(batch, dataloader_idx)
        self._hooks.before_batch(*arguments.values())
        step = self._stage.step
        call_strategy_hook(trainer, step, *build_step_args(loop, arguments, step))
        if is_logging:
            logger_connector(trainer).on_batch_end()


@contextlib.contextmanager
def _modes_restored(module: torch.nn.Module) -> Iterator[None]:
    """Restore the training mode of each submodule after the body."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
