from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import Model, data, pl, quiet_trainer, tuner
from sameness import same

strategies = importlib.import_module(f"{pl.__name__}.strategies")


def loader(length=600, **options):
    return DataLoader(data(length), batch_size=4, **options)


class ByHand(Model):
    """Two optimizers, of which the second steps after several micro-batches, and a frozen part."""

    def __init__(self, every=1):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(16, 16)
        self.fixed = nn.Linear(16, 16).requires_grad_(False)
        self.every = every
        self.seen = lambda *_: None

    def training_step(self, batch, batch_idx):
        net, other = self.optimizers()
        self.sizes.append(len(batch[0]))
        for optimizer in (net, other)[: 2 if (batch_idx + 1) % self.every == 0 else 1]:
            self.toggle_optimizer(optimizer)
            x = self.other(self.fixed(batch[0]))
            self.seen(optimizer, len(x))
            self.manual_backward(F.cross_entropy(self.net(x), batch[1]))
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [
            torch.optim.AdamW(self.net.parameters()),
            torch.optim.SGD(
                [*self.other.parameters(), *self.fixed.parameters()], 0.1, momentum=0.9
            ),
        ]


def trainer(*callbacks, **options):
    return quiet_trainer(*callbacks, **{"max_epochs": 1, **options})


def trainable(model):
    return {name: each.requires_grad for name, each in model.named_parameters()}


# Manual optimization


def test_manual_optimization_trains_at_the_tuned_batch_size():
    callback, model = tuner(), ByHand()
    fitted, accumulations = trainer(callback), set()
    model.seen = lambda *_: accumulations.add(fitted.accumulate_grad_batches)

    fitted.fit(model, loader(drop_last=True))

    plan = callback.report.plan
    assert plan.effective_batch_size == 120
    assert plan.accumulate_grad_batches > 1
    assert set(model.sizes) == {plan.micro_batch_size}
    assert accumulations == {1}, "the Trainer's own is left alone, in trials too"
    assert callback.report.subject == "ByHand · AdamW + SGD · 32-true"


def test_the_accumulation_left_to_manual_optimization_is_noted():
    callback = tuner(target_batch_size=None, plan=autobatch.BatchPlan(30, 4))

    trainer(callback).fit(ByHand(), loader())

    (note,) = callback.report.notes
    assert note == (
        "This module uses manual optimization: to reach 120 samples per update its training_step has to step every 4 "
        "micro-batches. Trials ran it as it steps now."
    )


def test_manual_optimization_without_accumulation_needs_no_note():
    callback = tuner(target_batch_size=None, plan=autobatch.BatchPlan(30))

    trainer(callback).fit(ByHand(), loader())

    assert callback.report.notes == ()


@pytest.mark.parametrize("every", [1, 7])
def test_a_trial_lasts_until_every_optimizer_has_stepped(every):
    stepped, model = set(), ByHand(every)
    model.seen = lambda optimizer, size: stepped.add((type(optimizer).__name__, size))
    # At larger sizes an epoch has fewer than seven batches, and the second one never steps
    search = autobatch.Bisection(resolution=0.25)
    callback = tuner(steps_per_trial=1, search=search, max_micro_batch_size=80)

    callback.tune(trainer(), model, loader())

    ran = {trial.batch_size for trial in callback.report.trials if trial.fits}
    assert ran
    for name in ("LightningAdamW", "LightningSGD"):
        assert {(name, size) for size in ran} <= stepped


def test_a_module_that_never_steps_ends_its_trial():
    class Idle(ByHand):
        def training_step(self, batch, batch_idx):
            self.net(batch[0]).mean().backward()

    report = tuner(plan=autobatch.BatchPlan(60, 2)).tune(trainer(), Idle(), loader())

    assert report.plan.micro_batch_size == 60
    assert report.notes[0].startswith("Trials computed gradients, but no torch.optim")


def fails(model, error):
    """Make steps fail while other parameters are frozen: of large micro-batches, or of any size.

    An error of the user's at large sizes alone is a size that their code refuses.
    """
    smallest = 16 if isinstance(error, torch.OutOfMemoryError) else 0
    count = itertools.count()

    def seen(_, size):
        if size > smallest and next(count) < 3:
            raise error

    model.seen = seen
    return model


