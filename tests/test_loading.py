from __future__ import annotations

import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from autobatch._throughput.loading import loading_watch
from autobatch.report import Loading
from autobatch.sinks import to_markdown
from report_examples import example


class Slow(Dataset):
    """20 ms per sample."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        time.sleep(0.02)
        return torch.ones(2)


class Within(Slow):
    """Reads another loader for each sample."""

    def __getitem__(self, index):
        return next(iter(DataLoader(Slow())))


def test_reading_a_loader_is_timed():
    began = time.perf_counter()

    with loading_watch(time.perf_counter) as waited:
        for _ in DataLoader(Slow(), 2):
            pass
        took = time.perf_counter() - began

    assert waited.batches == 3
    assert 6 * 0.02 <= waited.seconds <= took


def test_a_loader_inside_a_dataset_is_not_timed_twice():
    began = time.perf_counter()

    with loading_watch(time.perf_counter) as waited:
        for _ in DataLoader(Within(), 2):
            pass
        took = time.perf_counter() - began

    assert waited.batches == 3
    assert waited.seconds <= took


def test_steps_are_not_counted_as_waiting():
    loader = DataLoader(TensorDataset(torch.ones(4)), 1)
    ticks = iter(range(100))

    with loading_watch(lambda: next(ticks)) as waited:
        for _ in loader:
            for _ in range(10):
                next(ticks)

    # One tick per batch, and one for the end of the data
    assert (waited.seconds, waited.batches) == (5, 4)


def test_timing_continues_after_a_loader_fails():
    class Broken(Slow):
        def __getitem__(self, index):
            raise RuntimeError("no such sample")

    with loading_watch(time.perf_counter) as waited:
        with pytest.raises(RuntimeError, match="no such sample"):
            next(iter(DataLoader(Broken())))
        next(iter(DataLoader(Slow())))

    assert waited.batches == 1
    assert waited.seconds >= 0.02


def test_iterable_datasets_and_workers_are_timed():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([1, 2, 3])

    with loading_watch(time.perf_counter) as waited:
        assert len(list(DataLoader(Stream()))) == 3
        assert len(list(DataLoader(Slow(), num_workers=1))) == 6

    assert waited.batches == 9


def test_loaders_are_not_timed_after_the_watch():
    begin = DataLoader.__iter__
    batches = None

    with pytest.raises(KeyError), loading_watch(time.perf_counter) as waited:
        batches = iter(DataLoader(Slow()))
        raise KeyError

    next(batches)
    next(iter(DataLoader(Slow())))

    assert DataLoader.__iter__ is begin
    assert waited.batches == 0


def test_loaders_of_other_threads_are_not_timed():
    with loading_watch(time.perf_counter) as waited:
        thread = threading.Thread(target=lambda: list(DataLoader(Slow())))
        thread.start()
        thread.join()

    assert waited.batches == 0


def test_iterators_keep_their_length_and_attributes():
    with loading_watch(time.perf_counter):
        batches = iter(DataLoader(Slow(), num_workers=1))

        assert iter(batches) is batches
        assert len(batches) == 6
        assert batches._num_workers == 1


def test_loaders_that_override_iteration_are_timed():
    class Endless(DataLoader):
        """Keeps one iterator, as loaders that reuse their workers do."""

        def __iter__(self):
            batches = super().__iter__()
            for _ in range(len(self)):
                yield next(batches)

    with loading_watch(time.perf_counter) as waited:
        assert len(list(Endless(Slow()))) == 6

    assert waited.batches == 6


# Notes


NOTE = "Data loading took 31 % of the time: raise num_workers before the batch size."


@pytest.mark.parametrize(
    ("loading", "is_noted"),
    [
        (Loading(0.31, 0.69, 100), True),
        (Loading(0.1, 0.9, 100), False),  # up to a tenth of the time
        (Loading(0.14, 0.31, 100), False),  # a moment
        (Loading(0.0, 0.0, 0), False),
        (None, False),
    ],
)
def test_waiting_for_data_is_noted_in_every_form_of_a_report(loading, is_noted):
    report = example(loading=loading)

    for text in (str(report), to_markdown(report), str(type(report).from_json(report.to_json()))):
        assert (NOTE in text) == is_noted
        assert ("Data loading" in text) == is_noted
