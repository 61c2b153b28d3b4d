"""Batches of trials: as the loader makes them, read in another process, a fresh one each step."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import pickle
import random
import threading
import time
from collections import UserDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from by_hand import Recorded, compared
from lightning_here import data, quiet_trainer, tuner

_reader = importlib.import_module("autobatch._loaders.reader")


@pytest.fixture(autouse=True)
def earlier():
    """Note the children that other tests have left, such as multiprocessing's resource tracker."""
    EARLIER.clear()
    EARLIER.update(children())


EARLIER: set[int] = set()


def children():
    """Return the process numbers of this process's children, ended ones that nobody waited for too."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if int(fields[1]) == os.getpid():
            found.append(int(path.parent.name))
    return [number for number in found if number not in EARLIER]


# The data of this process


class Crop:
    def __init__(self):
        self.random = np.random.default_rng(7)

    def __call__(self, x):
        return x + self.random.normal()


class Deep(Dataset):
    """Random states out of sight: in a dictionary of lists of transforms."""

    def __init__(self):
        self.stages = {"train": [[Crop()], [Crop()]]}
        self.data = data()
        self.reads = [0]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.reads[0] += 1
        x, y = self.data[index]
        for (crop,) in self.stages["train"]:
            x = crop(x).float()
        return x, y


def test_random_states_out_of_sight_stay_as_they_are():
    compared(lambda n: DataLoader(Deep(), n, shuffle=True)).check()


def test_data_set_is_read_in_another_process():
    dataset = Deep()

    report = tuner().tune(quiet_trainer(), Recorded(), DataLoader(dataset, 4))

    assert dataset.reads == [0]
    assert report.look.read == 600


def named_main(samples):
    """Collate, as some libraries do, in the main process or in a worker of a loader only."""
    in_main = multiprocessing.current_process().name == "MainProcess"
    assert in_main or torch.utils.data.get_worker_info()
    return default_collate(samples)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_set_is_read_under_the_name_of_this_process(workers):
    loader = DataLoader(data(), 4, collate_fn=named_main, num_workers=workers)

    assert tuner().tune(quiet_trainer(), Recorded(), loader).look.read == len(data())


class Scales(Dataset):
    """The collate function is a method of the data set, which counts batches and draws sizes."""

    def __init__(self):
        self.count = 0
        self.width = 16
        self.data = data()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]

    def collate(self, samples):
        self.count += 1
        scale = 1 + torch.randint(3, ()).item() + self.count % 3
        x, y = default_collate(samples)
        return scale * x, y


def test_collate_function_that_counts_and_draws_goes_on_as_by_hand():
    def loader(n):
        dataset = Scales()
        return DataLoader(dataset, n, shuffle=True, collate_fn=dataset.collate)

    compared(loader).check()


class Drawn(Deep):
    """Augments at random, by all generators that a worker has."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand(()) + np.random.random() + random.random(), y


class Scheduled(Recorded):
    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), 0.1)


def test_persistent_workers_and_a_schedule_keep_the_order_of_the_data():
    def loader(n):
        return DataLoader(Drawn(), n, shuffle=True, num_workers=1, persistent_workers=True)

    compared(loader, Scheduled).check()


# Batches


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor

    @classmethod
    def collate(cls, samples):
        return cls(*default_collate(samples))

    def to(self, device, **_):
        return Frozen(self.x.to(device), self.y.to(device))


class Encoding(UserDict):
    """Keeps more than its items, as what a tokenizer returns."""

    def __init__(self, items, words):
        super().__init__(items)
        self.words = words

    @classmethod
    def collate(cls, samples):
        x, y = default_collate(samples)
        return cls({"x": x, "y": y}, words=[f"word {len(x)}"])

    def to(self, device, **_):
        self.data = {name: part.to(device) for name, part in self.data.items()}
        return self


class Object:
    def __init__(self, samples):
        self.x, self.y = default_collate(samples)
        self.view = self.x[:, :2]

    def to(self, device, **_):
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self


class TakesAny(Recorded):
    def pair(self, batch):
        if isinstance(batch, Encoding):
            assert batch.words == [f"word {len(batch['x'])}"]
            return batch["x"], batch["y"]
        if isinstance(batch, list) and isinstance(batch[0], tuple):
            return torch.stack([x for x, _ in batch]), torch.stack([y for _, y in batch])
        return batch.x, batch.y


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("collate", [Frozen.collate, Encoding.collate, Object, list])
def test_step_receives_the_batch_that_the_loader_makes(collate, workers):
    compared(
        lambda n: DataLoader(data(), n, shuffle=True, collate_fn=collate, num_workers=workers),
        TakesAny,
    ).check()


