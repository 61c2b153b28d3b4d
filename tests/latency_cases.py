"""Latencies, a device with given call times, and a report about inference, for the tests."""

from __future__ import annotations

from hypothesis import strategies as st

import autobatch
from autobatch import BatchPlan, Outcome, Trial, TuningReport
from autobatch.report import Latency
from autobatch.testing import PaperDevice
from report_examples import GIB, example
from report_examples import settings as report_settings

spans = st.floats(1e-6, 1e3)


def latency(batch_size, seconds, top=None, calls=100):
    top = seconds if top is None else top
    return Latency(batch_size, seconds, seconds, top, top, calls)


@st.composite
def measured(draw):
    """Latencies of some sizes, in ascending order."""
    sizes = draw(st.lists(st.integers(1, 5000), min_size=1, max_size=30, unique=True))
    return tuple(
        Latency.of(size, draw(st.lists(spans, min_size=1, max_size=5)), 95)
        for size in sorted(sizes)
    )


class Paper(PaperDevice):
    """A device whose calls take what a function of the batch size and the number of the call says."""

    def __init__(self, seconds, **options):
        super().__init__(
            **{"capacity": 10**9, "seconds_per_step": 0, "seconds_per_sample": 0} | options
        )
        self.calls = {}
        self._seconds = seconds

    def answer(self, batch_size):
        for _ in self.workload(batch_size, 1):
            self.calls[batch_size] = at = self.calls.get(batch_size, 0) + 1
            self._now += self._seconds(batch_size, at)
            yield


def found(paper, **options):
    return autobatch.find(paper.answer, device=paper, **{"latency_limit": 1.0, **options})


def steady(base, per_sample, step=1, jump=0.0):
    """Seconds that grow with the batch, and jump every so many samples."""
    return lambda size, _: base + per_sample * size + jump * (size // step)


def noted(report, start):
    """The one note that begins so."""
    (note,) = (note for note in report.notes if note.startswith(start))
    return note


def answered(**changes) -> TuningReport:
    """A search that met its limit between 32 and 64."""
    measurements = (
        (1, 1.0, 1.4, 1.7, 2.70),
        (2, 1.1, 1.4, 1.7, 2.74),
        (4, 1.7, 2.1, 2.3, 2.80),
        (8, 3.3, 3.6, 3.9, 2.93),
        (16, 6.5, 7.0, 7.5, 3.20),
        (32, 13.7, 14.1, 14.5, 3.73),
        (40, 19.4, 20.1, 22.9, 4.00),
        (42, 31.4, 32.3, 34.1, 4.07),
        (64, 31.5, 33.0, 34.8, 4.80),
    )
    latencies = tuple(
        Latency(size, p50 / 1e3, p90 / 1e3, p99 / 1e3, p99 / 1e3, 100)
        for size, p50, p90, p99, _ in measurements
    )
    trials = tuple(
        Trial(size, Outcome.FIT, int(gib * GIB), p50 / 1e3, resident=2 * GIB)
        for size, p50, _, _, gib in measurements
    )
    report = example(
        settings=report_settings(target_batch_size=None, latency_limit=1 / 30, percentile=99),
        subject="answer",
        task="answer",
        trials=trials,
        plan=BatchPlan(40),
        latencies=latencies,
        dataset_size=None,
        validation_batch_size=None,
        look=None,
        notes=(
            "Waiting for a batch to fill comes on top: one stream of 30 samples/s takes 1.3 s to fill 40.",
        ),
    )
    return report.model_copy(update=changes)
