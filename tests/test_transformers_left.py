"""Tuning leaves a Trainer as it was, whatever happens, and its report where it logs."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import autobatch
from autobatch.testing import SimulatedAccelerator
from hugging_face import (
    OWN,
    Compared,
    Recorded,
    Sequences,
    compared,
    padded,
    trainer_of,
    tuned,
)
from sameness import same

PLAN = autobatch.BatchPlan(12, 2)
LONG = Sequences()[69]


class Failing(TorchDispatchMode):
    """Lets memory run out in one of the operators."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.device.left -= 1
        if self.device.left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return function(*args, **(kwargs or {}))


class FailingDevice(SimulatedAccelerator):
    def __init__(self, at):
        super().__init__("64MiB")
        self.left = at

    @contextlib.contextmanager
    def limited(self, budget):
        with super().limited(budget) as watch, Failing(self):
            yield watch


def state_of(trainer):
    state = {**vars(trainer.args), **vars(trainer), **vars(trainer.accelerator.gradient_state)}
    return {name: value for name, value in state.items() if name != "accelerator"}


@pytest.mark.parametrize(
    ("options", "every"),
    [
        ({}, 200),
        ({"neftune_noise_alpha": 5.0}, 300),
        pytest.param({}, 7, marks=[pytest.mark.sweep, pytest.mark.timeout(900)]),
    ],
)
def test_memory_that_runs_out_anywhere_leaves_the_trainer_as_it_was(options, every, tmp_path):
    numbers = {"per_device_train_batch_size": OWN, **options}
    trainer = trainer_of(tmp_path / "tuned", **numbers)
    before, files = state_of(trainer), list(tmp_path.rglob("*"))
    weights = {name: each.clone() for name, each in trainer.model.state_dict().items()}
    random, failures, at = torch.get_rng_state(), 0, 1
    largest = {
        "plan": PLAN,
        "worst_case": lambda n: padded([LONG] * n),
        "steps_per_trial": 1,
        "apply": False,
    }

    while True:
        device = FailingDevice(at)
        with contextlib.suppress(autobatch.DoesNotFitError):
            tuned(trainer, device=device, **largest)
            failures -= 1
        if device.left > 0:  # it was over before that operator
            break
        failures, at = failures + 1, at + every
        assert same(trainer.model.state_dict(), weights)
        assert torch.equal(torch.get_rng_state(), random)

    assert failures > 2
    assert state_of(trainer) == before
    assert list(tmp_path.rglob("*")) == files
    assert not any(module._forward_hooks for module in trainer.model.modules())
    trainer.train()
    untouched = trainer_of(tmp_path / "by_hand", **numbers)
    untouched.train()
    Compared(trainer, untouched, tuned(untouched, plan=PLAN, apply=False)).check()


def test_errors_of_the_user_pass_with_a_note(tmp_path):
    class Fails(Recorded):
        def training_step(self, *_):
            raise ZeroDivisionError("mine")

    trainer = trainer_of(tmp_path, kind=Fails)
    before = state_of(trainer)

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        tuned(trainer)

    assert caught.value.__notes__ == ["autobatch was trying batch_size=8"]
    assert state_of(trainer) == before


