"""Loaders with batches of another unit than samples, and the user's `set_batch_size`."""

from __future__ import annotations

import copy
import importlib
import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

import autobatch
from lightning_here import Model, data, pl, tuner
from lightning_here import quiet_trainer as trainer
from sameness import same

batch_size = importlib.import_module("autobatch._loaders.batch_size")

LENGTHS = [1 + index % 7 for index in range(600)]  # tokens of each sample
MEAN = 4  # tokens


class Budget(Sampler):
    """Batches of samples in random order, within a budget of tokens."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.random = np.random.default_rng(3)

    def __iter__(self):
        batch, held = [], 0
        for index in self.random.permutation(len(LENGTHS)).tolist():
            if held + LENGTHS[index] > self.tokens:
                yield batch
                batch, held = [], 0
            batch.append(index)
            held += LENGTHS[index]
        yield batch


class Indexed(Dataset):
    def __init__(self):
        self.data = data()

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x, y, index


class Tokens(Model):
    """Records the samples and tokens of each training batch."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        self.batches.append(index.tolist())
        return super().training_step((x, y), batch_idx)

    @property
    def tokens(self):
        return [sum(LENGTHS[index] for index in batch) for batch in self.batches]


def budget(loader, batch_size):
    loader.batch_sampler.tokens = MEAN * batch_size


def by_budget(tokens=16, **options):
    return DataLoader(Indexed(), batch_sampler=Budget(tokens), **options)


def tokens_tuned(**options):
    return tuner(set_batch_size=budget, **options)


