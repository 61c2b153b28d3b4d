"""Resuming from a checkpoint, and fitting again with the same callback."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import Model, data, pl, tuner
from lightning_here import quiet_trainer as trainer
from sameness import same

pytestmark = pytest.mark.filterwarnings(
    # Lightning's advice about checkpoints within an epoch
    "ignore:You're resuming from a checkpoint that ended before the epoch ended"
)


def loader(size=4, length=600):
    return DataLoader(data(length), batch_size=size, shuffle=True)


def scheduled(size=4):
    """A model whose learning rate shows the number of epochs."""
    pl.seed_everything(1, verbose=False)
    model = Model(size)

    def configure_optimizers():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    model.configure_optimizers = configure_optimizers
    return model


def checkpoint(path, *callbacks, size=4, **options):
    """Return the path of a checkpoint written after an epoch."""
    begun = trainer(*callbacks, max_epochs=1, **options)
    begun.fit(scheduled(size), loader(size))
    begun.save_checkpoint(path / "last.ckpt")
    return path / "last.ckpt"


def checkpoint_within(path, *callbacks):
    """Return the path of a checkpoint written in the middle of an epoch."""

    class Save(pl.Callback):
        def on_train_batch_end(self, fitted, *_):
            if fitted.global_step == 3:
                fitted.save_checkpoint(path / "within.ckpt")

    trainer(*callbacks, Save(), max_epochs=1).fit(scheduled(), loader())
    return path / "within.ckpt"


def resumed(path, *callbacks, size=4, **options):
    """Resume a run, and return its final state."""
    fitted, model = trainer(*callbacks, **{"max_epochs": 3, **options}), scheduled(size)
    fitted.fit(model, loader(size), ckpt_path=path)
    return {
        "weights": dict(model.state_dict()),
        "optimizer": fitted.optimizers[0].state_dict(),
        "scheduler": fitted.lr_scheduler_configs[0].scheduler.state_dict(),
        "step": fitted.global_step,
        "epoch": fitted.current_epoch,
        "batches": len(model.sizes),
    }


def by_hand(plan):
    """Return the argument of the Trainer and the batch size of the loader for a plan."""
    return {
        "size": plan.micro_batch_size,
        "accumulate_grad_batches": plan.accumulate_grad_batches,
    }


SMALLER = "250KiB"
PLAN = autobatch.BatchPlan(60, 2)


def known():
    """Return a callback with a plan that needs one trial, and does not fit the smaller device."""
    return tuner(plan=PLAN)


def test_the_checkpoint_holds_the_device_in_plain_types(tmp_path):
    path = checkpoint(tmp_path, known())

    state = torch.load(path, weights_only=True)["callbacks"]["AutoBatch"]

    assert state["device"] == "simulated accelerator"
    assert state["device_bytes"] == 450 * 1024
    assert {type(value) for value in state.values()} == {int, str}


def test_another_device_is_tuned_again_for_the_same_effective_batch_size(tmp_path):
    first = known()
    again = tuner(target_batch_size=None, device=SimulatedAccelerator(SMALLER))
    path = checkpoint(tmp_path, first)

    tuned = resumed(path, again)

    before, plan = first.report.plan, again.report.plan
    assert plan.effective_batch_size == before.effective_batch_size == 120
    assert plan.micro_batch_size < before.micro_batch_size
    assert len(again.report.trials) > 1
    note = next(note for note in again.report.notes if note.startswith("Tuned again"))
    assert note.endswith(
        "60 × 2 on 1 × simulated accelerator of 450 KiB, and this one has 250 KiB."
    )
    plain = checkpoint(tmp_path, **by_hand(before))
    assert same(tuned, resumed(plain, **by_hand(plan)))
    assert (tuned["epoch"], tuned["step"]) == (3, 15)


def test_a_plan_that_no_longer_fits_is_replaced_between_epochs(tmp_path):
    crowded = SimulatedAccelerator("450KiB", foreign="200KiB")
    again = tuner(target_batch_size=None, device=crowded)

    resumed(checkpoint(tmp_path, known()), again)

    assert again.report.plan.effective_batch_size == 120
    assert len(again.report.trials) > 1
    assert "Searched again, since a micro-batch of 60 does not fit any more." in (
        again.report.notes
    )


def test_a_limit_below_the_plan_of_the_checkpoint_changes_the_plan(tmp_path):
    again = tuner(max_micro_batch_size=20)

    resumed(checkpoint(tmp_path, known()), again)

    assert again.report.plan.effective_batch_size == 120
    assert again.report.plan.micro_batch_size <= 20


def test_within_an_epoch_the_plan_stays_on_any_device_it_fits(tmp_path):
    first, again = known(), tuner(device=SimulatedAccelerator("2MiB"))

    resumed(checkpoint_within(tmp_path, first), again)

    assert again.report.plan == first.report.plan
    assert len(again.report.trials) == 1


def test_within_an_epoch_a_plan_that_does_not_fit_is_refused(tmp_path):
    path = checkpoint_within(tmp_path, known())
    callback, model, data_loader = (
        tuner(device=SimulatedAccelerator(SMALLER)),
        scheduled(),
        loader(),
    )

    with pytest.raises(autobatch.AutobatchError, match="written within an epoch") as caught:
        trainer(callback).fit(model, data_loader, ckpt_path=path)

    assert "\n" not in str(caught.value)
    assert model.sizes == []
    assert data_loader.batch_size == 4
    assert callback.report is None


def kept():
    return autobatch.AutoBatch(plan="keep", on_out_of_memory="split", verbose=False)


def test_within_an_epoch_a_plan_that_is_kept_has_to_be_that_of_the_checkpoint(tmp_path):
    path = checkpoint_within(tmp_path, known())

    with pytest.raises(
        autobatch.AutobatchError,
        match="finished with micro-batches of 60 × 2, and plan='keep' leaves "
        "micro-batches of 4 × 1",
    ) as caught:
        resumed(path, kept())

    assert "\n" not in str(caught.value)
    assert resumed(path, kept(), **by_hand(PLAN))["epoch"] == 3


def test_within_an_epoch_a_kept_plan_is_kept(tmp_path):
    path = checkpoint_within(tmp_path, kept())

    with pytest.raises(autobatch.AutobatchError, match=r"micro-batches of 4 × 1, and .* 8 × 1"):
        resumed(path, kept(), size=8)

    assert resumed(path, kept())["epoch"] == 3


def test_a_run_after_one_with_a_kept_plan_is_tuned_between_epochs(tmp_path):
    again = tuner()

    resumed(checkpoint(tmp_path, kept()), again)

    assert again.report.plan.effective_batch_size == 120


def test_between_epochs_a_plan_that_is_kept_may_be_another(tmp_path):
    assert resumed(checkpoint(tmp_path, known()), kept())["epoch"] == 3


def test_a_run_with_max_steps_resumes_its_epoch_with_its_plan(
    tmp_path,
):
    path = checkpoint(tmp_path, known())
    again = tuner(device=SimulatedAccelerator("2MiB"))

    resumed(path, again, max_steps=9, max_epochs=-1)

    assert len(again.report.trials) == 1


def changed(path, change):
    """Change the state of the callback in a checkpoint."""
    content = torch.load(path, weights_only=True)
    change(content["callbacks"])
    torch.save(content, path)
    return path


def two_ranks(callbacks):
    callbacks["AutoBatch"] |= {"micro_batch_size": 30, "world_size": 2}


def test_another_world_size_is_tuned_again_between_epochs(tmp_path):
    again = tuner(target_batch_size=None)
    path = changed(checkpoint(tmp_path, known()), two_ranks)
    asked = torch.load(path, weights_only=True)["callbacks"]["AutoBatch"]

    resumed(path, again)

    effective = 2 * 30 * asked["accumulate_grad_batches"]
    assert again.report.plan.effective_batch_size == effective
    assert again.report.plan.world_size == 1


def test_another_world_size_is_refused_within_an_epoch(tmp_path):
    path = changed(checkpoint_within(tmp_path, known()), two_ranks)

    with pytest.raises(autobatch.AutobatchError, match="trained on 2"):
        resumed(path, tuner(target_batch_size=None))


def test_a_checkpoint_without_a_device_is_verified_by_one_trial(tmp_path):
    def older(callbacks):
        plan = ("micro_batch_size", "accumulate_grad_batches", "world_size")
        state = callbacks["AutoBatch"]
        callbacks["AutoBatch"] = {name: state[name] for name in plan}

    again = tuner()

    resumed(changed(checkpoint(tmp_path, known()), older), again)

    assert again.report.plan.effective_batch_size == 120
    assert len(again.report.trials) == 1


def test_a_target_that_was_missed_is_accepted_again(tmp_path):
    first, again = tuner(target_batch_size=127), tuner(target_batch_size=127)
    path = checkpoint(tmp_path, first)

    resumed(path, again)

    assert first.report.plan.effective_batch_size != 127
    assert again.report.plan == first.report.plan


# A checkpoint of a run without AutoBatch


def test_a_run_without_a_plan_is_tuned_between_epochs(tmp_path):
    callback = tuner()
    path = checkpoint(tmp_path)

    tuned = resumed(path, callback)

    assert len(callback.report.trials) > 1
    assert same(tuned, resumed(path, **by_hand(callback.report.plan)))
    assert (tuned["epoch"], tuned["step"]) == (3, 160)


def test_a_known_plan_is_used_if_the_checkpoint_has_none(tmp_path):
    plan = autobatch.BatchPlan(20, 6)
    callback = tuner(plan=plan)

    resumed(checkpoint(tmp_path), callback)

    assert callback.report.plan == plan
    assert len(callback.report.trials) == 1


def test_between_epochs_another_plan_of_the_same_effective_batch_size_is_taken(tmp_path):
    plan = autobatch.BatchPlan(20, 6)
    callback = tuner(plan=plan)
    path = checkpoint(tmp_path, known())

    tuned = resumed(path, callback)

    assert callback.report.plan == plan
    assert len(callback.report.trials) == 1
    assert same(tuned, resumed(checkpoint(tmp_path, **by_hand(PLAN)), **by_hand(plan)))


def test_within_an_epoch_another_plan_waits_and_a_note_says_so(tmp_path):
    callback = tuner(plan=autobatch.BatchPlan(20, 6))

    resumed(checkpoint_within(tmp_path, known()), callback)

    assert callback.report.plan == PLAN
    assert any("can only begin with an epoch" in note for note in callback.report.notes)


def test_a_plan_of_another_effective_batch_size_than_the_checkpoint_is_refused(tmp_path):
    callback = tuner(target_batch_size=None, plan=autobatch.BatchPlan(8, 2))

    with pytest.raises(autobatch.AutobatchError, match=r"with 120 samples .* plan=.* has 16: a"):
        resumed(checkpoint(tmp_path, known()), callback)

    assert callback.report is None


def test_a_run_without_a_plan_is_refused_within_an_epoch(tmp_path):
    path = checkpoint_within(tmp_path)

    with pytest.raises(autobatch.AutobatchError, match="holds no plan of AutoBatch"):
        resumed(path, tuner())


def test_a_checkpoint_of_weights_only_is_refused(tmp_path):
    begun = trainer(tuner(), max_epochs=1)
    begun.fit(scheduled(), loader())
    begun.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    with pytest.raises(autobatch.AutobatchError, match="holds no state of callbacks"):
        resumed(tmp_path / "weights.ckpt", tuner())


# Fitting again


def test_a_second_fit_verifies_the_plan_of_the_first_by_one_trial():
    callback = tuner()
    trainer(callback).fit(Model(), loader())
    first = callback.report

    model, again = Model(), trainer(callback)
    again.fit(model, loader())

    assert len(callback.report.trials) == 1 < len(first.trials)
    assert callback.report.plan == first.plan
    assert set(model.sizes) == {first.plan.micro_batch_size}
    assert any("found before" in note for note in callback.report.notes)


def test_a_second_fit_searches_if_the_plan_no_longer_fits():
    device = SimulatedAccelerator("450KiB")
    callback = tuner(search=autobatch.Bisection(), timing_seconds=0, device=device)
    first = callback.tune(trainer(), Model(), loader()).plan

    device.foreign = "200KiB"
    trainer(callback).fit(Model(), loader())

    assert callback.report.plan.effective_batch_size == first.effective_batch_size == 120
    assert callback.report.plan.micro_batch_size < first.micro_batch_size
    assert len(callback.report.trials) > 2


class Other(Model):
    pass


def of_width(width):
    """Return a model of the same class with another hidden layer."""
    model = Model()
    model.net = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))
    return model


@pytest.mark.parametrize(
    ("model", "length", "options"),
    [
        (Other, 600, {}),
        (partial(of_width, 64), 600, {}),
        (Model, 400, {}),
        (Model, 600, {"precision": "bf16-mixed"}),
    ],
    ids=["class", "width", "data", "precision"],
)
def test_a_second_fit_of_another_module_or_data_searches(model, length, options):
    callback = tuner()
    trainer(callback).fit(Model(), loader())

    trainer(callback, **options).fit(model(), loader(length=length))

    assert len(callback.report.trials) > 1
    assert not any("found before" in note for note in callback.report.notes)


class FirstColumns(Model):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x[:, :16], y), batch_idx)


def test_samples_of_another_size_are_other_data():
    callback = tuner()
    trainer(callback, max_epochs=1).fit(FirstColumns(), loader())

    wide = TensorDataset(torch.randn(600, 64), torch.zeros(600, dtype=torch.long))
    again = trainer(callback, max_epochs=1)
    again.fit(FirstColumns(), DataLoader(wide, batch_size=4, shuffle=True))

    assert len(callback.report.trials) > 1


def test_a_second_fit_without_a_target_keeps_its_accumulation():
    # Well below the largest fit: the plan of the first fit would be verified
    callback = tuner(target_batch_size=None, max_micro_batch_size=50)
    trainer(callback, accumulate_grad_batches=3).fit(Model(), loader())

    trainer(callback, accumulate_grad_batches=2).fit(Model(), loader())

    assert callback.report.plan == autobatch.BatchPlan(50, 2)
    assert len(callback.report.trials) > 1


def test_fit_after_tune_needs_one_trial():
    callback = tuner()
    found = callback.tune(trainer(), Model(), loader())

    trainer(callback).fit(Model(), loader())

    assert callback.report.plan == found.plan
    assert len(callback.report.trials) == 1


def test_tune_searches_every_time():
    callback = tuner()
    callback.tune(trainer(), Model(), loader())

    again = callback.tune(trainer(), Model(), loader())

    assert len(again.trials) > 1
