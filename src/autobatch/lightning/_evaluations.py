"""A workload that drives Lightning's own validation, test and prediction steps."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from autobatch.lightning._package import package_of
from autobatch.lightning._steps import StartHooks, on_device

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from autobatch.lightning._samples import Samples

__all__ = [
    "STAGES",
    "VALIDATION",
    "Evaluations",
    "Stage",
    "before_data",
    "loaders_for",
]


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


def before_data(
    trainer: Any, stage: Stage, act: Callable[[], None]
) -> Callable[[], None]:
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


class Evaluations:
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
