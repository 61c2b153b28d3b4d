"""Runs that cannot be tuned, and bad arguments."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Sampler,
)

import autobatch
from lightning_here import Model, data, pl, plain, tuner
from lightning_here import quiet_trainer as trainer

check = importlib.import_module("autobatch.lightning._checks").check


class WithHook(Model):
    def train_dataloader(self):
        return DataLoader(data(), batch_size=self.hparams.batch_size)


class Pulls(Model):
    def training_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class Precomputed(Sampler):
    """Batches that are computed once."""

    def __init__(self, size):
        self.batch_size = size
        self.batches = [list(range(start, start + size)) for start in range(0, 600, size)]

    def __iter__(self):
        return iter(self.batches)


class Fixed(Sampler):
    """Batches of the right size, in a fixed number."""

    def __init__(self, size):
        self.batch_size, self.length = size, 600 // size

    def __iter__(self):
        return iter([list(range(self.batch_size))] * self.length)

    def __len__(self):
        return self.length


class Tokens(Sampler):
    """Batches with a budget of tokens, not of samples."""

    def __iter__(self):
        return iter([[0, 1, 2], [3]])


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: (Model(), [(torch.zeros(4, 16), torch.zeros(4))], {}),
            "it is a Tensor, not a DataLoader",
        ),
        (lambda: (Model(), {"a": range(3)}, {}), "it is a range, not a DataLoader"),
        (lambda: (Model(), DataLoader(data(), batch_size=None), {}), "batch_size=None"),
        (
            lambda: (Model(), DataLoader(data(), batch_sampler=Precomputed(4)), {}),
            "Precomputed, makes batches of 4 when its batch_size is 1",
        ),
        (
            lambda: (Model(), DataLoader(data(), batch_sampler=Tokens()), {}),
            "Tokens, has no batch_size",
        ),
        (
            lambda: (
                WithHook(),
                None,
                {"callbacks": [tuner(), pl.callbacks.BatchSizeFinder()]},
            ),
            "BatchSizeFinder",
        ),
        (
            lambda: (Model(), DataLoader(data(), batch_sampler=Fixed(4)), {}),
            "Fixed, has 150 batches at any batch_size",
        ),
        (
            lambda: (
                Model(),
                plain(),
                {
                    "callbacks": [
                        tuner(),
                        pl.callbacks.GradientAccumulationScheduler({0: 2}),
                    ]
                },
            ),
            "GradientAccumulationScheduler",
        ),
        (lambda: (Pulls(), plain(), {}), "training_step takes the iterator of the loader"),
    ],
    ids=[
        "list of batches",
        "iterable",
        "unbatched",
        "precomputed",
        "token budget",
        "finder",
        "fixed length",
        "scheduler",
        "iterator of the loop",
    ],
)
def test_unsupported_runs_are_refused_before_anything_changes(make, sentence):
    model, loader, options = make()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    callbacks = options.pop("callbacks", [tuner()])
    fitted = trainer(*callbacks, **options)
    random_state = torch.get_rng_state()

    with pytest.raises(autobatch.AutobatchError, match=sentence) as caught:
        fitted.fit(model, loader)

    assert "\n" not in str(caught.value)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert model.sizes == []
    assert fitted.accumulate_grad_batches == 1


def test_one_loader_for_training_and_validation_is_refused():
    loader = plain()

    with pytest.raises(autobatch.AutobatchError, match="one loader serves"):
        trainer(tuner()).fit(Model(), loader, loader)

    assert loader.batch_size == 4


def test_an_unknown_name_of_the_batch_size_is_refused():
    with pytest.raises(autobatch.AutobatchError, match="batch_arg_name='bacth'"):
        trainer(tuner(batch_arg_name="bacth")).fit(Model(), plain())


def test_resuming_with_another_target_is_refused(tmp_path):
    first = trainer(tuner(), max_epochs=1)
    first.fit(Model(), plain())
    first.save_checkpoint(tmp_path / "last.ckpt")

    with pytest.raises(autobatch.AutobatchError, match="target_batch_size=60 asks for another"):
        trainer(tuner(target_batch_size=60)).fit(Model(), plain(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("strategy", "problem"),
    [
        (
            pl.strategies.DeepSpeedStrategy,
            "where you can write train_micro_batch_size_per_gpu and gradient_accumulation_steps",
        ),
        (pl.strategies.ParallelStrategy, "is not one of the strategies whose steps it can try"),
    ],
)
def test_a_strategy_whose_steps_cannot_be_tried_is_refused(strategy, problem, monkeypatch):
    fitted = trainer()
    # To make one without its devices
    monkeypatch.setattr(strategy, "__abstractmethods__", frozenset(), raising=False)
    monkeypatch.setattr(pl.Trainer, "strategy", property(lambda _: object.__new__(strategy)))

    with pytest.raises(autobatch.AutobatchError, match=problem):
        check(fitted, Model(), None)


def test_a_loader_that_ignores_its_batch_size_is_refused():
    class Stubborn(DataLoader):
        @property
        def batch_sampler(self):
            return BatchSampler(self.sampler, 4, drop_last=False)

        @batch_sampler.setter
        def batch_sampler(self, _):
            pass

    loader = Stubborn(data(), batch_size=4)
    fitted = trainer(tuner())

    with pytest.raises(autobatch.AutobatchError, match="of 4 samples when batch_size is 9"):
        fitted.fit(Model(), loader)

    assert loader.batch_size == 4
    assert fitted.accumulate_grad_batches == 1


def test_a_run_without_training_batches_is_not_tuned():
    callback = tuner()

    trainer(callback, limit_train_batches=0).fit(Model(), plain())

    assert callback.report is None


def test_a_fast_dev_run_is_not_tuned():
    model, callback = Model(), tuner()

    trainer(callback, fast_dev_run=True).fit(model, plain())

    assert callback.report is None
    assert model.sizes == [4]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_batch_size": 0}, "target_batch_size=0"),
        ({"memory_limit": "much"}, "memory_limit='much'"),
        ({"steps_per_trial": True}, "steps_per_trial=True"),
        ({"plan": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_a_bad_argument_is_refused_at_once(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        autobatch.AutoBatch(**options)


def test_a_missing_lightning_names_the_packages_to_install():
    code = """
import sys
for name in ("lightning", "pytorch_lightning", "lightning_utilities", "lightning_fabric"):
    sys.modules[name] = None
import autobatch
try:
    autobatch.AutoBatch
except ImportError as error:
    assert "lightning-autobatch[lightning]" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