class RunsOut(Recorded):
    """Has memory for 12 sequences of 24 tokens, and for more of shorter ones."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if inputs["input_ids"].numel() > 12 * 24:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().training_step(model, inputs, num_items_in_batch)


def test_the_effective_batch_is_kept_where_auto_find_batch_size_loses_it(tmp_path):
    numbers = {"per_device_train_batch_size": 24, "train_sampling_strategy": "sequential"}
    shrinks = trainer_of(tmp_path, kind=RunsOut, auto_find_batch_size=True, **numbers)
    shrinks.train()
    # The long sequence comes late: training started again with weights that were trained
    restarted = shrinks.shapes[0][0] > shrinks._train_batch_size
    effective = shrinks._train_batch_size * shrinks.args.gradient_accumulation_steps

    pair = compared(tmp_path, kind=RunsOut, tune={"max_micro_batch_size": None})

    assert (restarted, effective != 24) == (True, True)
    pair.check()
    assert pair.report.plan.micro_batch_size <= 12
    assert pair.report.plan.effective_batch_size == 24


def test_a_report_is_in_the_log_history_and_beside_checkpoints(tmp_path):
    trainer = trainer_of(tmp_path)
    report = tuned(trainer)
    assert list(tmp_path.iterdir()) == []

    trainer.train()

    plan = {
        "autobatch/batch_size": 12,
        "autobatch/accumulate_grad_batches": 2,
        "autobatch/effective_batch_size": 24,
    }
    assert trainer.state.log_history[0] == {**plan, "step": 0}
    assert autobatch.TuningReport.read(tmp_path / "autobatch.json").plan == report.plan == PLAN
    assert "12 × accumulate 2" in (tmp_path / "autobatch.md").read_text(encoding="utf-8")


def test_apply_false_only_reports(tmp_path):
    trainer = trainer_of(tmp_path)
    before = state_of(trainer)

    report = tuned(trainer, apply=False)

    assert report.plan == PLAN
    assert state_of(trainer) == before
    assert trainer.args.per_device_train_batch_size == 8


def test_tensorboard_shows_the_report(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = trainer_of(tmp_path, report_to="tensorboard", max_steps=1)
    tuned(trainer)

    trainer.train()

    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = accumulator.EventAccumulator(str(file.parent))
    events.Reload()
    tags = events.Tags()
    assert "autobatch/report/text_summary" in tags["tensors"]
    assert "train/autobatch/batch_size" in tags["scalars"]


def test_wandb_keeps_the_report_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer = trainer_of(tmp_path, report_to="wandb", max_steps=1)
    tuned(trainer)

    trainer.train()

    assert wandb.run.summary["autobatch/largest_fit"] == 12
    wandb.finish()
    wandb.teardown()  # or else its threads hold locks that forked ranks wait for
    assert len(list(tmp_path.rglob("files/autobatch.json"))) == 1


# Resuming


def trained_for_an_epoch(folder, **options):
    trainer = trainer_of(folder, num_train_epochs=1, **options)
    report = tuned(trainer) if "gradient_accumulation_steps" not in options else None
    trainer.train()
    return report


def test_a_resumed_run_goes_on_with_its_plan_after_one_trial(tmp_path):
    trained_for_an_epoch(tmp_path, save_strategy="epoch")
    resumed = trainer_of(tmp_path, num_train_epochs=2)

    report = tuned(resumed, resume_from_checkpoint=True, target_batch_size=None)
    resumed.train(resume_from_checkpoint=True)

    assert report.plan == PLAN
    assert len(report.trials) == 1
    assert "Resumed: one trial verified the checkpoint's plan." in report.notes
    by_hand = trainer_of(
        tmp_path,
        num_train_epochs=2,
        per_device_train_batch_size=12,
        gradient_accumulation_steps=2,
    )
    by_hand.train(resume_from_checkpoint=True)
    Compared(resumed, by_hand, report).check()


def test_within_an_epoch_only_the_plan_of_the_checkpoint_goes_on(tmp_path):
    trained_for_an_epoch(tmp_path / "planned", save_strategy="steps", save_steps=1, max_steps=1)
    resumed = trainer_of(tmp_path / "planned")

    report = tuned(resumed, resume_from_checkpoint=str(tmp_path / "planned/checkpoint-1"))

    assert "Resumed within an epoch: one trial verified the checkpoint's plan." in report.notes
    with pytest.raises(autobatch.AutobatchError, match="within an epoch, which can only be"):
        tuned(resumed, resume_from_checkpoint=True, device=SimulatedAccelerator("400KiB"))
    with pytest.raises(autobatch.AutobatchError, match="target_batch_size=48 asks for another"):
        tuned(resumed, resume_from_checkpoint=True, target_batch_size=48)


def test_resuming_within_an_epoch_without_a_plan_is_refused(tmp_path):
    numbers = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 2}
    trained_for_an_epoch(tmp_path, save_strategy="steps", save_steps=1, max_steps=1, **numbers)
    with pytest.raises(autobatch.AutobatchError, match="within an epoch, and holds no plan"):
        tuned(trainer_of(tmp_path), resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="resume_from_checkpoint='elsewhere' leads to no"):
        tuned(trainer_of(tmp_path), resume_from_checkpoint="elsewhere")
