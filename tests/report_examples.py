"""Reports for tests: typical ones, and a Hypothesis strategy for any report."""

from __future__ import annotations

import contextlib
import dataclasses
import io

from hypothesis import strategies as st

from autobatch import BatchPlan, NoiseReading, Outcome, Trial, TuningReport, sinks
from autobatch._report.notes import notes
from autobatch._report.result import RunDetails, SubjectNotes
from autobatch._settings import Bound
from autobatch._throughput.curve import TimingLimit
from autobatch.report import CurvePoint, Device, LearningRateRule, Loading, Look, Settings

GIB = 2**30

# batch size, samples per second, peak in GiB
_MEASURED = (
    (1, 42, 2.7),
    (2, 86, 2.8),
    (4, 149, 3.1),
    (8, 223, 3.8),
    (16, 297, 5.0),
    (32, 358, 7.6),
    (48, 381, 10.1),
    (56, 391, 11.3),
)


def settings(**changes) -> Settings:
    defaults = {
        "target_batch_size": 256,
        "memory_limit": 0.9,
        "max_micro_batch_size": None,
        "steps_per_trial": 3,
        "time_limit": 300,
        "dataset_size": None,
    }
    return Settings.checked(**(defaults | changes))


def printed(report: TuningReport, sink=sinks.console, encoding="utf-8") -> str:
    """Return what a sink prints to an output in this encoding that is no terminal."""
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with contextlib.redirect_stdout(output):
        sink(report)
    output.seek(0)
    return output.read().strip("\n")


def full_example(**changes) -> TuningReport:
    """Return the report of the same card with timed sizes, a noise scale and a slow loader."""
    curve = tuple(
        CurvePoint(
            batch_size=size,
            accumulate=2,
            step_seconds=size / speed,
            step_seconds_low=0.98 * size / speed,
            step_seconds_high=1.03 * size / speed,
            optimizer_seconds=0.009,
            updates=20,
            peak=int(gib * GIB),
            drift=1.004,
        )
        for size, speed, gib in _MEASURED
    )
    tried = tuple(trial for trial in example().trials if trial.batch_size in (8, 16, 56, 64, 32))
    more = {
        "trials": tried,
        "curve": curve,
        "timing_seconds": 25.3,
        "validation_seconds": 1.8,
        "noise": NoiseReading("ok", 900, 760, 1080, 51, 150, 400, 256),
        "learning_rate": LearningRateRule("AdamW", "square-root"),
        "loading": Loading(wait_seconds=3.1, step_seconds=6.9, batches=40),
    }
    return example(**(more | changes))


