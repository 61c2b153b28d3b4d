"""Training and evaluation steps of a Trainer as workloads."""

from __future__ import annotations

import contextlib
import importlib
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from autobatch._memory.oom import is_oom
from autobatch.lightning._compat import package_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from autobatch.lightning._trial_data import Samples

_START_HOOKS: Final = ("on_fit_start", "on_train_start", "on_train_epoch_start")


class StartHooks:
    """The module's hooks at the start of a run, which trials call only where a step fails without what they make.

    They are left out otherwise: what they do outside of the module could not be taken back.

    Args:
        trainer: The Trainer.
        names: Those that are called once, in their order.
        batch: The one that is called before each batch.
    """

    def __init__(self, trainer: Any, names: Sequence[str], batch: str) -> None:
        self._trainer = trainer
        self._names = names
        self._batch = batch
        self._call = importlib.import_module(f"{package_of(trainer)}.trainer.call")
        self._are_needed = False

    def first(self, step: Callable[[], None]) -> None:
        """Take the first step of a trial, with what it needs."""
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
        """Call what belongs before a run, where a first step has shown that it is needed."""
        for hook in self._overridden(*self._names) if self._are_needed else ():
            self._call._call_lightning_module_hook(self._trainer, hook)

    def before_batch(self, *arguments: Any) -> None:
        """Call what belongs before a batch, where that is needed."""
        if self._are_needed:
            hook = self._call._call_lightning_module_hook
            hook(self._trainer, self._batch, *arguments)

    def _overridden(self, *names: str) -> list[str]:
        kind = importlib.import_module(package_of(self._trainer)).LightningModule
        own = type(self._trainer.lightning_module)
        return [name for name in names if getattr(own, name, None) is not getattr(kind, name)]


def on_device(trainer: Any, batch: Any, dataloader_idx: int) -> Any:
    """A batch made ready for a step, as the loops of Lightning 2.6 do it."""
    if trainer.strategy.root_device.type == "cpu":
        # Where the transfer copies nothing, a copy stands for it: a step may write into its batch.
        applying = importlib.import_module("lightning_utilities.core.apply_func")
        batch = applying.apply_to_collection(batch, torch.Tensor, torch.clone)
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    call = importlib.import_module(f"{package_of(trainer)}.trainer.call")
    return call._call_strategy_hook(
        trainer, "batch_to_device", batch, dataloader_idx=dataloader_idx
    )


# Micro-batches granted until every optimizer of a module that optimises by hand has stepped
_PATIENCE: Final = 32


class TrainingSteps:
    """Optimizer steps of a Trainer at any batch size: precision, clipping, closures and hooks are the real ones.

    A batch goes the way it goes in Lightning 2.6's `_TrainingEpochLoop.advance`, without what belongs to an epoch:
    callbacks, batch hooks, schedulers, logging and validation.

    Args:
        trainer: The Trainer.
        samples: Makes the batches.
        named: Told the batch size before the first step, since a step may look at the attribute that names it.
    """

    def __init__(self, trainer: Any, samples: Samples, named: Callable[[int], None]) -> None:
        self._trainer = trainer
        self._samples = samples
        self._named = named
        self._hooks = StartHooks(trainer, _START_HOOKS, "on_train_batch_start")

    def __call__(self, batch_size: int, accumulate: int) -> Generator[None]:
        """Yield after each optimizer step."""
        if self._is_automatic:
            # By hand it is the module that accumulates: the Trainer's number would only disturb the bookkeeping
            self._trainer.accumulate_grad_batches = accumulate
        self._named(batch_size)
        batches = cycle(self._samples.batches(batch_size))
        begin = partial(self._begin, next(batches))
        with _waiting(self._trainer.optimizers) as waiting:
            self._hooks.first(begin)
            taken = 1
            while waiting and not self._is_automatic and taken < _PATIENCE:
                # Some step every few micro-batches only, and need their memory then
                self._micro_batch(next(batches), taken)
                taken += 1
        for index in count(taken):
            if index % accumulate == 0:
                yield
            self._micro_batch(next(batches), index)

    def loss(self, batch: Any) -> Any:
        """What `training_step` makes of a batch that is on the device, as automatic optimisation calls it, and no more.

        None where the module says that there is nothing to learn from it. A trial has run before.
        """
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        loop.batch_progress.reset()
        self._hooks.before_run()
        trainer._logger_connector.on_batch_start(batch)  # `self.log` needs it
        self._hooks.before_batch(batch, 0)
        arguments = loop._build_kwargs(OrderedDict(), batch, 0)
        result = loop.automatic_optimization._training_step(arguments)
        trainer._logger_connector.on_batch_end()
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
        trainer._logger_connector.on_batch_start(batch)  # `self.log` needs it
        self._hooks.before_batch(batch, index)
        loop.batch_progress.increment_started()
        arguments = loop._build_kwargs(OrderedDict(), batch, index)
        if self._is_automatic:
            loop.automatic_optimization.run(trainer.optimizers[0], index, arguments)
        else:
            _run_by_hand(loop.manual_optimization, arguments)
        loop.batch_progress.increment_processed()
        trainer._logger_connector.on_batch_end()
        loop.batch_progress.increment_completed()


