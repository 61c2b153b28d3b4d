"""Tuning leaves no trace: the inventory is the same before and after it."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import signal
import threading
import warnings
from types import BuiltinFunctionType, FunctionType, MethodType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
)
from torch.utils.data import DataLoader

from trace_inventory import INVENTORY, METHODS, Recording, Run, changed, inventory

# Without a trace


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Create runs in an empty folder, and restore signal handlers afterwards."""
    monkeypatch.chdir(tmp_path)
    # Background processes of a shell ignore this signal
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda **options: Run(tmp_path, **options)
    signal.signal(signal.SIGINT, former)


def left(method, error=None):
    """Return the items that Lightning 2.6 changes by itself."""
    found = []
    if method != "fit":
        found.append("gradients")  # dropped before any loop is asked for its data
    if error is KeyboardInterrupt and method == "fit":
        found.append("signal handlers")  # the process is about to end: it ignores more
    return found


@pytest.mark.filterwarnings("ignore:You have overridden .* in `LightningModule` but")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source", ["passed", "datamodule"])
def test_tuning_that_runs_out_of_memory_leaves_no_trace(run, source, method, monkeypatch):
    # Lightning gives a loader a worker_init_fn after `seed_everything(workers=True)`
    monkeypatch.setenv("PL_SEED_WORKERS", str(int(source == "passed")))
    run = run(source=source)
    before = inventory(run)

    report = run.tune(method)

    assert changed(before, inventory(run)) == left(method)
    assert len(report.trials) > 3
    assert run.model.world.steps > 10
    if method == "fit":
        assert "out_of_memory" in [str(trial.outcome) for trial in report.trials]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_within_a_trial_leaves_no_trace(run, method, error):
    run = run(explode_at=error)
    before = inventory(run)

    # Lightning 2.6 ends the process after a keyboard interrupt
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        run.tune(method)

    assert changed(before, inventory(run)) == left(method, error)
    assert run.model.world.steps == 5


TRANSFER = [
    "on_before_batch_transfer",
    "on_after_batch_transfer",
]


def around(kind):
    names = ("model_eval", "start", "epoch_start")
    start, end = f"on_{kind}_batch_start", f"on_{kind}_batch_end"
    return [*(f"on_{kind}_{name}" for name in names), *TRANSFER, start, end]


IN_TRIALS = {
    "fit": [
        "configure_optimizers",
        *("on_fit_start", "on_train_start", "on_train_epoch_start"),
        *TRANSFER,
        "on_train_batch_start",
        *("on_before_zero_grad", "on_before_backward", "on_after_backward"),
        "on_train_batch_end",
        *("optimizer_step", "on_before_optimizer_step"),
    ],
    "validate": around("validation"),
    "test": around("test"),
    "predict": around("predict"),
}


@pytest.mark.parametrize("method", METHODS)
def test_trials_call_the_hooks_of_a_step_in_the_order_of_training(run, method):
    run = run()

    run.tune(method)

    before = ["configure_callbacks", "prepare_data", "setup"]
    fired = list(dict.fromkeys(run.hooks))
    assert fired == [*before, *IN_TRIALS[method], "teardown"]
    assert run.callback_hooks == ["setup", "teardown"]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_callbacks_hear_of_an_error_as_without_autobatch(run, error):
    run = run(explode_at=error)

    with pytest.raises((SystemExit, error)):
        run.tune()

    assert run.callback_hooks == ["setup", "on_exception"]


# The inventory can fail


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


class Calling(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


def mode(kind):
    entered = kind()
    entered.__enter__()
    return lambda: entered.__exit__(None, None, None)


def thread():
    done = threading.Event()
    started = threading.Thread(target=done.wait)
    started.start()
    return lambda: (done.set(), started.join())


def process():
    started = multiprocessing.get_context("spawn").Process(target=print)
    started.start()
    return started.join


def assign(owner, name, value):
    former = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, former)


def grown(items, item):
    items.append(item)
    return lambda: items.remove(item)


def call(act, undo):
    act()
    return undo


def hook(register):
    return register(lambda *_: None).remove