def example(**changes) -> TuningReport:
    """Return the report of a search on one graphics card that is out of memory at 64."""
    fits = tuple(
        Trial(
            batch_size=size,
            outcome=Outcome.FIT,
            peak=int(gib * GIB),
            step_seconds=size / speed,
            accumulate=2,
            optimizer_seconds=0.009,
            resident=2 * GIB,
        )
        for size, speed, gib in _MEASURED
    )
    report = TuningReport(
        autobatch_version="0.1.0",
        settings=settings(),
        subject="resnet50 · AdamW · bf16-mixed",
        device=Device(name="RTX 3060", source="NVML", total=12 * GIB, foreign=GIB // 3),
        budget=int(11.6 * GIB),
        trials=(*fits, Trial(64, Outcome.OUT_OF_MEMORY, accumulate=2)),
        plan=BatchPlan(32, 8),
        validation_batch_size=64,
        dataset_size=1_281_167,
        look=Look(read=1000, among=1_281_167, is_even=True),
        search_seconds=48.2,
        notes=(
            (
                "Other processes hold 1.5 GiB of this device's 12 GiB; the largest fit changes "
                "when they start or stop."
            ),
            (
                "A note that is longer than a line of the report is broken between words, and goes "
                "on below its own first word."
            ),
        ),
        environment={"torch": "2.9.0"},
    )
    return report.model_copy(update=changes)


def with_noise(**changes) -> TuningReport:
    """Return the same report with step times that are a line in the batch size."""
    curve = tuple(
        dataclasses.replace(
            point,
            step_seconds=seconds,
            step_seconds_low=0.97 * seconds,
            step_seconds_high=1.04 * seconds,
        )
        for point in full_example().curve
        for seconds in [0.0261 + 0.00216 * point.batch_size]
    )
    return full_example(**({"curve": curve} | changes))


counts = st.integers(1, 10**9)
seconds = st.just(0.0) | st.floats(1e-9, 1e9)
texts = st.text(max_size=120)
plans = st.builds(BatchPlan, counts, st.integers(1, 10**4), st.integers(1, 4096))
trials = st.builds(
    Trial,
    batch_size=st.integers(1, 300) | counts,
    outcome=st.sampled_from(Outcome),
    peak=st.none() | st.integers(0, 2**50),
    step_seconds=st.none() | seconds,
    accumulate=st.integers(1, 64),
    optimizer_seconds=st.none() | seconds,
    resident=st.integers(0, 2**40),
    profile=st.just((1, 2)),
)


looks = st.builds(Look, read=counts, among=st.none() | counts, is_even=st.booleans())


amounts = st.just(0.0) | st.floats(1e-9, 1e12)
spans = st.tuples(amounts, amounts, amounts).map(sorted)
curve_points = st.builds(
    lambda span, **given: CurvePoint(
        step_seconds_low=span[0],
        step_seconds=span[1],
        step_seconds_high=span[2],
        **given,
    ),
    spans,
    batch_size=st.integers(1, 300) | counts,
    accumulate=st.integers(1, 64),
    optimizer_seconds=st.none() | seconds,
    updates=counts,
    peak=st.none() | st.integers(0, 2**50),
    drift=st.none() | amounts,
)
noises = st.builds(
    lambda span, **given: NoiseReading(low=span[0], samples=span[1], high=span[2], **given),
    spans,
    state=st.sampled_from(["settling", "ok", "at_least", "unavailable"]),
    windows=counts,
    first_update=counts,
    last_update=counts,
    batch_size=st.none() | counts,
    reason=st.none() | texts,
)
rules = st.builds(LearningRateRule, texts, st.sampled_from(["linear", "square-root"]))
loadings = st.builds(Loading, wait_seconds=amounts, step_seconds=amounts, batches=counts)


@st.composite
def reports(draw) -> TuningReport:
    """Draw any report; the micro-batch of its plan was usually tried."""
    plan = draw(plans)
    tried = draw(st.lists(trials, max_size=40))
    if draw(st.booleans()):
        size = plan.micro_batch_size
        tried.append(dataclasses.replace(draw(trials), batch_size=size))
    return TuningReport(
        autobatch_version=draw(texts),
        settings=Settings(
            target_batch_size=draw(st.none() | counts),
            memory_limit=draw(st.floats(1e-300, 1) | st.integers(101, 2**50) | st.just("10GiB")),
            max_micro_batch_size=draw(st.none() | counts),
            steps_per_trial=draw(counts),
            time_limit=draw(st.none() | st.floats(1e-30, 1e30)),
            dataset_size=draw(st.none() | counts),
        ),
        subject=draw(texts),
        device=draw(
            st.builds(
                Device,
                name=texts,
                source=texts,
                total=st.integers(0, 2**50),
                foreign=st.integers(0, 2**50),
            )
        ),
        budget=draw(st.integers(1, 2**50)),
        trials=tuple(tried),
        plan=plan,
        task=draw(st.sampled_from(["train", "validate", "test", "predict"])),
        validation_batch_size=draw(st.none() | counts),
        dataset_size=draw(st.none() | counts),
        look=draw(st.none() | looks),
        curve=tuple(draw(st.lists(curve_points, max_size=20, unique_by=lambda p: p.batch_size))),
        noise=draw(st.none() | noises),
        learning_rate=draw(st.none() | rules),
        loading=draw(st.none() | loadings),
        search_seconds=draw(seconds),
        notes=tuple(draw(st.lists(texts, max_size=3))),
        environment=draw(st.dictionaries(texts, texts, max_size=2)),
    )


_QUIET = RunDetails(
    bound=Bound(256, "target_batch_size=256 needs no more than 256 at once"),
    is_out_of_time=False,
    unreached=(),
    timing_limit=TimingLimit(20.0),
    before=None,
    last_samples=None,
    subject_notes=SubjectNotes(),
    prior_note=None,
    unfinished=None,
)
_OF_SETTINGS = ("target_batch_size", "prefer", "time_limit", "latency_limit")
_OF_DEVICE = ("source", "foreign")


def subject_notes(trials, plan):
    """Return notes of a subject on trials and on a plan."""
    return SubjectNotes((trials,), (plan,))


def notes_after(**changes) -> tuple[str, ...]:
    """Return the notes on a run that has none without `changes` of its fields."""

    def changed(names):
        return {name: changes.pop(name) for name in names if name in changes}

    run = dataclasses.replace(_QUIET, **changed([f.name for f in dataclasses.fields(_QUIET)]))
    device = {"name": "", "source": "NVML", "total": 12 * GIB, "foreign": GIB}
    report = {
        "trials": (
            Trial(32, Outcome.FIT),
            Trial(56, Outcome.FIT),
            Trial(64, Outcome.OUT_OF_MEMORY),
        ),
        "dataset_size": None,
        "look": None,
        "settings": settings(**changed(_OF_SETTINGS)),
        "device": Device(**(device | changed(_OF_DEVICE))),
    }
    return notes(example(**(report | changes)), run)
