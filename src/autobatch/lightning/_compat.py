"""Private names of Lightning that autobatch uses, each behind one function.

They read only names that `_trainer` declares: mypy checks this, and `missing_name` that the
installed Lightning has them. Everything was read from Lightning 2.6.6.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._undo import patched
from autobatch.lightning._package import Imported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, MutableMapping

    from autobatch.lightning._trainer import (
        CombinedLoader,
        DataFetcher,
        DataSource,
        EpochLoop,
        EvaluationLoop,
        FitLoop,
        LightningModule,
        LoggerConnector,
        PredictionLoop,
        Trainer,
    )

# Hooks whose values are undone with a failed attempt
_STEPS: Final = ("training_step", "validation_step", "test_step")


def data_source(loop: FitLoop | PredictionLoop) -> DataSource:
    """Return the source that a loop asks for loaders."""
    return loop._data_source


def combined_loader(loop: FitLoop | EvaluationLoop) -> Any:
    """Return the loaders that a loop has set up; None before that."""
    return loop._combined_loader


def showing_training(loop: FitLoop, loaders: CombinedLoader, batches: float) -> patched:
    """Replace the loaders that the training loop has set up, and their batches per epoch."""
    return patched(loop, _combined_loader=loaders, max_batches=batches)


def showing_evaluation(
    loop: PredictionLoop, loaders: CombinedLoader, batches: list[int | float]
) -> patched:
    """Replace the loaders that another loop has set up, and the batches it takes of each."""
    name = "_max_batches" if hasattr(loop, "_max_batches") else "max_batches"
    return patched(loop, _combined_loader=loaders, **{name: batches})


def prepared_loader(trainer: Trainer, loader: Any, *, shuffle: bool, mode: Any) -> Any:
    """Return a loader as a loop makes it of the user's: with a sampler for this rank."""
    return trainer._data_connector._prepare_dataloader(loader, shuffle=shuffle, mode=mode)


def data_parallel_size(trainer: Trainer) -> int:
    """Return the number of ranks that train on different samples.

    Ranks of tensor parallelism share theirs.
    """
    spread = trainer.distributed_sampler_kwargs
    return 1 if spread is None else int(spread["num_replicas"])


def forget_combined_loader(loop: FitLoop | EvaluationLoop) -> None:
    """Make a loop ask for its loaders again when it sets them up."""
    loop._combined_loader = None


def combination_mode(loader: CombinedLoader) -> str:
    """Return the way a CombinedLoader combines several loaders, such as "sequential"."""
    return loader._mode


def requires_distributed_sampler(trainer: Trainer, loader: Any) -> bool:
    """Return whether Lightning will distribute the samples of a loader over the ranks."""
    return trainer._data_connector._requires_distributed_sampler(loader)


def data_fetcher(loop: FitLoop) -> DataFetcher | None:
    """Return the object between a training loop and its loader; None before training starts."""
    return loop._data_fetcher