# Each changes one item, and returns a function that restores it if it belongs to the process
MUTATIONS = {
    "parameters": lambda run: run.model.head.weight.data.add_(1),
    "parameter objects": lambda run: setattr(
        run.model.head, "bias", nn.Parameter(run.model.head.bias.detach().clone())
    ),
    "gradients": lambda run: setattr(run.model.head.weight, "grad", None),
    "requires_grad": lambda run: run.model.head.bias.requires_grad_(False),
    "tensor hooks": lambda run: run.model.head.bias.register_hook(lambda g: g),
    "buffers": lambda run: run.model.rebound.add_(1),
    "buffer objects": lambda run: setattr(run.model, "seen", run.model.seen.clone()),
    "attributes": lambda run: run.model.body.history.append(1.0),
    "training flags": lambda run: run.model.body.net.eval(),
    "module hooks": lambda run: run.model.head.register_forward_hook(lambda *_: None),
    "metric": lambda run: run.model.metric.update(3.0),
    "global hooks": lambda run: hook(torch_module.register_module_forward_hook),
    "random state of torch": lambda run: torch.rand(()),
    "random state of numpy": lambda run: np.random.rand(),
    "random state of python": lambda run: random.random(),
    "loops": lambda run: run.trainer.fit_loop.epoch_progress.increment_ready(),
    "progress": lambda run: setattr(run.trainer, "should_stop", True),
    "restart flags": lambda run: setattr(run.trainer.fit_loop, "_restarting", True),
    "arguments": lambda run: setattr(run.trainer, "accumulate_grad_batches", 1),
    "callback_metrics": lambda run: run.trainer._logger_connector._callback_metrics.update(
        a=torch.ones(())
    ),
    "logged_metrics": lambda run: run.trainer._logger_connector._logged_metrics.update(
        a=torch.ones(())
    ),
    "callbacks": lambda run: run.trainer.callbacks.pop(),
    "attributes of callbacks": lambda run: setattr(run.watcher, "mine", 1),
    "loggers": lambda run: run.trainer.loggers.append(Recording()),
    "what was logged": lambda run: run.logger.log_metrics({}),
    "profiler": lambda run: run.profiler.start("something"),
    "hidden methods": lambda run: setattr(run.trainer.strategy, "barrier", lambda *_: None),
    "DataLoader.__init__": lambda run: assign(DataLoader, "__init__", lambda *_: None),
    "datamodule": lambda run: run.datamodule.random.random(),
    "loader": lambda run: object.__setattr__(run.loader, "batch_size", 5),
    "batch sampler": lambda run: setattr(run.loader.batch_sampler, "batch_size", 5),
    "sampler": lambda run: setattr(run.loader.sampler, "_num_samples", 5),
    "generator of the loader": lambda run: torch.rand((), generator=run.generator),
    "data": lambda run: run.loader.dataset.tensors[0].add_(1),
    "files": lambda run: (run.folder / "file").touch(),
    "warnings": lambda run: warnings.simplefilter("ignore"),
    "environment": lambda run: call(
        lambda: os.environ.update(MINE="1"), lambda: os.environ.pop("MINE")
    ),
    "signal handlers": lambda run: call(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), None),
    "threads": lambda run: thread(),
    "processes": lambda run: process(),
    "gradients enabled": lambda run: mode(torch.no_grad),
    "inference mode": lambda run: mode(torch.inference_mode),
    "default dtype": lambda run: call(
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_default_dtype(torch.float32),
    ),
    "autocast": lambda run: mode(lambda: torch.autocast("cpu", torch.bfloat16)),
    "dispatch modes": lambda run: mode(Dispatching),
    "function modes": lambda run: mode(Calling),
    "cudnn": lambda run: assign(
        torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark
    ),
    "garbage collector": lambda run: call(gc.disable, gc.enable),
    "log handlers": lambda run: grown(
        logging.getLogger("autobatch").handlers, logging.NullHandler()
    ),
    "working directory": lambda run: os.chdir("/"),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", INVENTORY)
def test_the_inventory_reports_each_change(run, name):
    run = run()
    before = inventory(run)

    undo = MUTATIONS[name](run)
    try:
        after = inventory(run)
    finally:
        if isinstance(undo, (BuiltinFunctionType, FunctionType, MethodType)):
            undo()

    assert name in changed(before, after)


def test_nothing_changes_by_itself(run):
    run = run()

    assert changed(inventory(run), inventory(run)) == []