class Noisy:
    """Makes its generator with the first batch, as collate functions with a seed do."""

    def __init__(self, collate):
        self.collate = collate
        self.generator = None

    def __call__(self, samples):
        self.generator = self.generator or torch.Generator().manual_seed(7)
        batch = self.collate(samples)
        batch.x = batch.x + torch.rand(batch.x.shape, generator=self.generator)
        return batch


class Within:
    """Passes samples on to another collate function."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, samples):
        return self.inner(samples)


@pytest.mark.parametrize("wrapped", [Noisy, lambda collate: Within(Noisy(collate))])
def test_batch_of_a_local_class_is_read_in_this_process(wrapped):
    class Local(Object):
        pass

    compared(
        lambda n: DataLoader(data(), n, shuffle=True, collate_fn=wrapped(Local)), TakesAny
    ).check()


class Doubles(TakesAny):
    """Writes a second view of each sample into its batch."""

    most = 0

    def pair(self, batch):
        batch.x, batch.y = torch.cat([batch.x, batch.x]), torch.cat([batch.y, batch.y])
        batch.view.zero_()
        return batch.x, batch.y


def test_step_may_write_into_its_batch():
    received = []

    class Watched(Doubles):
        def pair(self, batch):
            received.append((len(batch.x), batch.view[0, 0].item() != 0))
            return super().pair(batch)

    report = tuner().tune(
        quiet_trainer(), Watched(), DataLoader(data(), 4, shuffle=True, collate_fn=Object)
    )

    assert {size for size, _ in received} <= {trial.batch_size for trial in report.trials}
    assert all(is_unwritten for _, is_unwritten in received)


class Pairs(DataLoader):
    """Makes its batches in `__iter__`: each with another view of every sample."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield torch.cat([x, -x]), torch.cat([y, y])


def test_loader_with_its_own_iteration_is_iterated_in_trials():
    received = set()

    class Watched(Recorded):
        def pair(self, batch):
            received.add(len(batch[0]))
            return batch

    report = tuner(target_batch_size=None).tune(
        quiet_trainer(), Watched(), Pairs(data(), 4, shuffle=True)
    )

    assert received == {2 * trial.batch_size for trial in report.trials}


# Samples that only the loader itself can handle


class Locked(Dataset):
    def __len__(self):
        return 240

    def __getitem__(self, index):
        return data(240)[index], threading.Lock(), lambda: index


def without_locks(samples):
    return default_collate([sample for sample, *_ in samples])


class LockedStream(IterableDataset):
    def __iter__(self):
        return (Locked()[index] for index in range(240))


class Uncopied(DataLoader):
    def __reduce_ex__(self, _):
        raise TypeError("not to be copied")


@pytest.mark.parametrize(
    ("dataset", "workers"), [(Locked, 0), (Locked, 1), (LockedStream, 0)], ids=str
)
def test_samples_and_loaders_that_cannot_be_copied_are_collated_where_they_are_read(
    dataset, workers
):
    model = Recorded()
    callback = tuner()

    loader = Uncopied(dataset(), 4, collate_fn=without_locks, num_workers=workers)
    quiet_trainer(callback, max_epochs=1).fit(model, loader)

    assert set(model.sizes) == {callback.report.plan.micro_batch_size}


def test_worker_init_fn_prepares_the_worker_that_reads():
    class Handle(Deep):
        handle = None

        def __getitem__(self, index):
            assert self.handle == "open"
            return super().__getitem__(index)

    def open_handle(_):
        torch.utils.data.get_worker_info().dataset.handle = "open"

    loader = DataLoader(Handle(), 4, num_workers=1, worker_init_fn=open_handle)

    report = tuner().tune(quiet_trainer(), Recorded(), loader)

    assert report.look.read == 600


def test_timeout_of_the_loader_holds_for_a_worker_that_hangs(monkeypatch):
    monkeypatch.setattr(_reader, "_SECONDS_TO_END", 0.2)

    class Hangs(Deep):
        def __getitem__(self, index):
            if torch.utils.data.get_worker_info() is not None:
                time.sleep(600)
            return super().__getitem__(index)

    with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
        tuner().tune(quiet_trainer(), Recorded(), DataLoader(Hangs(), 4, num_workers=1, timeout=1))

    assert not children()


def test_data_set_that_hangs_in_the_other_process_is_read_in_this_one(monkeypatch):
    monkeypatch.setattr(_reader, "_MAX_IDLE", 0.5)
    monkeypatch.setattr(_reader, "_SECONDS_TO_END", 0.2)

    class Hangs(Deep):
        parent = os.getpid()

        def __getitem__(self, index):
            if os.getpid() != self.parent:
                time.sleep(600)
            return super().__getitem__(index)

    report = tuner().tune(quiet_trainer(), Recorded(), DataLoader(Hangs(), 4))

    assert report.look.read == 600
    assert not children()