def fetch_profiler(fetcher: DataFetcher) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return the functions called before and after each fetch."""
    return fetcher._start_profiler, fetcher._stop_profiler


def patched_fetch_profiler(
    fetcher: DataFetcher, before: Callable[[], Any], after: Callable[[], Any]
) -> patched:
    """Replace the functions called before and after each fetch."""
    return patched(fetcher, _start_profiler=before, _stop_profiler=after)


def build_step_kwargs(loop: EpochLoop, batch: Any, index: int) -> OrderedDict[str, Any]:
    """Return the arguments of `training_step`."""
    return loop._build_kwargs(OrderedDict(), batch, index)


def build_evaluation_kwargs(
    loop: EvaluationLoop | PredictionLoop, batch: Any, index: int, dataloader_idx: int | None
) -> OrderedDict[str, Any]:
    """Return the arguments of the batch hooks of an evaluation."""
    return loop._build_kwargs(batch, index, dataloader_idx)


def build_step_args(
    loop: EvaluationLoop | PredictionLoop, arguments: OrderedDict[str, Any], step: str
) -> tuple[Any, ...]:
    """Return the arguments of an evaluation step, given those of its batch hooks."""
    return loop._build_step_args_from_hook_kwargs(arguments, step)


def training_step_result(loop: EpochLoop, arguments: OrderedDict[str, Any]) -> Any:
    """Call `training_step` as automatic optimization does, and return its `ClosureResult`."""
    return loop.automatic_optimization._training_step(arguments)


def replacing_closures(trainer: Trainer, make: Callable[..., Any]) -> patched:
    """Replace the closures of automatic optimization: training_step, zero_grad and backward.

    `make` is called for each micro-batch with the closure and the arguments of the step, the
    optimizer and the index of the batch. What it returns runs under `no_sync` while gradients
    accumulate, and otherwise in `optimizer.step`, before gradients are unscaled and clipped.
    """
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    original = loop._make_closure
    return patched(loop, _make_closure=lambda *values: make(original(*values), *values))


def run_closure(closure: Any, reset: Callable[[], None]) -> Any:
    """Run a closure with another function for zero_grad, and return its `ClosureResult`.

    The function is called before each backward pass; that of the closure is `zero_grad_of` it. Not
    set in the closure: it would refer to itself then.
    """
    return type(closure)(closure._step_fn, closure._backward_fn, reset).closure()


def backward_of(closure: Any) -> Any:
    """Return the function that runs the backward pass of a loss with all its hooks, or None."""
    return closure._backward_fn


def zero_grad_of(closure: Any) -> Any:
    """Return the function that resets gradients; None within an accumulation window."""
    return closure._zero_grad_fn


def logged_results(trainer: Trainer) -> Any:
    """Return the values that `self.log` has collected in this loop, a dict."""
    return trainer._results


def logged_in_step(results: Any) -> dict[str, Any]:
    """Return the entries of `logged_results` that are of a step, and not of the hooks beside it."""
    # The name of the hook, and in evaluation the number of the loader
    return {
        name: each for name, each in results.items() if each.meta.fx.partition(".")[0] in _STEPS
    }


def logged_on_step(trainer: Trainer) -> dict[str, Any]:
    """Return the scalars that the last step has logged for itself, with values of metrics."""
    return {
        name: result._forward_cache
        for name, result in logged_in_step(trainer._results).items()
        if result.meta.on_step
        and isinstance(result._forward_cache, torch.Tensor)
        and result._forward_cache.is_floating_point()
    }


def reduction_on_step(trainer: Trainer, name: str) -> str:
    """Return the `reduce_fx` of a value that `training_step` has logged, such as "mean"."""
    return str(trainer._results[name].meta.reduce_fx.__name__)


def set_logged_on_step(trainer: Trainer, name: str, value: Any) -> None:
    """Replace a value that `training_step` has logged for this step."""
    result = trainer._results[name]
    if result.is_tensor and not result.meta.on_epoch:
        result.value = value
    result._forward_cache = value


def go_on_logging(trainer: Trainer) -> None:
    """Let `training_step` log further values of the batch whose values it has logged.

    In the first batch of an epoch, Lightning takes values for those of the last one if another hook
    has logged in between, and resets them.
    """
    trainer._logger_connector._current_fx = "training_step"


def is_redirected(module: LightningModule) -> bool:
    """Return whether the forward pass of a wrapper has not reached the module yet.

    Lightning 2.6 lets `forward` lead to `training_step` until then.
    """
    return getattr(vars(module).get("forward"), "__name__", "") == "wrapped_forward"


def is_synchronized_in_step(trainer: Trainer) -> bool:
    """Return whether `self.log` of a training step communicates with other ranks."""
    return any(
        result.is_tensor and result.meta.on_step and result.meta.sync.should
        for result in trainer._results.values()
    )


def new_epoch_loop(trainer: Trainer) -> EpochLoop:
    """Return a new loop with the progress that training starts from or has reached.

    Just before a resumed run trains, its progress is still in the checkpoint.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    made: EpochLoop = type(loop)(trainer, loop.min_steps, loop.max_steps)
    resumed = _resumed_progress(trainer)
    if resumed is None:
        made.load_state_dict(loop.state_dict())
    else:
        made.load_state_dict(resumed, "epoch_loop.")
    made.restarting = False
    made.val_loop._data_source = loop.val_loop._data_source
    made.val_loop._combined_loader = loop.val_loop._combined_loader
    made.val_loop._max_batches = loop.val_loop._max_batches
    return made


def new_epoch_progress(trainer: Trainer) -> Any:
    """Return a copy of the progress in epochs that training starts from or has reached."""
    resumed = _resumed_progress(trainer)
    if resumed is None:
        return copy.deepcopy(trainer.fit_loop.epoch_progress)
    progress: Any = type(trainer.fit_loop.epoch_progress)()
    progress.load_state_dict(copy.deepcopy(resumed["epoch_progress"]))
    if trainer.max_steps == -1:
        # As `_FitLoop.on_run_start`
        progress.current.completed = progress.current.processed
    return progress


