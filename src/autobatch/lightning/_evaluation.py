"""Evaluation steps of a Trainer as workloads, and its methods that run them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from math import inf
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from autobatch._undo import patched
from autobatch.lightning._compat import (
    active_loop,
    build_evaluation_kwargs,
    build_step_args,
    call_module_hook,
    call_strategy_hook,
    logger_connector,
)
from autobatch.lightning._hooks import Hooks
from autobatch.lightning._shown import evaluation_shown
from autobatch.lightning._training import check_terminated, on_device

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from autobatch.lightning._resources import TrialResources
    from autobatch.lightning._trainer import PredictionLoop, Trainer


@dataclass(frozen=True, slots=True)
class Stage:
    """One of the methods of a Trainer of Lightning 2.6 that run a module without training it."""

    # Name of the method, and of the state of the Trainer meanwhile
    name: Literal["validate", "test", "predict"]
    hook: str  # name in the hooks of the module: "validation" of `on_validation_start`
    limit: str  # attribute of the Trainer that limits its batches to a number or a share

    @property
    def step(self) -> str:
        return f"{self.hook}_step"

    def loop_of(self, trainer: Trainer) -> PredictionLoop:
        loop: PredictionLoop = getattr(trainer, f"{self.name}_loop")
        return loop


VALIDATION: Final = Stage("validate", "validation", "limit_val_batches")
STAGES: Final[dict[str, Stage]] = {
    stage.name: stage
    for stage in (
        VALIDATION,
        Stage("test", "test", "limit_test_batches"),
        Stage("predict", "predict", "limit_predict_batches"),
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


@dataclass(frozen=True, eq=False)
class EvaluationSteps:
    """Steps without gradients at any batch size, with a batch of each loader in turn.

    A batch takes the path of `_EvaluationLoop._evaluation_step` and `_PredictionLoop._predict_step`
    in Lightning 2.6, without logging.
    """

    trainer: Trainer  # on new loops
    resources: TrialResources  # with the loaders of the stage
    stage: Stage
    # A training loop, of which one update runs first: its memory stays in use while validating
    after: Callable[[], Generator[Any]] | None

    @cached_property
    def _hooks(self) -> Hooks:
        hook = self.stage.hook
        names = (f"on_{hook}_start", f"on_{hook}_epoch_start")
        return Hooks(self.trainer, names, f"on_{hook}_batch", self.resources.context.snapshot)

    def __call__(self, batch_size: int, accumulate: int) -> Iterator[None]:
        """Yield after each round of the loaders; nothing is accumulated."""
        if self.after is None:
            self.resources.attribute.restore()
            if batch_size != self.resources.loaders.largest_batch:
                self.resources.attribute.set(batch_size)
        batches = self.resources.samples.batches(batch_size)
        with contextlib.ExitStack() as stack:
            if self.after is not None:
                next(stack.enter_context(contextlib.closing(self.after())))
            with self._evaluating():
                loop, limit = active_loop(self.trainer), getattr(self.trainer, self.stage.limit)
            lengths = stack.enter_context(
                evaluation_shown(self.trainer, loop, self.resources.loaders, batch_size, limit)
            )
            with self._evaluating():
                for attempt in self._hooks.attempts():
                    with attempt:
                        self._begin(batches, lengths)
            for index in count(1):
                yield
                with self._evaluating():
                    self._round(batches, lengths, index)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        state = self.trainer.state
        with patched(state, stage=type(state.stage)(self.stage.name)), torch.no_grad():
            yield

    def _begin(self, batches: Iterator[Any], lengths: Sequence[int | float]) -> None:
        call_module_hook(self.trainer, f"on_{self.stage.hook}_model_eval")
        self._hooks.start()
        self._round(batches, lengths, 0)

    def _round(self, batches: Iterator[Any], lengths: Sequence[int | float], index: int) -> None:
        loaders = self.resources.samples.batches_at_once
        for position, length in zip(range(loaders), lengths, strict=False):
            within = index if length == inf else index % max(1, int(length))
            active_loop(self.trainer).batch_progress.is_last_batch = within + 1 == length
            self._step(next(batches), within, position if loaders > 1 else None)

    def _step(self, batch: Any, index: int, dataloader_idx: int | None) -> None:
        trainer, loop = self.trainer, active_loop(self.trainer)
        check_terminated(trainer)
        batch = on_device(trainer, batch, dataloader_idx or 0)
        arguments = build_evaluation_kwargs(loop, batch, index, dataloader_idx)
        loop.batch_progress.current.ready = index
        loop.batch_progress.increment_ready()
        is_logging = self.stage.hook != "predict"
        if is_logging:
            logger_connector(trainer).on_batch_start(batch, dataloader_idx)
        self._hooks.before_batch(*arguments.values())
        loop.batch_progress.increment_started()
        step = self.stage.step
        outputs = call_strategy_hook(trainer, step, *build_step_args(loop, arguments, step))
        loop.batch_progress.increment_processed()
        self._hooks.after_batch(outputs, *arguments.values())
        if is_logging:
            logger_connector(trainer).on_batch_end()
        loop.batch_progress.increment_completed()