class Readers(Dataset):
    """The process that reads each sample."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return os.getpid()


class Nested(Deep):
    """Reads another loader, which has a worker in the process that trains."""

    def __init__(self):
        super().__init__()
        self.other = DataLoader(Readers(), 4, num_workers=1, persistent_workers=True)
        (self.worker,) = set(torch.cat(list(self.other)).tolist())

    def __getitem__(self, index):
        if index == 0:
            assert self.worker not in next(iter(self.other)).tolist()
        return super().__getitem__(index)


def test_worker_of_a_loader_within_the_data_set_is_left_alone():
    dataset = Nested()

    report = tuner().tune(quiet_trainer(), Recorded(), DataLoader(dataset, 4))

    assert report.look.read == 600
    assert set(torch.cat(list(dataset.other)).tolist()) == {dataset.worker}
    dataset.other._iterator = None  # ends the worker


def test_objects_are_not_looked_through_where_no_worker_lives(monkeypatch):
    monkeypatch.setattr(gc, "get_objects", lambda: pytest.fail("looked through"))

    report = tuner().tune(quiet_trainer(), Recorded(), DataLoader(Deep(), 4))

    assert report.look.read == 600


class Empty(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("workers", [0, 1])
def test_fit_ends_as_without_autobatch_where_a_stream_is_empty(workers):
    model = Recorded()

    quiet_trainer(tuner()).fit(model, DataLoader(Empty(), 4, num_workers=workers))

    assert model.sizes == []


class Once(IterableDataset):
    """A stream that can be read once."""

    def __init__(self):
        self.rest = iter(data())

    def __iter__(self):
        return self.rest


def test_stream_that_can_be_read_once_is_not_read_by_trials():
    model = Recorded()
    callback = tuner(target_batch_size=24, max_micro_batch_size=12)

    quiet_trainer(callback, max_epochs=1).fit(model, DataLoader(Once(), 4))

    assert sum(model.sizes) == 600
    assert callback.report.look.read == 600


# Errors and the end


class MineError(Exception):
    def __init__(self, code, detail):
        super().__init__(f"{code}: {detail}")


class Fails(Deep):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def __getitem__(self, index):
        if index == 300:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), MineError(7, "not to be unpickled")])
def test_errors_of_a_data_set_pass_through(error):
    with pytest.raises(type(error), match=str(error)) as caught:
        tuner().tune(quiet_trainer(), Recorded(), DataLoader(Fails(error), 4))

    assert type(caught.value) is type(error)
    assert not children()


@pytest.mark.parametrize(("error", "workers"), [(KeyboardInterrupt, 1), (ZeroDivisionError, 0)])
def test_no_process_is_left_after_a_run_or_an_error(error, workers):
    loader = DataLoader(data(), 4, num_workers=workers, collate_fn=Object)
    tuner().tune(quiet_trainer(), TakesAny(), loader)
    assert not multiprocessing.active_children()
    assert not children()

    class Interrupted(TakesAny):
        def pair(self, batch):
            assert children()
            raise error

    with pytest.raises((error, SystemExit)):  # Lightning exits after Ctrl-C
        tuner().tune(quiet_trainer(), Interrupted(), loader)

    assert not children()


def test_process_that_ends_while_it_reads_is_replaced_by_this_one():
    class Ends(Deep):
        parent = os.getpid()

        def __getitem__(self, index):
            if os.getpid() != self.parent:
                os._exit(3)
            return super().__getitem__(index)

    report = tuner().tune(quiet_trainer(), Recorded(), DataLoader(Ends(), 4))

    assert report.look.read == 600
    assert not children()


def _labelled():
    tensor = torch.ones(3)
    tensor.label = 7
    return tensor


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3),
        torch.arange(6.0).reshape(2, 3).T,
        torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.ones(1, 3).expand(5, 3),
        torch.arange(10**4)[5:7],
        torch.tensor(7),
        torch.ones(0, 3),
        torch.ones(3, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.eye(3).to_sparse(),
        torch.nn.Parameter(torch.ones(3)),
        _labelled(),
    ],
)
def test_tensors_come_out_of_a_packed_batch_as_they_were(tensor):
    data = _reader.packed([tensor])

    (one,) = pickle.loads(data)
    (other,) = pickle.loads(data)

    assert len(data) < 2000
    assert type(one) is type(tensor)
    assert (one.dtype, one.requires_grad, vars(one)) == (
        tensor.dtype,
        tensor.requires_grad,
        vars(tensor),
    )
    assert torch.equal(one.to_dense(), tensor.to_dense())
    if tensor.layout is torch.strided:
        assert one.stride() == tensor.stride()
        assert one.data_ptr() != other.data_ptr() or not one.numel()