def load_late_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Return the checkpoint of a run whose strategy loads it only after `on_fit_start`.

    Strategies that shard do: they load weights and optimizers once these are sharded. Now they do
    it here, and Lightning again afterwards. Empty for other strategies and without a checkpoint.
    """
    if not trainer.strategy.restore_checkpoint_after_setup:
        return {}
    # Until then Lightning 2.6 holds the path in a variable of `Trainer._run` alone
    frames = (each.frame for each in inspect.stack(0) if each.function == "_run")
    variables = (each.f_locals for each in frames if each.f_locals.get("self") is trainer)
    path = next(variables, {}).get("ckpt_path")
    if path is not None:
        trainer._checkpoint_connector.resume_start(path)
    return trainer._checkpoint_connector._loaded_checkpoint


def _resumed_progress(trainer: Trainer) -> dict[str, Any] | None:
    loops = trainer._checkpoint_connector._loaded_checkpoint.get("loops") or {}
    progress: dict[str, Any] | None = loops.get("fit_loop")
    return progress if progress and "epoch_progress" in progress else None


def stepping_by(loop: EpochLoop, should_accumulate: Callable[[], bool]) -> patched:
    """Let a function decide in a loop if the optimizer steps after the current batch."""
    return patched(loop, _should_accumulate=should_accumulate)


def should_accumulate(loop: EpochLoop) -> bool:
    """Return whether the optimizer does not step after the current batch."""
    return loop._should_accumulate()


def batches_that_stepped(loop: EpochLoop) -> int:
    """Return the step at which Lightning logs."""
    return loop._batches_that_stepped


def active_loop(trainer: Trainer) -> Any:
    """Return the loop of the stage the Trainer is in."""
    return trainer._active_loop


def call_module_hook(trainer: Trainer, name: str, *arguments: Any) -> Any:
    """Call a hook of the module as the loops do."""
    return Imported.CALL_MODULE_HOOK.of(trainer)(trainer, name, *arguments)


def call_callback_hook(trainer: Trainer, callback: Any, name: str, *arguments: Any) -> None:
    """Call a hook of one callback as the loops do."""
    module = trainer.lightning_module
    with patched(module, _current_fx_name=name):
        getattr(callback, name)(trainer, module, *arguments)


def call_strategy_hook(trainer: Trainer, name: str, *arguments: Any, **keywords: Any) -> Any:
    """Call a method of the strategy as the loops do."""
    return Imported.CALL_STRATEGY_HOOK.of(trainer)(trainer, name, *arguments, **keywords)


def before_batch_transfer(module: LightningModule, batch: Any, dataloader_idx: int) -> Any:
    """Run the hook of the module before a batch is moved to the device."""
    return module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)


def logger_connector(trainer: Trainer) -> LoggerConnector:
    """Return the object that collects the values of `self.log`."""
    return trainer._logger_connector


@contextmanager
def fresh_results(trainer: Trainer) -> Iterator[None]:
    """Collect logged values and results in new objects while the body runs."""
    connector: Any = type(trainer._logger_connector)
    validate, test = trainer.validate_loop, trainer.test_loop
    with (
        patched(trainer, _logger_connector=connector(trainer)),
        patched(validate, _results=type(validate._results)(training=False)),
        patched(test, _results=type(test._results)(training=False)),
    ):
        yield


# Names that only some objects have; their absence is no error


def start_method(strategy: Any) -> str:
    """Return the way a strategy starts its processes: "popen" unless they are spawned or forked."""
    method: str = getattr(strategy, "_start_method", "popen")
    return method


def validation_interval(trainer: Any) -> int | float | None:
    """Return `val_check_interval`; None where time passes between validations."""
    interval: int | float | None = getattr(trainer, "val_check_interval", None)
    return interval


def averages_models(strategy: Any) -> bool:
    """Return whether a strategy averages models in optimizer steps."""
    return getattr(strategy, "_model_averaging_period", None) is not None


def hyperparameters(owner: Any) -> list[MutableMapping[str, Any]]:
    """Return the hyperparameters of a module or datamodule, and those that Lightning logs."""
    kept = (getattr(owner, name, None) for name in ("_hparams", "_hparams_initial"))
    return [each for each in kept if each is not None]
