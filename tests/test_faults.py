"""Faults of the user's own code and files end in their own error or in one sentence."""

from __future__ import annotations

import math

import pytest
from torch.utils.data import DataLoader, Dataset

from autobatch._memory.oom import is_oom
from autobatch.errors import AutobatchError
from lightning_here import Model, data, pl, plain, quiet_trainer, tuner


class FailsInSetup(Model):
    def setup(self, stage):
        raise ZeroDivisionError("mine")


class FailsInConfigureModel(Model):
    def configure_model(self):
        raise ZeroDivisionError("mine")


class FailsInOptimizers(Model):
    def configure_optimizers(self):
        raise ZeroDivisionError("mine")


class SetupOfACallback(pl.Callback):
    def setup(self, *_, **__):
        raise ZeroDivisionError("mine")


@pytest.mark.parametrize("others", [[], [SetupOfACallback()]], ids=["module", "callback"])
@pytest.mark.parametrize("kind", [FailsInSetup, FailsInConfigureModel, FailsInOptimizers, Model])
def test_an_error_before_training_leaves_the_strategy_alone(kind, others):
    if kind is Model and not others:
        pytest.skip("nothing fails")
    trainer = quiet_trainer(tuner(), *others)

    with pytest.raises(ZeroDivisionError, match="mine"):
        trainer.fit(kind(), plain())

    assert "setup_optimizers" not in vars(trainer.strategy)


class OutOfHostMemory(Dataset):
    def __len__(self):
        return 600

    def __getitem__(self, index):
        raise MemoryError("no room for a sample")


def test_out_of_memory_in_a_worker_is_no_matter_of_the_batch_size():
    loader = DataLoader(OutOfHostMemory(), batch_size=4, num_workers=1)

    with pytest.raises(MemoryError) as caught:
        next(iter(loader))

    assert not is_oom(caught.value)
    assert is_oom(MemoryError("of this process"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("micro_batch_size", math.nan),
        ("micro_batch_size", True),
        ("accumulate_grad_batches", 0),
        ("world_size", 10**12),
        ("world_size", None),
    ],
)
def test_a_broken_plan_in_a_checkpoint_is_refused_in_one_sentence(tmp_path, name, value):
    callback = tuner()
    trainer = quiet_trainer(callback, max_epochs=1)
    trainer.fit(Model(), DataLoader(data(), batch_size=4))
    whole = callback.state_dict()
    callback.state_dict = lambda: whole | {name: value}
    trainer.save_checkpoint(tmp_path / "broken.ckpt")

    with pytest.raises(AutobatchError, match=f"{name}=.* is no count. Resume from") as caught:
        quiet_trainer(tuner(), max_epochs=2).fit(
            Model(), DataLoader(data(), batch_size=4), ckpt_path=tmp_path / "broken.ckpt"
        )

    assert "\n" not in str(caught.value)
