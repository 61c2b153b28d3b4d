"""A Lightning Trainer, as far as autobatch uses it.

These protocols list every attribute that is used, public or private, as Lightning 2.6.0 to 2.6.6
have them. mypy accepts no other, and `missing_name` looks for each of them before a run is tuned. A
Callable is a method: a trial may replace it.
"""

from __future__ import annotations

from collections import OrderedDict  # noqa: TC003 -- `missing_name` evaluates the annotations
from collections.abc import Callable  # noqa: TC003
from typing import Any, Protocol


class DataSource(Protocol):
    """`_DataLoaderSource`: one for each loop."""

    instance: Any  # loaders that were passed, or the module or datamodule with the hook
    dataloader: Callable[[], Any]


class BatchProgress(Protocol):
    """`_Progress` in batches."""

    current: Any  # its `ready` is the number of batches in this epoch
    increment_ready: Callable[[], None]
    increment_started: Callable[[], None]
    increment_processed: Callable[[], None]
    increment_completed: Callable[[], None]


class TrainingProgress(BatchProgress, Protocol):
    """`_BatchProgress`."""

    is_last_batch: bool


class PredictionLoop(Protocol):
    """`_PredictionLoop`."""

    batch_progress: BatchProgress
    max_batches: list[int | float]
    setup_data: Callable[[], None]
    _build_kwargs: Callable[..., OrderedDict[str, Any]]
    _build_step_args_from_hook_kwargs: Callable[..., tuple[Any, ...]]
    _combined_loader: Any
    _data_source: DataSource


class EvaluationLoop(PredictionLoop, Protocol):
    """`_EvaluationLoop`, for validation and testing."""

    _max_batches: list[int | float]
    _results: Any


class AutomaticOptimization(Protocol):
    """`_AutomaticOptimization`."""

    run: Callable[..., Any]
    _make_closure: Callable[..., Any]
    _training_step: Callable[[OrderedDict[str, Any]], Any]


class ManualOptimization(Protocol):
    """`_ManualOptimization`."""

    run: Callable[..., Any]
    on_run_end: Callable[[], Any]


class DataFetcher(Protocol):
    """`_DataFetcher`, between a loop and its loader."""

    _start_profiler: Callable[[], Any]
    _stop_profiler: Callable[[], Any]


class EpochLoop(Protocol):
    """`_TrainingEpochLoop`."""

    automatic_optimization: AutomaticOptimization
    manual_optimization: ManualOptimization
    batch_progress: TrainingProgress
    load_state_dict: Callable[..., None]
    max_steps: int
    min_steps: int | None
    restarting: bool
    state_dict: Callable[[], dict[str, Any]]
    val_loop: EvaluationLoop
    _batches_that_stepped: int
    _build_kwargs: Callable[..., OrderedDict[str, Any]]
    _should_accumulate: Callable[[], bool]


class FitLoop(Protocol):
    """`_FitLoop`."""

    advance: Callable[[], None]
    on_advance_start: Callable[[], None]
    epoch_loop: EpochLoop
    epoch_progress: Any  # its `current.completed` is the current epoch
    max_batches: int | float
    restarted_mid_epoch: bool
    restarted_on_epoch_end: bool
    setup_data: Callable[[], None]
    _combined_loader: Any  # None until the loader is set up
    _data_fetcher: DataFetcher | None  # None until training starts
    _data_source: DataSource


class Strategy(Protocol):
    """`Strategy`."""

    handles_gradient_accumulation: bool
    model: Any  # the module, or DistributedDataParallel around it
    restore_checkpoint_after_setup: bool
    root_device: Any  # torch.device
    save_checkpoint: Callable[..., None]
    setup_optimizers: Callable[[Any], None]
    setup_precision_plugin: Callable[[], None]


class LightningModule(Protocol):
    """`LightningModule`."""

    automatic_optimization: bool
    _current_fx_name: str | None
    _on_before_batch_transfer: Callable[..., Any]


class LoggerConnector(Protocol):
    """`_LoggerConnector`, which `self.log` needs."""

    on_batch_start: Callable[..., None]
    on_batch_end: Callable[[], None]
    _current_fx: str | None


class CheckpointConnector(Protocol):
    """`_CheckpointConnector`."""

    resume_start: Callable[..., None]
    _loaded_checkpoint: dict[str, Any]  # empty unless a run resumes


class DataConnector(Protocol):
    """`_DataConnector`."""

    _prepare_dataloader: Callable[..., Any]
    _requires_distributed_sampler: Callable[[Any], bool]


class CombinedLoader(Protocol):
    """`CombinedLoader`."""

    flattened: list[Any]
    iterables: Any
    _mode: str


class Trainer(Protocol):
    """`Trainer`."""

    accumulate_grad_batches: int
    callbacks: list[Any]
    check_val_every_n_epoch: int | None
    ckpt_path: Any
    current_epoch: int
    datamodule: Any
    distributed_sampler_kwargs: dict[str, Any] | None  # None with one device
    enable_autolog_hparams: bool
    enable_validation: bool
    fast_dev_run: int | bool
    fit_loop: FitLoop
    global_step: int
    is_global_zero: bool
    is_last_batch: bool
    lightning_module: Any
    limit_predict_batches: int | float
    limit_test_batches: int | float
    limit_train_batches: int | float
    limit_val_batches: int | float
    log_dir: str | None
    log_every_n_steps: int
    loggers: list[Any]
    lr_scheduler_configs: list[Any]
    max_epochs: int | None
    max_steps: int
    num_devices: int
    num_training_batches: int | float
    optimizers: list[Any]
    overfit_batches: int | float
    precision: str
    precision_plugin: Any
    predict_loop: PredictionLoop
    profiler: Any
    progress_bar_callback: Any
    received_sigterm: bool
    save_checkpoint: Callable[..., None]
    should_stop: bool
    state: Any
    strategy: Strategy
    test_dataloaders: Any
    test_loop: EvaluationLoop
    testing: bool
    train_dataloader: Any
    training: bool
    val_dataloaders: Any
    validate_loop: EvaluationLoop
    world_size: int
    _active_loop: Any
    _checkpoint_connector: CheckpointConnector
    _data_connector: DataConnector
    _logger_connector: LoggerConnector
    _loggers: list[Any]
    _results: Any  # of the active loop