def test_out_of_memory_between_toggle_and_untoggle_freezes_nothing():
    model, callback = fails(ByHand(), torch.OutOfMemoryError("mine")), tuner()
    before, seen = trainable(model), []
    model.on_train_start = lambda: seen.append(trainable(model))

    trainer(callback).fit(model, loader())

    outcomes = {trial.outcome for trial in callback.report.trials}
    assert autobatch.Outcome.OUT_OF_MEMORY in outcomes
    assert all(each == before for each in seen)  # in each trial and in training
    assert trainable(model) == before
    assert {*before.values()} == {True, False}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("mine"), ZeroDivisionError()])
def test_a_failed_step_leaves_no_hooks_in_the_optimizers(error):
    model, fitted = fails(ByHand(), error), trainer()
    before = trainable(model)

    if isinstance(error, ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            tuner().tune(fitted, model, loader())
    else:
        tuner().tune(fitted, model, loader())

    hooks = [
        hook.__name__
        for optimizer in fitted.strategy._lightning_optimizers
        for hook in (optimizer._on_before_step, optimizer._on_after_step)
    ]
    assert hooks == ["do_nothing_closure"] * 4
    assert trainable(model) == before


def test_training_runs_after_manual_optimization_was_out_of_memory():
    def weights(*, tuned):
        pl.seed_everything(1, verbose=False)
        model, fitted = ByHand(), trainer()
        if tuned:
            fails(model, torch.OutOfMemoryError("mine"))
            tuner().tune(fitted, model, loader())
            model.seen = lambda *_: None
        fitted.fit(model, loader())
        return [value.tolist() for value in model.parameters()]

    assert weights(tuned=True) == weights(tuned=False)


# Schedules


@pytest.mark.parametrize(
    ("target", "options", "limits"),
    [
        (120, {}, {}),
        (24, {}, {}),
        (120, {"drop_last": True}, {"max_epochs": 3}),
        (120, {}, {"limit_train_batches": 0.5}),
        (120, {}, {"limit_train_batches": 7, "max_epochs": 2}),
    ],
)
def test_a_schedule_has_as_many_steps_as_training(target, options, limits):
    lengths = []

    class Scheduled(Model):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters())
            lengths.append(int(self.trainer.estimated_stepping_batches))
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=lengths[-1])
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    fitted = trainer(tuner(target_batch_size=target), **limits)

    fitted.fit(Scheduled(), loader(**options))

    assert lengths[0] > lengths[1] == fitted.global_step
    assert fitted.lr_scheduler_configs[0].scheduler.last_epoch == fitted.global_step