def _run_by_hand(loop: Any, arguments: OrderedDict[str, Any]) -> None:
    try:
        loop.run(arguments)
    except BaseException:
        # Lightning 2.6 takes what it hooked into the optimizers out again only where the step succeeds
        loop.on_run_end()
        raise


@contextmanager
def _waiting(optimizers: list[Any]) -> Iterator[set[int]]:
    """The optimizers that have not stepped yet, by their ids: kept up to date while the body runs."""
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


@dataclass(frozen=True, slots=True)
class Stage:
    """One of the ways in which a Trainer of Lightning 2.6 runs a module without training it.

    Args:
        name: Of the function of the Trainer, and of its state meanwhile.
        hook: What the module's hooks are called after: "validation" of `on_validation_start`.
        loop: The attribute of the Trainer that holds its loop.
    """

    name: Literal["validate", "test", "predict"]
    hook: str
    loop: str

    @property
    def step(self) -> str:
        """The module's step."""
        return f"{self.hook}_step"


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
    """The loaders that a method of the Trainer takes, in its order; `ValueError` where others were given."""
    if method == "fit":
        if dataloaders is not None:
            raise ValueError(
                "dataloaders are for validate, test and predict; give fit its train_dataloaders."
            )
        return (train_dataloaders, val_dataloaders)
    if method not in STAGES:
        raise ValueError(
            f"method={method!r} is none of a Trainer's; give 'fit', 'validate', 'test' or 'predict'."
        )
    if train_dataloaders is not None or val_dataloaders is not None:
        raise ValueError(
            f"train_dataloaders and val_dataloaders are for fit; give {method} its dataloaders."
        )
    return (dataloaders,)


def before_data(trainer: Any, stage: Stage, act: Callable[[], None]) -> Callable[[], None]:
    """Act before the loop of a stage sets its data up: the first moment at which the model is on its device.

    What hides the method of the loops of Lightning 2.6 goes with the call, or by what is returned.
    """
    loop = getattr(trainer, stage.loop)

    def forget() -> None:
        vars(loop).pop("setup_data", None)

    def act_and_set_up() -> None:
        forget()
        # The loop has switched gradients off; trials switch them for themselves
        with torch.inference_mode(mode=False), torch.enable_grad():
            act()
        loop.setup_data()

    loop.setup_data = act_and_set_up
    return forget


class EvaluationSteps:
    """Steps without gradients at any batch size, a batch of each loader in turn.

    A batch goes the way it goes in `_EvaluationLoop._evaluation_step` and `_PredictionLoop._predict_step` of Lightning
    2.6, without callbacks, batch hooks and logging.

    Args:
        trainer: The Trainer.
        samples: Makes the batches.
        stage: Which steps.
        after: A training loop of which one update runs first: what it leaves on the device stays while validating.
    """

    def __init__(
        self,
        trainer: Any,
        samples: Samples,
        stage: Stage,
        after: Callable[[], Generator[Any]] | None,
    ) -> None:
        self._trainer = trainer
        self._samples = samples
        self._stage = stage
        self._after = after
        self._call = importlib.import_module(f"{package_of(trainer)}.trainer.call")
        names = (f"on_{stage.hook}_start", f"on_{stage.hook}_epoch_start")
        self._hooks = StartHooks(trainer, names, f"on_{stage.hook}_batch_start")

    def __call__(self, batch_size: int, accumulate: int) -> Iterator[None]:
        """Yield after each round of the loaders; there is nothing to accumulate."""
        batches = self._samples.batches(batch_size)
        with contextlib.ExitStack() as after:
            if self._after is not None:
                after.callback(_give_modes_back(self._trainer.lightning_module))
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
        former, state.stage = state.stage, type(state.stage)(self._stage.name)
        try:
            with torch.no_grad():
                yield
        finally:
            state.stage = former

    def _round(self, batches: Sequence[Any], index: int) -> None:
        hook = f"on_{self._stage.hook}_model_eval"
        self._call._call_lightning_module_hook(self._trainer, hook)
        for position, batch in enumerate(batches):
            self._step(batch, index, position if len(batches) > 1 else None)

    def _step(self, batch: Any, index: int, dataloader_idx: int | None) -> None:
        trainer, loop = self._trainer, self._trainer._active_loop
        batch = on_device(trainer, batch, dataloader_idx or 0)
        arguments = loop._build_kwargs(batch, index, dataloader_idx)
        loop.batch_progress.increment_ready()
        logs = self._stage.hook != "predict"
        if logs:  # `self.log` needs it
            trainer._logger_connector.on_batch_start(batch, dataloader_idx)
        self._hooks.before_batch(*arguments.values())
        given = loop._build_step_args_from_hook_kwargs(arguments, self._stage.step)
        self._call._call_strategy_hook(trainer, self._stage.step, *given)
        if logs:
            trainer._logger_connector.on_batch_end()


def _give_modes_back(module: torch.nn.Module) -> Callable[[], None]:
    modes = {part: part.training for part in module.modules()}

    def give_back() -> None:
        for part, mode in modes.items():
            part.training = mode

    return give_back
