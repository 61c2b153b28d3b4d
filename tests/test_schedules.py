"""Notes about learning rates and schedules if the effective batch size changes."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

import autobatch
from autobatch.report import LearningRateRule
from autobatch.testing import SimulatedAccelerator
from lightning_here import pl, quiet_trainer


def slowly(step, num_warmup_steps, num_training_steps):
    return 1 / (1 + step)


class Scheduled(pl.LightningModule):
    def __init__(self, schedule, interval="step", frequency=1, optimizer="AdamW"):
        super().__init__()
        self.schedule, self.optimizer = schedule, optimizer
        self.config = {"interval": interval, "frequency": frequency}
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        optimizer = getattr(torch.optim, self.optimizer)(self.parameters(), lr=0.01)
        if self.schedule is None:
            return optimizer
        scheduler = self.schedule(optimizer, self)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, **self.config},
        }


class Named(Scheduled):
    batch_size = 4


def fit(module, batch_size=4, target=32, batch_arg_name="batch_size", plan=None, **options):
    callback = autobatch.AutoBatch(
        target_batch_size=target,
        max_micro_batch_size=16,
        device=SimulatedAccelerator("64MiB"),
        steps_per_trial=1,
        batch_arg_name=batch_arg_name,
        plan=plan,
    )
    loader = DataLoader(TensorDataset(torch.randn(128, 4)), batch_size)
    quiet_trainer(callback, **options).fit(module, loader)
    return callback.report


def counted(report):
    return [note for note in report.notes if "counts updates" in note]


SCHEDULES = {
    "CosineAnnealingLR": (lambda o, _: lr_scheduler.CosineAnnealingLR(o, 100), 100),
    "OneCycleLR": (lambda o, _: lr_scheduler.OneCycleLR(o, 0.1, total_steps=90), 90),
    "LinearLR": (lambda o, _: lr_scheduler.LinearLR(o, total_iters=10), 10),
    "PolynomialLR": (lambda o, _: lr_scheduler.PolynomialLR(o, 80), 80),
    "MultiStepLR": (lambda o, _: lr_scheduler.MultiStepLR(o, [30, 60]), 60),
    "SequentialLR": (
        lambda o, _: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, total_iters=20),
                lr_scheduler.CosineAnnealingLR(o, 80),
            ],
            milestones=[20],
        ),
        100,
    ),
    "LambdaLR": (
        lambda o, _: lr_scheduler.LambdaLR(
            o, partial(slowly, num_warmup_steps=5, num_training_steps=50)
        ),
        50,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
def test_the_length_of_a_schedule_is_noted_in_samples(name):
    schedule, updates = SCHEDULES[name]

    report = fit(Scheduled(schedule))

    assert counted(report) == [
        f"{name} counts updates: its {updates} steps now cover {updates * 32:,} samples instead of {updates * 4:,}."
    ]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o, _: lr_scheduler.StepLR(o, 7),
        lambda o, _: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    ],
)
def test_a_schedule_without_a_known_length_is_noted_without(schedule):
    (note,) = counted(fit(Scheduled(schedule)))

    assert "each of 32 samples now instead of 4" in note


def test_a_schedule_that_may_read_the_batch_size_is_noted_without_a_length():
    def read(optimizer, module):
        return lr_scheduler.CosineAnnealingLR(optimizer, 256 // module.batch_size)

    (note,) = counted(fit(Named(read)))

    assert "each of 32 samples now instead of 4" in note


def test_the_frequency_of_a_schedule_counts():
    schedule, _ = SCHEDULES["CosineAnnealingLR"]

    (note,) = counted(fit(Scheduled(schedule, frequency=3)))

    assert "its 300 steps now cover 9,600 samples instead of 1,200" in note


def test_a_schedule_by_estimated_steps_covers_the_same_data():
    made = []

    def asked(optimizer, module):
        made.append(module.trainer.estimated_stepping_batches)
        return lr_scheduler.CosineAnnealingLR(optimizer, made[-1])

    report = fit(Scheduled(asked))

    assert made == [64, 8]  # two epochs of 128 samples, in updates of 4 and of 32
    assert counted(report) == []


PLAN = autobatch.BatchPlan(micro_batch_size=16, accumulate_grad_batches=2)


class Counted(Scheduled):
    """Counts its optimizers, and reads something while it makes them."""

    made: ClassVar = []  # not in a module: its attributes are restored before it makes them again

    def __init__(self, read):
        super().__init__(None)
        self.read = read
        self.made.clear()
        self.batch_size = 4
        self.config = {"batch_size": 4}
        self.save_hyperparameters({"batch_size": 4, "rate": 0.1})

    def configure_optimizers(self):
        self.made.append(self.read(self))
        return super().configure_optimizers()


UNREAD = {
    "nothing": lambda m: None,
    "another hyperparameter": lambda m: (m.hparams.rate, m.hparams["rate"], m.hparams.get("rate")),
    "the names of hyperparameters": lambda m: (*m.hparams.keys(), "batch_size" in m.hparams),
    "another loader": lambda m: len(DataLoader(TensorDataset(torch.zeros(8, 4)), 2)),
    "the class": lambda m: type(m).__name__,
    "epochs": lambda m: m.trainer.max_epochs,
}


@pytest.mark.parametrize("name", UNREAD)
def test_optimizers_are_made_once_if_they_read_no_batch_size(name):
    fit(Counted(UNREAD[name]), plan=PLAN)

    assert len(Counted.made) == 1


READ = {
    "attribute": (lambda m: m.batch_size, 4, 16),
    "hyperparameter": (lambda m: m.hparams.batch_size, 4, 16),
    "entry": (lambda m: m.hparams["batch_size"], 4, 16),
    "get": (lambda m: m.hparams.get("batch_size"), 4, 16),
    "keywords": (lambda m: dict(**m.hparams)["batch_size"], 4, 16),
    "items": (lambda m: dict(m.hparams.items())["batch_size"], 4, 16),
    "accumulation": (lambda m: m.trainer.accumulate_grad_batches, 1, 2),
    "estimate": (lambda m: m.trainer.estimated_stepping_batches, 64, 8),
    "length of the loader": (lambda m: len(m.trainer.fit_loop._data_source.instance), 32, 8),
    "size of the loader": (lambda m: m.trainer.fit_loop._data_source.instance.batch_size, 4, 16),
    "batches": (
        lambda m: (m.trainer.fit_loop.setup_data(), m.trainer.num_training_batches)[1],
        32,
        8,
    ),
}


@pytest.mark.parametrize("name", READ)
def test_optimizers_are_made_again_if_they_read_the_batch_size(name):
    read, own, planned = READ[name]

    fit(Counted(read), plan=PLAN)

    assert Counted.made == [own, planned]


def test_optimizers_that_may_read_the_batch_size_unseen_are_made_again():
    fit(Counted(lambda m: m.config["batch_size"]), batch_arg_name="config.batch_size", plan=PLAN)

    assert Counted.made == [4, 16]


def test_no_class_keeps_what_notices_reads():
    kinds = (Counted, DataLoader, BatchSampler, pl.Trainer, type(Counted(None).hparams))
    before = [dict(vars(kind)) for kind in kinds]

    fit(Counted(lambda m: m.batch_size), plan=PLAN)

    assert [dict(vars(kind)) for kind in kinds] == before


def test_an_error_in_configure_optimizers_passes_and_leaves_the_classes():
    def fail(module):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        fit(Counted(fail), plan=PLAN)

    assert "batch_size" not in vars(Counted)
    assert "accumulate_grad_batches" not in vars(pl.Trainer)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (Scheduled(None), {}),
        (Scheduled(SCHEDULES["CosineAnnealingLR"][0], interval="epoch"), {}),
        (Scheduled(SCHEDULES["CosineAnnealingLR"][0]), {"batch_size": 32}),
        (
            Scheduled(SCHEDULES["CosineAnnealingLR"][0]),
            {"accumulate_grad_batches": 8},
        ),
    ],
)
def test_an_unchanged_effective_batch_size_needs_no_note(module, options):
    assert counted(fit(module, **options)) == []


# The learning rate


@pytest.mark.parametrize(
    ("optimizer", "rule", "told"),
    [
        ("AdamW", "square-root", "AdamW usually wants about ×2.8 "),
        ("SGD", "linear", "SGD usually wants about ×8 "),
    ],
)
def test_the_rule_of_the_optimizer_is_in_the_report(optimizer, rule, told):
    report = fit(Scheduled(None, optimizer=optimizer))

    assert report.learning_rate == LearningRateRule(optimizer, rule)
    assert told in report.notes[0]


def test_an_optimizer_without_a_rule_gets_none():
    report = fit(Scheduled(None, optimizer="Adadelta"))

    assert report.learning_rate is None
    assert "usually wants" not in report.notes[0]


def test_no_learning_rate_is_changed():
    module = Scheduled(None)

    fit(module)

    assert module.trainer.optimizers[0].param_groups[0]["lr"] == 0.01


def test_the_same_effective_batch_size_keeps_the_learning_rate():
    report = fit(Scheduled(None), batch_size=32)

    assert report.learning_rate == LearningRateRule("AdamW", "square-root")
    assert not any("usually wants" in note for note in report.notes)


class Wrapper:
    """Passes everything on to an optimizer, and is none of torch."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        if name == "optimizer":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def step(self, closure=None, **_):
        return self.optimizer.step(closure)


def accelerated(optimizer):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


@pytest.mark.parametrize(
    "wrap", [Wrapper, accelerated, lambda o: Wrapper(Wrapper(o))], ids=["one", "accelerate", "two"]
)
def test_a_wrapped_optimizer_has_its_name_and_rule(wrap):
    class Wrapped(Scheduled):
        def configure_optimizers(self):
            return wrap(super().configure_optimizers())

    report = fit(Wrapped(None), plan=PLAN)

    assert report.subject == "Wrapped · AdamW · 32-true"
    assert report.learning_rate == LearningRateRule("AdamW", "square-root")
    assert all(row.learning_rate_factor for row in report.effective)


def test_find_gives_a_wrapped_optimizer_its_rule():
    layer = torch.nn.Linear(4, 1)
    optimizer = accelerated(torch.optim.SGD(layer.parameters(), 0.1))

    def train(batch_size, accumulate):
        while True:
            for _ in range(accumulate):
                layer(torch.zeros(batch_size, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    report = autobatch.find(train, device="simulated:1MiB", plan=PLAN)

    assert report.device.total == 2**20
    assert report.learning_rate == LearningRateRule("SGD", "linear")