class StepsItself(Model):
    """Manual optimization with a OneCycleLR of as many steps as training has."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.rates = []

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
        return [optimizer], [scheduler]

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.sizes.append(len(x))
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(x), y))
        optimizer.step()
        scheduler.step()
        self.rates.append(scheduler.get_last_lr())


def test_training_with_a_schedule_that_ends_with_it_equals_training_by_hand():
    def trained(batch_size, *callbacks):
        pl.seed_everything(1, verbose=False)
        model = StepsItself()
        trainer = quiet_trainer(*callbacks, max_steps=5, max_epochs=-1)
        trainer.fit(model, DataLoader(data(), batch_size, shuffle=True))
        return model, trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler

    callback = tuner(target_batch_size=None)
    model, optimizer, scheduler = trained(4, callback)
    size = callback.report.plan.micro_batch_size
    by_hand, by_hand_optimizer, by_hand_scheduler = trained(size)

    assert model.sizes == [size] * 5
    assert model.rates == by_hand.rates
    assert same(model.state_dict(), by_hand.state_dict())
    assert same(optimizer.state_dict(), by_hand_optimizer.state_dict())
    assert type(scheduler) is torch.optim.lr_scheduler.OneCycleLR
    assert scheduler.last_epoch == by_hand_scheduler.last_epoch == 5


# Other optimizers


class Quasi(Model):
    def __init__(self):
        super().__init__()
        self.double()
        self.evaluated = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x.double()), y)

    def on_before_optimizer_step(self, optimizer):
        self.evaluated.append(self.net[2].weight.grad.clone())

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 1e-12, max_iter=2)


def test_the_note_about_lbfgs_with_accumulation_is_true():
    """LBFGS adds the gradients of each evaluation of the last micro-batch."""
    model = Quasi()
    callback = tuner(
        target_batch_size=None,
        plan=autobatch.BatchPlan(30, 2),
        device=SimulatedAccelerator("64MiB"),
    )

    trainer(callback, limit_train_batches=2).fit(model, loader())

    def gradient(batch):
        model.zero_grad()
        model.training_step(batch, 0).backward()
        return model.net[2].weight.grad

    x, y = loader().dataset[:60]
    one, other = (gradient((x[part], y[part])) for part in (slice(30), slice(30, 60)))
    once, twice = model.evaluated
    torch.testing.assert_close(once, (one + other) / 2)
    torch.testing.assert_close(twice, (one + 2 * other) / 2)
    assert callback.report.notes[1] == (
        "LBFGS evaluates the last micro-batch of an update several times, and Lightning adds up the gradients of all "
        "evaluations: give a target_batch_size that fits at once."
    )


def test_an_optimizer_around_another_is_timed_once():
    class Looks(torch.optim.SGD):
        """An optimizer that evaluates its closure once before its step."""

        def step(self, closure):
            closure()
            return super().step(closure)

    class Looking(Model):
        def configure_optimizers(self):
            torch.optim.SGD(self.parameters(), 0.1)  # its class is hooked as well
            return Looks(self.parameters(), 0.1)

    callback = tuner()

    trainer(callback).fit(Looking(), loader())

    for trial in callback.report.trials:
        if trial.fits:
            assert 0 <= trial.optimizer_seconds < trial.step_seconds * trial.accumulate


def test_a_compiled_module_trains_compiled_after_tuning():
    ran, training = [], []

    def backend(graph, _):
        def run(*arguments):
            ran.append(bool(training))
            return graph(*arguments)

        return run

    class Compiled(Model):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def on_train_start(self):
            training.append(True)

    callback = tuner()

    trainer(callback).fit(torch.compile(Compiled(), backend=backend), loader())

    assert callback.report.plan.effective_batch_size == 120
    assert ran.count(True) >= 600 // callback.report.plan.micro_batch_size


# Refusals


class Accumulates(strategies.SingleDeviceStrategy):
    """A strategy that sets the accumulation, as DeepSpeed does."""

    handles_gradient_accumulation = True


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"callbacks": [pl.callbacks.GradientAccumulationScheduler({0: 2})]},
            (
                "a GradientAccumulationScheduler sets the accumulation (without it, target_batch_size names the batch "
                "that the plan accumulates to)"
            ),
        ),
        (
            {"strategy": Accumulates(device="cpu")},
            (
                "its strategy, Accumulates, sets the accumulation itself, and a plan cannot change it "
                "(with another strategy the plan sets the accumulation)"
            ),
        ),
    ],
    ids=["scheduler", "strategy"],
)
def test_other_settings_of_the_accumulation_are_refused_with_a_remedy(options, problem):
    callbacks, model = [tuner(), *options.pop("callbacks", ())], Model()
    random_state = torch.get_rng_state()

    with pytest.raises(autobatch.AutobatchError) as caught:
        trainer(*callbacks, **options).fit(model, loader())

    assert str(caught.value) == (
        f"AutoBatch does not tune this run yet: {problem}; train it without AutoBatch."
    )
    assert model.sizes == []
    assert torch.equal(random_state, torch.get_rng_state())


def test_retuning_leaves_accumulation_to_manual_optimization():
    class StepsAlone(Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.width = 0

        def on_train_epoch_start(self):
            self.width = 4096 * self.current_epoch  # so that less fits from then on

        def training_step(self, batch, batch_idx):
            x, y = batch
            room = torch.empty(len(x), self.width)
            loss = F.cross_entropy(self.net(x), y) + 0 * room.shape[0]
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    callback = tuner(retune_at_epochs=[1])
    fitted = trainer(callback, max_epochs=2)

    fitted.fit(StepsAlone(), loader())

    assert callback.report.plan.accumulate_grad_batches > 1
    assert fitted.accumulate_grad_batches == 1
