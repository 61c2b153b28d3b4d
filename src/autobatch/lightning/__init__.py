"""AutoBatch: a thin callback, no algorithm."""

from __future__ import annotations

import importlib
import logging
import sys
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from autobatch import sinks
from autobatch._doors import checked_search, known_plan, versions
from autobatch._plan import BatchPlan
from autobatch._probes import detect
from autobatch._report import Settings, TuningReport
from autobatch._snapshot import Snapshot
from autobatch._trial import OptimizerWatch
from autobatch._tune import Job, tune
from autobatch.errors import AutobatchError
from autobatch.lightning._apply import BeforeOptimizers, apply, check_name
from autobatch.lightning._checks import check
from autobatch.lightning._loaders import (
    Rebatched,
    batch_size_of,
    capture_order,
    is_empty,
    requested,
    samples_of,
)
from autobatch.lightning._samples import Samples
from autobatch.lightning._scratch import scratch
from autobatch.lightning._steps import Steps, package_of
from autobatch.lightning._windows import (
    WindowRepair,
    batches_trained,
    check_repairable,
    check_switch,
    told,
)

if TYPE_CHECKING:
    from autobatch._memory import MemoryProbe
    from autobatch._search import Search

__all__ = ["AutoBatch"]

_log = logging.getLogger("autobatch")


def _callback_class() -> type:
    """The Callback of the Lightning package in use; of each that is installed, where none is imported yet.

    `lightning.pytorch` and `pytorch_lightning` are two packages, and neither knows the other's class.
    """
    packages = ("lightning.pytorch", "pytorch_lightning")
    imported = [package for package in packages if package in sys.modules]
    found = []
    for package in imported or packages:
        try:
            found.append(importlib.import_module(package).Callback)
        except ModuleNotFoundError as error:
            if error.name not in (package, package.partition(".")[0]):
                raise
    if not found:
        raise ImportError(
            "AutoBatch needs Lightning, and neither package is installed: pip install "
            '"lightning-autobatch[lightning]", or "[pytorch-lightning]" for the other name.'
        )
    return type("Callback", tuple(found), {})


if TYPE_CHECKING:
    _Callback: type = object
else:
    _Callback = _callback_class()


