"""Ctrl-C at one executed line of the library, and everything that may not be left behind.

`python interrupts.py fit|tune|find [every [first|last …]]` interrupts runs at executions of every
line, or of every `every`-th line, and prints what each of them left.
"""

from __future__ import annotations

import contextlib
import functools
import io
import linecache
import logging
import random
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer
from torch.utils import _python_dispatch as dispatch
from torch.utils.data import DataLoader

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import Model, data, pl, quiet_trainer
from sameness import same

PACKAGE = str(Path(autobatch.__file__).parent)


class Lines:
    """Traces the lines of the library, and sends this process SIGINT at one of them.

    Args:
        at: A file and a line, and which of its executions is interrupted; None to count them all.
    """

    def __init__(self, at=None, execution=1):
        self.executions = Counter()
        self.at = at
        self.execution = execution
        self.was_raised = False

    def __enter__(self):
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _on_call(self, frame, event, argument):
        is_ours = frame.f_code.co_filename.startswith(PACKAGE)
        is_traced = is_ours and (self.at is None or _has_line(frame.f_code, self.at))
        return self._on_line if is_traced else None

    def _on_line(self, frame, event, argument):
        if event != "line":
            return self._on_line
        line = (frame.f_code.co_filename, frame.f_lineno)
        if self.at is None or line == self.at:
            self.executions[line] += 1
        if line == self.at and self.executions[line] == self.execution:
            sys.settrace(None)
            self.was_raised = True
            signal.raise_signal(signal.SIGINT)
        return self._on_line


@functools.cache
def _has_line(code, line):
    file, number = line
    return code.co_filename == file and any(number == each for *_, each in code.co_lines())


def global_state():
    """Return everything of torch and Python that a run may have changed for good."""
    return {
        "optimizer hooks": [
            len(torch_optimizer._global_optimizer_pre_hooks),
            len(torch_optimizer._global_optimizer_post_hooks),
        ],
        "module hooks": [
            len(torch_module._global_forward_pre_hooks),
            len(torch_module._global_forward_hooks),
        ],
        "dispatch modes": len(dispatch._get_current_dispatch_mode_stack()),
        "modes": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        "streams": [id(sys.stdout), id(sys.stderr)],
        "signal": signal.getsignal(signal.SIGINT),
        "warnings": list(warnings.filters),
    }


def random_state():
    return [torch.get_rng_state(), random.getstate(), str(np.random.get_state())]


def model_state(model):
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "tensor hooks": [len(each._backward_hooks or ()) for each in model.parameters()],
        "training": [part.training for part in model.modules()],
        "forward": ["forward" in vars(part) for part in model.modules()],
    }


def hidden_methods(*owners):
    """Return the methods that an attribute of an object hides: replaced, and not given back."""
    return {
        type(owner).__name__: sorted(
            name for name in vars(owner) if callable(getattr(type(owner), name, None))
        )
        for owner in owners
    }


def trainer_state(trainer, loader):
    fit_loop, strategy = trainer.fit_loop, trainer.strategy
    sources = (fit_loop, fit_loop.epoch_loop.val_loop, trainer.validate_loop)
    fetchers = [each for each in (fit_loop._data_fetcher,) if each is not None]
    return {
        "callbacks": list(map(id, trainer.callbacks)),
        "loader": [loader.batch_size, loader.batch_sampler.batch_size],
        "methods": hidden_methods(
            trainer, fit_loop, fit_loop.epoch_loop, strategy, trainer.validate_loop, *fetchers
        ),
        "sources": hidden_methods(*(each._data_source for each in sources)),
        "loggers": [type(each).__name__ for each in trainer.loggers],
        "objects": [
            id(fit_loop.epoch_loop),
            id(trainer.profiler),
            id(trainer._logger_connector),
            id(trainer.validate_loop._results),
        ],
        "max_batches": fit_loop.max_batches == 2**31,
        "should_stop": trainer.should_stop,
    }


