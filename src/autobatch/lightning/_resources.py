"""Arguments, resources and result of one tuning run in a Trainer."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autobatch import sinks
from autobatch._distributed import current_ranks
from autobatch._loaders.samples import Samples
from autobatch._memory.detect import detect
from autobatch._trials.context import MemoryBudget, TrialContext
from autobatch._trials.optimizers import OptimizerWatch
from autobatch._trials.snapshot import Snapshot
from autobatch.lightning._attribute import BatchSizeAttribute
from autobatch.lightning._beside import tensors_of_callbacks
from autobatch.lightning._compat import data_parallel_size, data_source
from autobatch.lightning._dataloaders import Loaders
from autobatch.lightning._hooks import users_callbacks
from autobatch.lightning._isolation import local_collectives, on_new_loops
from autobatch.lightning._shown import show_validation
from autobatch.lightning._trainer_notes import checked_copy_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from autobatch._loaders.batch_size import LoaderSize, SetBatchSize
    from autobatch._memory import MemoryProbe
    from autobatch._plan import BatchPlan
    from autobatch._report import TuningReport
    from autobatch._search import Search
    from autobatch._settings import Settings
    from autobatch.lightning._trainer import PredictionLoop


@dataclass(frozen=True, slots=True)
class CallbackArguments:
    """Arguments of a callback."""

    settings: Settings  # validated arguments
    known_plan: BatchPlan | None  # the plan to verify instead of a search
    search: Search  # strategy that proposes batch sizes
    # The device whose memory is read; None: the device of the module
    device: str | MemoryProbe | None
    # Makes the largest batch of a size; None to scan the data set for it
    worst_case: Callable[[int], Any] | None
    repairs: bool  # whether the last accumulation window of an epoch is corrected
    batch_arg_name: str  # name of the batch size in the module or its datamodule
    set_batch_size: SetBatchSize | None  # sets the batch size of a loader; None for the default way
    retune_at_epochs: frozenset[int]  # epochs at whose start it tunes again
    evaluates: bool  # whether evaluations are tuned as well
    verbose: bool  # whether progress and report are printed
    survives: bool  # whether training goes on in pieces when memory runs out
    keeps: bool  # whether nothing is tuned


@dataclass(frozen=True, slots=True)
class Tuned:
    """Result of a tuning run."""

    report: TuningReport
    sizes: tuple[LoaderSize, ...]  # of each loader
    is_changed: bool = True  # False if the loaders of an evaluation keep their own sizes
    fingerprint: str = ""  # of the model and the data, in training
    # Of each validation loader; None if they stay as they are
    validation_sizes: tuple[LoaderSize, ...] | None = None
    # Bytes on the device that callbacks held in trials; None if their hooks ran in trials, so that
    # peaks count all that they make
    held_by_callbacks: int | None = None


@dataclass(frozen=True, slots=True)
class TrialResources:
    """Resources of the trials in a Trainer."""

    context: TrialContext  # of the trials of any workload
    loaders: Loaders  # the loaders of training, or of a stage
    samples: Samples  # makes the batches
    copied_bytes: int  # bytes of the copy of all state that is kept on the host
    attribute: BatchSizeAttribute  # with the batch size in the module or its datamodule


@contextmanager
def trial_resources(
    trainer: Any, module: Any, arguments: CallbackArguments, loop: PredictionLoop | None
) -> Iterator[TrialResources]:
    """Capture all state that trials may change, and isolate the Trainer; restore it at the end.

    Raises:
        AutobatchError: A loader's batch size cannot be changed.
        NoDataError: A loader makes no batch.
    """
    probe = detect(arguments.device, module.device)
    began = probe.clock()
    with (
        BatchSizeAttribute(module, arguments.batch_arg_name) as attribute,
        current_ranks(data_parallel_size(trainer), local_collectives(trainer)) as ranks,
        ranks.abort_together(),
        Snapshot() as before_hooks,
        Snapshot() as snapshot,
        OptimizerWatch(probe.clock) as optimizers,
        sinks.progress(verbose=arguments.verbose and ranks.rank == 0) as shown,
        on_new_loops(trainer),
    ):
        shown.begin("reading batches", None)
        # Hooks that make the loaders may change the module and the datamodule, which every trial
        # has to see
        before_hooks.capture_small_values(module, trainer.datamodule)
        loaders = _asked_for(trainer, arguments, loop)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scalers = [] if scaler is None else [scaler]
        captured = (trainer.strategy.model, *trainer.optimizers, *schedulers, *scalers)
        copied_bytes, *_ = ranks.gather(checked_copy_bytes(captured, trainer.num_devices))
        snapshot.capture(*captured)
        # Callbacks are silent, but a step may change their attributes
        snapshot.capture_small_values(trainer.datamodule, *users_callbacks(trainer))
        budget = MemoryBudget(probe, arguments.settings.memory_limit)
        capturing = nullcontext  # the module and its optimizers are captured already
        context = TrialContext(probe, began, budget, snapshot, optimizers, capturing, ranks, shown)
        for tensors in tensors_of_callbacks(trainer).values():
            probe.attach(*tensors)
        with Samples(loaders, snapshot, module.device, arguments.worst_case) as samples:
            samples.check()
            yield TrialResources(context, loaders, samples, copied_bytes, attribute)


def _asked_for(trainer: Any, arguments: CallbackArguments, loop: PredictionLoop | None) -> Loaders:
    """Return the loaders of an evaluation, or of training; validation shows its own then."""
    if loop is not None:
        return Loaders(trainer, data_source(loop), mode="sequential")
    source, setter = data_source(trainer.fit_loop), arguments.set_batch_size
    loaders = Loaders(trainer, source, mode="max_size_cycle", setter=setter)
    if arguments.retune_at_epochs:
        loaders.check_later_epochs()
    show_validation(trainer)
    return loaders