def test_training_uses_the_budget_that_was_set():
    model, loader, callback = Tokens(), by_budget(), tokens_tuned()
    sizes = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, *_):
            sizes.append(loader.batch_sampler.tokens)

    trainer(callback, Watch()).fit(model, loader)

    plan = callback.report.plan
    assert plan.effective_batch_size == 120
    assert sizes == [MEAN * plan.micro_batch_size] * 2
    assert max(model.tokens) <= MEAN * plan.micro_batch_size
    assert sorted(model.tokens)[len(model.tokens) // 2] > MEAN * (plan.micro_batch_size - 3)


def test_loader_has_its_own_budget_after_fit():
    loader = by_budget()

    trainer(tokens_tuned()).fit(Tokens(), loader)

    assert loader.batch_sampler.tokens == 16


def test_loader_has_its_own_budget_after_an_error():
    class Explode(pl.Callback):
        def on_train_batch_end(self, *_):
            raise ZeroDivisionError("mine")

    loader = by_budget()

    with pytest.raises(ZeroDivisionError, match="mine"):
        trainer(tokens_tuned(), Explode()).fit(Tokens(), loader)

    assert loader.batch_sampler.tokens == 16


def test_training_is_bit_identical_to_a_budget_written_by_hand():
    """A second fit is, too: it continues the order of the data."""

    def trained(tokens, *callbacks, **options):
        pl.seed_everything(1, verbose=False)
        model, loader = Tokens(), by_budget(tokens)
        for _ in range(2):
            trainer(*callbacks, **options).fit(model, loader)
        return model.batches, dict(model.state_dict())

    callback = tokens_tuned()
    tuned = trained(16, callback)
    plan = callback.report.plan

    by_hand = trained(
        MEAN * plan.micro_batch_size,
        accumulate_grad_batches=plan.accumulate_grad_batches,
    )

    assert same(tuned, by_hand)


def test_search_starts_at_the_size_of_the_first_batch():
    loader = by_budget(40)
    random_numbers = loader.batch_sampler.random.bit_generator.state
    first = len(next(iter(by_budget(40).batch_sampler)))

    report = tokens_tuned().tune(trainer(), Tokens(), loader)

    assert report.trials[0].batch_size == first
    assert loader.batch_sampler.random.bit_generator.state == random_numbers
    assert loader.batch_sampler.tokens == 40


def test_trials_run_batches_of_the_loader_at_the_size_in_the_report():
    class Watched(Tokens):
        tokens_seen: list[int] = []  # noqa: RUF012 -- trials do not restore it

        def training_step(self, batch, batch_idx):
            self.tokens_seen.append(sum(LENGTHS[index] for index in batch[2]))
            return super().training_step(batch, batch_idx)

    # Without a target: for a plan that accumulates, another step tests a batch and its halves. Only
    # sizes far apart, of which no last batch of an epoch is the largest
    search = autobatch.Bisection(resolution=0.3)
    tuning = tokens_tuned(target_batch_size=None, prefer="largest", search=search)
    report = tuning.tune(trainer(), Watched(), by_budget())

    limits = {MEAN * trial.batch_size for trial in report.trials}
    for tokens in set(Watched.tokens_seen):
        # A batch ends before the sample of at most 7 tokens that goes over its limit
        assert any(limit - 7 < tokens <= limit for limit in limits)
    for limit in limits:
        assert any(limit - 7 < tokens <= limit for tokens in Watched.tokens_seen)


@pytest.mark.parametrize("is_kept", [False, True])
def test_loader_of_a_hook_is_set_each_epoch(is_kept):
    kept = by_budget()

    class Hooked(Tokens):
        def train_dataloader(self):
            kept.batch_sampler.tokens = 16
            return kept if is_kept else by_budget()

    model, callback = Hooked(), tokens_tuned()

    trainer(callback, reload_dataloaders_every_n_epochs=1).fit(model)

    most = MEAN * callback.report.plan.micro_batch_size
    half = len(model.tokens) // 2
    assert most > 16
    assert most - 7 < max(model.tokens[:half]) <= most
    assert most - 7 < max(model.tokens[half:]) <= most


def test_setter_changes_a_plain_loader():
    def resize(loader, batch_size):
        loader.batch_sampler.batch_size = batch_size

    loader, model, callback = (
        DataLoader(data(), batch_size=4),
        Model(),
        tuner(set_batch_size=resize),
    )

    trainer(callback).fit(model, loader)

    assert set(model.sizes) == {callback.report.plan.micro_batch_size}
    assert loader.batch_sampler.batch_size == 4


def test_setter_may_replace_the_sampler():
    def another(loader, batch_size):
        object.__setattr__(loader, "batch_sampler", Budget(MEAN * batch_size))

    loader, callback = by_budget(), tuner(set_batch_size=another)
    own = loader.batch_sampler

    trainer(callback).fit(Tokens(), loader)

    assert callback.report.plan.effective_batch_size == 120
    assert loader.batch_sampler is own


def test_copied_change_restores_the_copied_loader():
    def with_a_new_attribute(loader, batch_size):
        budget(loader, batch_size)
        loader.batch_sampler.limit = 1

    loader = by_budget()

    change = batch_size.batch_size_change(loader, 8, with_a_new_attribute)
    change.make()
    copied = copy.deepcopy(change)
    copied.restore()

    assert loader.batch_sampler.tokens == 8 * MEAN
    assert copied.loader.batch_sampler.tokens == 16
    assert not hasattr(copied.loader.batch_sampler, "limit")


def test_setter_that_changes_nothing_is_refused():
    loader, model = by_budget(), Tokens()

    with pytest.raises(
        autobatch.AutobatchError,
        match=r"set_batch_size was called with \d+, and the loader makes batches of [2-9, ]+ samples",
    ) as caught:
        trainer(tuner(set_batch_size=lambda *_: None)).fit(model, loader)

    assert "\n" not in str(caught.value)
    assert (model.batches, loader.batch_sampler.tokens) == ([], 16)


def test_setter_that_changes_the_first_batch_only_is_refused_before_the_search():
    class First(Budget):
        first = None

        def __iter__(self):
            yield list(range(self.first or 4))
            yield from super().__iter__()

    loader, model = DataLoader(Indexed(), batch_sampler=First(16)), Tokens()

    def set_first(loader, batch_size):
        loader.batch_sampler.first = batch_size

    with pytest.raises(autobatch.AutobatchError, match="set_batch_size was called with 9, and the"):
        trainer(tuner(set_batch_size=set_first)).fit(model, loader)

    assert (model.batches, loader.batch_sampler.first) == ([], None)


def test_first_batch_with_all_data_need_not_change():
    callback = tuner(target_batch_size=None, set_batch_size=budget)
    report = callback.tune(trainer(), Tokens(), by_budget(MEAN * 600))

    assert report.plan.micro_batch_size > 1


def test_error_without_a_setter_names_set_batch_size():
    with pytest.raises(
        autobatch.AutobatchError, match=r"Budget, has no batch_size; pass set_batch_size"
    ):
        trainer(tuner()).fit(Tokens(), by_budget())


def exploding_from(least):
    def explode(loader, batch_size):
        budget(loader, batch_size)
        if batch_size >= least:
            raise ZeroDivisionError("mine")

    return explode


def test_error_of_the_setter_passes_through_and_restores_the_loader():
    loader = by_budget()

    with pytest.raises(ZeroDivisionError, match="mine"):
        trainer(tuner(set_batch_size=exploding_from(1))).fit(Tokens(), loader)

    assert loader.batch_sampler.tokens == 16


def test_sizes_that_the_setter_does_not_take_are_left_out():
    loader, callback = by_budget(), tuner(set_batch_size=exploding_from(20))

    trainer(callback).fit(Tokens(), loader)

    assert callback.report.plan.micro_batch_size < 20
    assert callback.report.plan.effective_batch_size == 120
    assert loader.batch_sampler.tokens == 16


def test_sizes_that_the_setter_rounds_are_left_out():
    def round_up(loader, batch_size):
        loader.batch_sampler.batch_size = -(-batch_size // 8) * 8

    model, callback = Model(), tuner(set_batch_size=round_up)

    trainer(callback).fit(model, DataLoader(data(), batch_size=32))

    plan = callback.report.plan
    assert (plan.micro_batch_size % 8, plan.effective_batch_size) == (0, 120)
    assert set(model.sizes) == {plan.micro_batch_size}
    refused = [trial for trial in callback.report.trials if not trial.fits and trial.error]
    assert any(f"{each.batch_size}, and the loader makes" in each.error for each in refused)


@pytest.mark.parametrize("given", [3, "tokens", [budget]])
def test_setter_that_is_no_function_is_refused(given):
    with pytest.raises(ValueError, match=r"set_batch_size=.* cannot be called"):
        tuner(set_batch_size=given)


def test_validation_loaders_are_not_set():
    seen = []

    def watching(loader, batch_size):
        seen.append(loader)
        budget(loader, batch_size)

    loader, validation = by_budget(), DataLoader(data(20), batch_size=5)
    model = Tokens()

    trainer(tuner(set_batch_size=watching)).fit(model, loader, validation)

    assert all(each is loader for each in seen)
    assert set(model.validated) == {5}


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_make_the_same_batches(workers):
    model, callback = Tokens(), tokens_tuned()

    trainer(callback, max_epochs=1).fit(model, by_budget(num_workers=workers))

    assert sorted(itertools.chain(*model.batches)) == list(range(600))
    assert torch.isfinite(model.net[0].weight).all()