class Small(Model):
    """A module with few operators: a run is interrupted thousands of times."""

    def __init__(self, batch_size=4):
        super().__init__(batch_size)
        self.net = nn.Linear(16, 4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class InTrainer:
    """A Trainer, a module, a loader and an AutoBatch for one interrupted run."""

    def __init__(self):
        pl.seed_everything(1, verbose=False)
        self.device = SimulatedAccelerator("450KiB")
        self.model = Small()
        self.loader = DataLoader(data(24), batch_size=4, shuffle=True)
        validation = DataLoader(data(8), batch_size=4)
        self.loaders = (self.loader, validation)
        self.callback = autobatch.AutoBatch(
            target_batch_size=12,
            device=self.device,
            steps_per_trial=1,
            search=autobatch.Bisection(),
        )
        self.trainer = self.new_trainer()
        self.before = self.state()

    def new_trainer(self):
        return quiet_trainer(
            self.callback,
            max_epochs=1,
            limit_val_batches=1,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
        )

    def state(self):
        found = {**global_state(), **trainer_state(self.trainer, self.loader)}
        found["memory limit"] = self.device.ledger._limit
        found["watched"] = self.callback._only_tunes
        return found

    def run(self):
        self.trainer.fit(self.model, *self.loaders)

    def left(self):
        """Return the names of everything that is not as it was."""
        after = self.state()
        left = [name for name, value in self.before.items() if not same(value, after[name])]
        if self.trainer.accumulate_grad_batches not in self.accumulations():
            left.append("accumulation")
        if any(model_state(self.model)["tensor hooks"]) or any(model_state(self.model)["forward"]):
            left.append("hooks of the model")
        return left + self.left_for_the_next()

    def accumulations(self):
        """Return those the Trainer may have: its own, or that of the plan, as after training."""
        last = self.callback._results.last_fit
        return {1} if last is None else {1, last.report.plan.accumulate_grad_batches}

    def left_for_the_next(self):
        """Return problems of the next fit."""
        trainer = self.trainer if self.trainer.state.fn is None else self.new_trainer()
        return self.problems_of_fit(trainer)

    def problems_of_fit(self, trainer):
        self.model.sizes.clear()
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.fit(self.model, *self.loaders)
        size = self.callback.report.plan.micro_batch_size
        found = [] if set(self.model.sizes) == {size} else [f"the next fit: {self.model.sizes}"]
        if self.loader.batch_size != 4:
            found.append("loader after the next fit")
        return found


class Tuning(InTrainer):
    """The same, with an AutoBatch that `tune` adds; afterwards the Trainer fits by itself."""

    def __init__(self):
        super().__init__()
        self.trainer.callbacks.remove(self.callback)
        self.before = self.state()

    def state(self):
        return {
            **super().state(),
            **model_state(self.model),
            "random": random_state(),
            "attributes": [self.model.hparams.batch_size, self.model.sizes[:]],
        }

    def run(self):
        self.callback.tune(self.trainer, self.model, *self.loaders)

    def accumulations(self):
        return {1}

    def left_for_the_next(self):
        self.trainer.callbacks.append(self.callback)
        return self.problems_of_fit(self.trainer)


class Finding:
    """A plain loop for one interrupted `find`."""

    def __init__(self):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Linear(64, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.device = SimulatedAccelerator("450KiB")
        self.before = self.state()

    def state(self):
        return {
            **global_state(),
            **model_state(self.model),
            "random": random_state(),
            "optimizer": len(self.optimizer.state),
            "memory limit": self.device.ledger._limit,
        }

    def run(self):
        model, optimizer = self.model, self.optimizer

        def train(batch_size, accumulate):
            while True:
                for _ in range(accumulate):
                    model(torch.randn(batch_size, 16)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                yield batch_size

        autobatch.find(
            train,
            target_batch_size=12,
            device=self.device,
            dataset_size=24,
            steps_per_trial=1,
        )

    def left(self):
        after = self.state()
        return [name for name, value in self.before.items() if not same(value, after[name])]


RUNS = {"fit": InTrainer, "tune": Tuning, "find": Finding}


def executed(make):
    """Return the number of executions of each line in a run."""
    case = make()
    with Lines() as lines, contextlib.redirect_stdout(io.StringIO()):
        case.run()
    return dict(lines.executions)


def interrupted_at(make, line, execution):
    """Interrupt a run at an execution of a line, and return everything it left."""
    case = make()
    lines = Lines(line, execution)
    try:
        with lines, contextlib.redirect_stdout(io.StringIO()):
            case.run()
    except (KeyboardInterrupt, SystemExit) as error:  # Lightning ends the process after Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which Lightning ignores then
        # The traceback stays, as in a notebook: it keeps generators and their frames
        found = case.left()
        del error
        return found
    return [] if lines.was_raised else ["never reached"]


def sweep(make, every=1, executions=("first", "last")):
    """Interrupt runs at every line, and return what is left by line and execution."""
    left = {}
    for line, count in list(executed(make).items())[::every]:
        for which in sorted({1 if each == "first" else count for each in executions}):
            try:
                found = interrupted_at(make, line, which)
            except Exception as error:
                found = [f"{type(error).__name__}: {error}"[:100]]
            if found and found != ["never reached"]:
                left[line, which] = found
                print(*_described(line, which, found), sep="\n", flush=True)
    return left


def _described(line, which, found):
    file, number = line
    code = linecache.getline(file, number).strip()
    return f"{Path(file).name}:{number} #{which} {found}", f"      {code}"


if __name__ == "__main__":
    import autobatch._settings as settings

    settings.TIMING_SECONDS = 0.0
    logging.getLogger(pl.__name__).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kind = RUNS[sys.argv[1]]
    lines = executed(kind)
    print(len(lines), "lines", flush=True)
    found = sweep(kind, *map(int, sys.argv[2:3]), *sys.argv[3:4] and [sys.argv[3:]])
    print(len(found), "of", len(lines), "left something")
