"""Samples that really arrive at a step, and in an epoch."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lightning_here import Model, data, quiet_trainer, tuner


def four_of_each(samples):
    return [part.repeat_interleave(4, 0) for part in default_collate(samples)]


class Fours(DataLoader):
    def __iter__(self):
        return map(four_of_each, super().__iter__())


@pytest.mark.parametrize(
    "loader",
    [lambda: DataLoader(data(), 4, collate_fn=four_of_each), lambda: Fours(data(), 4)],
    ids=["collate function", "iteration"],
)
def test_rows_of_each_sample_are_noted_and_samples_are_those_of_the_loader(loader):
    if isinstance(given := loader(), Fours):
        given.collate_fn = list  # the class collates
    callback, model = tuner(target_batch_size=24), Model()

    quiet_trainer(callback, max_epochs=1).fit(model, given)

    micro = callback.report.plan.micro_batch_size
    assert set(model.sizes) == {4 * micro}
    assert len(model.sizes) == 600 // micro
    assert callback.report.look.read == 600
    assert any(
        f"becomes 4 rows of a batch. Sizes and samples here are those of the loader: a micro-batch "
        f"of {micro} has {4 * micro} rows." in note
        for note in callback.report.notes
    )


class Scenes(Dataset):
    """A few scenes, out of which many windows are cut."""

    def __init__(self):
        self.x = data(3).tensors[0]

    def __len__(self):
        return 3

    def __getitem__(self, where):
        scene, shift = where
        return self.x[scene].roll(shift), scene


class Windows(Sampler):
    def __init__(self, batch_size, length):
        self.batch_size, self.length = batch_size, length

    def __len__(self):
        return self.length // self.batch_size

    def __iter__(self):
        for _ in range(len(self)):
            yield [(0, 1)] * self.batch_size


class Unknown(Windows):
    def __len__(self):
        raise NotImplementedError

    def __iter__(self):
        for _ in range(self.length // self.batch_size):
            yield [(0, 1)] * self.batch_size


def test_samples_of_an_epoch_are_those_that_the_batch_sampler_draws():
    callback, model = tuner(), Model()

    quiet_trainer(callback, max_epochs=1).fit(
        model, DataLoader(Scenes(), batch_sampler=Windows(4, 600))
    )

    assert callback.report.plan.effective_batch_size == 120
    assert set(model.sizes) == {callback.report.plan.micro_batch_size}
    assert sum(model.sizes) == 600 // model.sizes[0] * model.sizes[0]


def test_batch_sampler_without_a_length_is_tuned():
    callback, model = tuner(target_batch_size=2, max_micro_batch_size=2), Model()

    quiet_trainer(callback, max_epochs=1).fit(
        model, DataLoader(Scenes(), batch_sampler=Unknown(4, 600))
    )

    assert set(model.sizes) == {callback.report.plan.micro_batch_size}