class AutoBatch(_Callback):  # type: ignore[misc]  # a class made at run time
    """Finds the batch size that fits, reaches the effective batch by accumulation, and reports what it costs.

    Add it to a Trainer; nothing else changes. When `fit` starts it tries batch sizes on the real model, data and
    precision, gives everything back, and sets the batch size of the training loader and the accumulation. Training
    then is what it would have been with those two numbers written by hand.

    Args:
        target_batch_size: Samples per optimizer update, over all ranks; overrides an accumulation set in the
            Trainer. None: the largest micro-batch that fits, and the Trainer's accumulation stays.
        memory_limit: A float up to 1.0 is a share of the device, less what others hold. An int is bytes, and so is
            text such as "10GiB": what this process may hold, if others leave that much.
        max_micro_batch_size: The largest micro-batch to consider, in samples.
        plan: A known plan, or the report file that holds one: verified by one trial instead of a search.
        steps_per_trial: Optimizer steps per trial.
        time_limit: Seconds for the search; the best size verified by then is taken. None: no limit.
        search: Which size to try next; `GuidedBisection()` unless told otherwise.
        device: Where memory is read: a name such as "cuda:1", or a probe. None: where the model is.
        batch_arg_name: The attribute or hyperparameter of the module or datamodule that names the batch size, if any.
        repair_last_window: Whether the last update of an epoch, which may be of fewer samples than the others, gets
            the gradient of the mean loss over its samples; Lightning by itself makes it too small. For losses that
            are means over the batch.

    Raises:
        ValueError: An argument is not what it should be.
        AutobatchError: At `fit`, where the run is one that can not be tuned; nothing has been changed then.

    Example:
        >>> trainer = pl.Trainer(callbacks=[AutoBatch(target_batch_size=256)])  # doctest: +SKIP
        >>> trainer.fit(model, loader)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        target_batch_size: int | None = None,
        memory_limit: float | str = 0.9,
        max_micro_batch_size: int | None = None,
        plan: BatchPlan | str | Path | None = None,
        steps_per_trial: int = 3,
        time_limit: float | None = 300,
        search: Search | None = None,
        device: str | MemoryProbe | None = None,
        batch_arg_name: str = "batch_size",
        repair_last_window: bool = False,
    ) -> None:
        super().__init__()
        self.report: TuningReport | None = None
        self._settings = Settings.checked(
            target_batch_size=target_batch_size,
            memory_limit=memory_limit,
            max_micro_batch_size=max_micro_batch_size,
            steps_per_trial=steps_per_trial,
            time_limit=time_limit,
            dataset_size=None,
        )
        self._known = known_plan(plan, self._settings, world_size=1)
        self._search = checked_search(search)
        self._device = device
        self._batch_arg_name = batch_arg_name
        self._repairs = check_switch(repair_last_window)
        self._window: WindowRepair | None = None
        self._resumed: BatchPlan | None = None
        self._rebatched: Rebatched | None = None
        self._before = BeforeOptimizers()

    def tune(
        self,
        trainer: Any,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
    ) -> TuningReport:
        """Tune without training, and change nothing: the Trainer, the model and the loaders stay as they are.

        Args:
            trainer: A Trainer, with this callback or without.
            model: What it would train.
            train_dataloaders: As for `Trainer.fit`, and so are the next two.
            val_dataloaders: Not looked at yet.
            datamodule: Where the loaders come from, instead.

        Returns:
            The report, whose `plan` can be written by hand or given to `AutoBatch(plan=…)`.

        Raises:
            AutobatchError: The run is one that can not be tuned.
        """
        callbacks = trainer.callbacks
        only = _TuneOnly(self)
        trainer.callbacks = [only, *(each for each in callbacks if each is not self)]
        with Snapshot() as snapshot:
            # What fit does before it comes to the trials: the hooks that make loaders and optimizers
            snapshot.capture_light(model, datamodule)
            if isinstance(train_dataloaders, DataLoader):
                capture_order(train_dataloaders, snapshot)
            try:
                trainer.fit(model, train_dataloaders, val_dataloaders, datamodule)
            finally:
                trainer.callbacks = callbacks
        if only.report is None:
            raise AutobatchError(
                "Nothing was tuned: fit ended before it started to train."
            )
        return only.report

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Go first, so that callbacks which look at the loader or the optimizers see the tuned ones."""
        others = (callback for callback in trainer.callbacks if callback is not self)
        trainer.callbacks = [self, *others]
        if stage == "fit":
            self._before.watch(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Tune, and let the Trainer train with what was found."""
        if trainer.fast_dev_run or trainer.limit_train_batches == 0:
            _log.info("nothing will be trained: the batch size is left as it is")
            return
        check(trainer, pl_module, self._resumed)
        if is_empty(trainer.fit_loop._data_source.instance):
            _log.info("there is nothing to train on: the batch size is left as it is")
            return
        self._check_target_of_checkpoint()
        check_name(pl_module, self._batch_arg_name)
        report = self._tune(trainer, pl_module)
        self._resumed = None
        self._rebatched = apply(
            report.plan, trainer, pl_module, self._batch_arg_name, self._before
        )
        if self._repairs:
            self._window = WindowRepair(report.plan.micro_batch_size)
        self.report = report
        sinks.console(report)

    def state_dict(self) -> dict[str, int]:
        """The plan, in plain numbers: it travels in the checkpoint."""
        return {} if self.report is None else asdict(self.report.plan)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take the plan of a checkpoint: a resumed run goes on with it, after one trial that verifies it."""
        if state_dict:
            self._resumed = BatchPlan(**state_dict)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write the report beside the logs, now that the loggers have made their directory."""
        if self.report is None or not trainer.loggers or not trainer.log_dir:
            return
        try:
            sinks.json_file(Path(trainer.log_dir) / "autobatch.json")(self.report)
        except OSError as error:
            _log.warning("the report could not be written: %s", error)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Count from here, where the last window of an epoch is repaired."""
        if self._window is not None:
            self._window.start_epoch()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count its samples, where the last window of an epoch is repaired."""
        if self._window is not None:
            self._window.start_batch(trainer, batch, batch_idx)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Weight the gradients so far, where the last window of an epoch is repaired."""
        if self._window is not None:
            self._window.before_backward(trainer)

    def on_before_optimizer_step(
        self, trainer: Any, pl_module: Any, optimizer: Any
    ) -> None:
        """Weight all gradients, where the last window of an epoch is repaired."""
        if self._window is not None:
            self._window.before_step(trainer, optimizer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the user's loader its own size again."""
        self._undo()

    def on_exception(
        self, trainer: Any, pl_module: Any, exception: BaseException
    ) -> None:
        """Give the user's loader its own size again."""
        self._undo()

    def _tune(self, trainer: Any, module: Any) -> TuningReport:
        if self._repairs:
            check_repairable(trainer, module)
        probe = detect(self._device, module.device)
        with (
            Snapshot() as snapshot,
            OptimizerWatch(probe.clock) as optimizers,
            sinks.progress() as shown,
            scratch(trainer),
        ):
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            snapshot.capture(
                module, *trainer.optimizers, *schedulers, *([scaler] if scaler else [])
            )
            # Hooks that make the loader may change the module and the datamodule
            snapshot.capture_light(trainer.datamodule)
            loader = requested(trainer.fit_loop._data_source)
            optimizers.expected = True
            return tune(
                _job(
                    trainer,
                    module,
                    loader,
                    Samples(loader, snapshot),
                    repaired=self._repairs,
                ),
                self._settings.model_copy(update={"dataset_size": samples_of(loader)}),
                known=known_plan(self._resumed, self._settings, world_size=1)
                or self._known,
                probe=probe,
                search=self._search,
                snapshot=snapshot,
                optimizers=optimizers,
                first_touch=nullcontext,  # the module and its optimizers are known
                shown=shown,
            )

    def _check_target_of_checkpoint(self) -> None:
        target, plan = self._settings.target_batch_size, self._resumed
        if plan and target not in (None, plan.effective_batch_size):
            raise AutobatchError(
                f"The checkpoint was trained with {plan.effective_batch_size} samples per update, and "
                f"target_batch_size={target} asks for another number: a resumed run goes on with its plan."
            )

    def _undo(self) -> None:
        self._before.forget()
        self._window = None
        if self._rebatched is not None:
            self._rebatched.undo()
            self._rebatched = None


class _TuneOnly(_Callback):  # type: ignore[misc]  # a class made at run time
    """Leaves `fit` once the report is there, by the way that Lightning 2.6 keeps for its own tuner."""

    def __init__(self, tuner: AutoBatch) -> None:
        super().__init__()
        self.report: TuningReport | None = None
        self._tuner = tuner

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        check(trainer, pl_module, None)
        self.report = self._tuner.report = self._tuner._tune(trainer, pl_module)
        exceptions = importlib.import_module(
            f"{package_of(trainer)}.utilities.exceptions"
        )
        raise exceptions._TunerExitException


def _samples_trained(trainer: Any, loader: Any, plan: BatchPlan) -> int | None:
    """What an epoch leaves after `drop_last` and `limit_train_batches`, which counts batches."""
    samples = samples_of(loader)
    batches = batches_trained(trainer, loader, plan.micro_batch_size)
    if samples is None or batches is None:
        return samples
    return min(samples, batches * plan.micro_batch_size) or None


def _job(
    trainer: Any, module: Any, loader: Any, samples: Samples, *, repaired: bool
) -> Job:
    package = package_of(trainer)
    lightning = importlib.import_module(package.partition(".")[0])
    parts = (
        type(module).__name__,
        " + ".join(type(optimizer).__name__ for optimizer in trainer.optimizers),
        str(trainer.precision),
    )
    before = None
    if module.automatic_optimization:  # by hand, updates are the module's affair
        before = BatchPlan(batch_size_of(loader), trainer.accumulate_grad_batches)
    return Job(
        workload=Steps(trainer, samples),
        can_accumulate=True,
        start=batch_size_of(loader),
        world_size=1,
        accumulate=trainer.accumulate_grad_batches,
        samples_trained=partial(_samples_trained, trainer, loader),
        before=before,
        subject=" · ".join(parts),
        environment={**versions(), lightning.__name__: lightning.__version__},
        told=partial(told, trainer, loader, repaired=repaired),
    )
