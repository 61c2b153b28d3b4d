from __future__ import annotations

import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from autobatch._report.notes import waiting
from autobatch._throughput.loading import Loading, loading_watch
from autobatch.sinks import to_markdown
from report_examples import example


class Slow(Dataset):
    """Takes its time."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        time.sleep(0.02)
        return torch.ones(2)


class Within(Slow):
    """Reads another loader."""

    def __getitem__(self, index):
        return next(iter(DataLoader(Slow())))


def test_what_a_loader_takes_is_counted():
    began = time.perf_counter()

    with loading_watch(time.perf_counter) as waited:
        for _ in DataLoader(Slow(), 2):
            pass
        took = time.perf_counter() - began

    assert waited.batches == 3
    assert 6 * 0.02 <= waited.seconds <= took


def test_a_loader_within_a_data_set_is_not_counted_twice():
    began = time.perf_counter()

    with loading_watch(time.perf_counter) as waited:
        for _ in DataLoader(Within(), 2):
            pass
        took = time.perf_counter() - began

    assert waited.batches == 3
    assert waited.seconds <= took


def test_what_a_step_takes_is_not_counted():
    loader = DataLoader(TensorDataset(torch.ones(4)), 1)
    ticks = iter(range(100))

    with loading_watch(lambda: next(ticks)) as waited:
        for _ in loader:
            for _ in range(10):
                next(ticks)

    # A tick to read each batch, and one to find that there are no more
    assert (waited.seconds, waited.batches) == (5, 4)


def test_a_loader_that_fails_leaves_the_watch_sound():
    class Broken(Slow):
        def __getitem__(self, index):
            raise RuntimeError("no such sample")

    with loading_watch(time.perf_counter) as waited:
        with pytest.raises(RuntimeError, match="no such sample"):
            next(iter(DataLoader(Broken())))
        next(iter(DataLoader(Slow())))

    assert waited.batches == 1
    assert waited.seconds >= 0.02


def test_streams_and_workers_are_counted_alike():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([1, 2, 3])

    with loading_watch(time.perf_counter) as waited:
        assert len(list(DataLoader(Stream()))) == 3
        assert len(list(DataLoader(Slow(), num_workers=1))) == 6

    assert waited.batches == 9


def test_afterwards_loaders_are_what_they_were():
    fetch = _BaseDataLoaderIter.__next__

    with pytest.raises(KeyError), loading_watch(time.perf_counter) as waited:
        assert _BaseDataLoaderIter.__next__ is not fetch
        raise KeyError

    next(iter(DataLoader(Slow())))

    assert _BaseDataLoaderIter.__next__ is fetch
    assert waited.batches == 0


# What is said of it


@pytest.mark.parametrize(
    ("wait", "note"),
    [
        (0.1, None),
        (0.31, "Data loading took 31 % of the time: more workers before more batch."),
    ],
)
def test_waiting_is_told_from_a_tenth_of_the_time_on(wait, note):
    assert waiting(Loading(wait, 1 - wait, 100)) == note


def test_where_nothing_was_measured_nothing_is_said():
    assert waiting(None) is None
    assert waiting(Loading(0.2, 0.2, 100)) is None  # a moment
    assert waiting(Loading(0.0, 0.0, 0)) is None


def test_a_report_says_so_wherever_it_is_shown():
    report = example(loading=Loading(31.0, 69.0, 200))
    note = "Data loading took 31 % of the time"

    assert note in str(report)
    assert note in to_markdown(report)
    assert note in str(type(report).from_json(report.to_json()))
    assert note not in str(example())
