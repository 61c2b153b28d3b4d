"""Record the memory and time of real trials, and replay them without a GPU."""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from autobatch._memory import MemoryReading, format_bytes
from autobatch._report import files
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from autobatch._memory import MemoryProbe, Watch

_SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Run:
    """One batch size run under a cap, and what the device said before and after.

    Args:
        batch_size: Samples per forward pass.
        accumulate: Micro-batches per optimizer step.
        budget: Bytes it was capped at.
        before: The reading when it began.
        after: The reading when it had ended, however it did.
        steps: Optimizer steps that it came through.
        step_seconds: Median seconds of a micro-batch, the first step left out; None where there was no second.
        allocator: Statistics of the allocator when it had ended, under the allocator's own names.
        first: The reading when its first step had ended; None where that did not.
    """

    batch_size: int
    accumulate: int
    budget: int
    before: MemoryReading
    after: MemoryReading
    steps: int
    step_seconds: float | None
    allocator: Mapping[str, int] = field(default_factory=dict)
    first: MemoryReading | None = None

    @property
    def fits(self) -> bool:
        """Whether it came through within the budget."""
        return self.steps > 0 and not self.ran_out

    @property
    def ran_out(self) -> bool:
        """Whether memory was refused, or asked for again after the first step, or the budget was passed."""
        start = self.first or self.before
        return (
            self.after.refused > self.before.refused
            or self.after.retries > start.retries
            or self.after.peak > self.budget
        )


@dataclass(frozen=True, slots=True)
class Recording:
    """The runs of a search on a device, in their order.

    Args:
        device: What the device is called.
        source: Where its memory was read.
        subject: What was trained.
        memory_limit: What was allowed, as it was asked for.
        environment: Versions of what was running.
        runs: What was tried.
    """

    device: str
    source: str
    subject: str
    memory_limit: float | int | str
    environment: Mapping[str, str]
    runs: tuple[Run, ...]

    def write(self, path: str | Path) -> None:
        """Keep it in a file of JSON."""
        told = {"schema_version": _SCHEMA_VERSION, **asdict(self)}
        files.write(Path(path), f"{json.dumps(told, indent=1)}\n".encode())

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read one that was written; `AutobatchError` where the file holds none."""
        try:
            told = json.loads(Path(path).read_text(encoding="utf-8"))
            version = told.pop("schema_version")
            runs = tuple(map(_run_of, told.pop("runs")))
            recording = cls(**told, runs=runs)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _no_recording(path) from error
        if version != _SCHEMA_VERSION:
            raise _no_recording(path)
        return recording


def _run_of(told: dict[str, Any]) -> Run:
    readings = {name: MemoryReading(**told[name]) for name in ("before", "after")}
    if told.get("first") is not None:
        readings["first"] = MemoryReading(**told["first"])
    return Run(**{**told, **readings})


def _no_recording(path: str | Path) -> AutobatchError:
    return AutobatchError(f"{path} holds no recording of schema_version {_SCHEMA_VERSION}.")


class Recorder:
    """A probe that passes everything on to another one, and keeps what that said of each run.

    Args:
        probe: The device.
        allocator: Asks the allocator for statistics that may be kept besides.

    Example:
        >>> recorder = Recorder(probe)  # doctest: +SKIP
        >>> find(recorder.watching(train), device=recorder)  # doctest: +SKIP
        >>> recorder.recording("ResNet", memory_limit=0.9).write("resnet.json")  # doctest: +SKIP
    """

    def __init__(
        self, probe: MemoryProbe, *, allocator: Callable[[], Mapping[str, int]] = dict
    ) -> None:
        self.runs: list[Run] = []
        self._probe = probe
        self._allocator = allocator
        self._size, self._accumulate = 0, 1
        self._seconds: list[float] = []
        self._first: MemoryReading | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._probe, name)  # name, source, and what else there may be

    def read(self) -> MemoryReading:
        """What the device says."""
        return self._probe.read()

    def attach(self, *objects: Any) -> None:
        """Pass on what already lives."""
        self._probe.attach(*objects)

    def release(self) -> None:
        """Have cached memory given back."""
        self._probe.release()

    def clock(self) -> float:
        """The device's own clock."""
        return self._probe.clock()

    @contextlib.contextmanager
    def limited(self, budget: int) -> Iterator[Watch | None]:
        """Cap the device, and keep what it says before and after."""
        before = self._probe.read()
        self._size, self._seconds, self._first = 0, [], None
        try:
            with self._probe.limited(budget) as watch:
                yield watch
        finally:
            if self._size:
                self.runs.append(self._run(budget, before))

    def watching(
        self, workload: Callable[[int, int], Iterator[Any]]
    ) -> Callable[[int, int], Iterator[Any]]:
        """The same training loop, of which is known which size runs and how long its steps take."""

        @functools.wraps(workload)
        def watched(batch_size: int, accumulate: int) -> Generator[Any]:
            self._size, self._accumulate = batch_size, accumulate
            self._seconds = []
            with contextlib.closing(workload(batch_size, accumulate)) as steps:  # type: ignore[type-var]  # a generator
                while True:
                    began = self.clock()
                    try:
                        said = next(steps)
                    except StopIteration:
                        return
                    self._seconds.append(self.clock() - began)
                    self._first = self._first or self._probe.read()
                    yield said

        return watched

    def recording(
        self,
        subject: str,
        *,
        memory_limit: float | str,
        environment: Mapping[str, str] | None = None,
    ) -> Recording:
        """All of it so far."""
        return Recording(
            device=self._probe.name,
            source=self._probe.source,
            subject=subject,
            memory_limit=memory_limit,
            environment=dict(environment or {}),
            runs=tuple(self.runs),
        )

    def _run(self, budget: int, before: MemoryReading) -> Run:
        later = self._seconds[1:]
        return Run(
            batch_size=self._size,
            accumulate=self._accumulate,
            budget=budget,
            before=before,
            after=self._probe.read(),
            steps=len(self._seconds),
            step_seconds=statistics.median(later) / self._accumulate if later else None,
            allocator=dict(self._allocator()),
            first=self._first,
        )


class ReplayedDevice:
    """A device that says again what one said that was recorded, with a workload to match; without tensors.

    A size that was run peaks at what was read then; between such sizes, and beyond them, peaks lie on straight lines.
    From the smallest size that failed on, memory runs out. What others held is what they held in the run of the same
    number; after the last it stays.

    Args:
        recording: What was recorded, or the file that holds it.

    Example:
        >>> device = ReplayedDevice("tests/recordings/resnet.json")  # doctest: +SKIP
        >>> find(device.workload, device=device, memory_limit=device.recording.memory_limit)  # doctest: +SKIP
    """

    def __init__(self, recording: Recording | str | Path) -> None:
        if not isinstance(recording, Recording):
            recording = Recording.read(recording)
        if not any(run.fits for run in recording.runs):
            raise ValueError(
                f"recording={recording.subject!r} has no run that fits; there is nothing to play back."
            )
        self.recording = recording
        self.name = f"replay of {recording.device}"
        self.source = "a recording"
        self._began = 0  # runs so far
        self._held = self._run.before.reserved
        self._peak = self._failures = 0
        self._limit: int | None = None
        self._now = 0.0

    @property
    def largest(self) -> int:
        """The largest size that was run and fits."""
        return max(run.batch_size for run in self.recording.runs if run.fits)

    def needs(self, batch_size: int, accumulate: int) -> int:
        """Bytes at the peak of a step."""
        runs = self._of_pattern(accumulate)
        peaks = {run.batch_size: run.after.peak for run in runs if run.fits}
        failed = [run for run in runs if run.ran_out and run.batch_size > max(peaks)]
        first = min(failed, key=lambda run: run.batch_size, default=None)
        at_least = min(run.before.reserved for run in runs)
        if first and batch_size >= first.batch_size:
            at_least = first.budget + 1
        return max(at_least, int(_on_lines(peaks, batch_size)))

    def workload(self, batch_size: int, accumulate: int) -> Generator[int]:
        """The training loop that was recorded, as far as memory and time go."""
        needed = self.needs(batch_size, accumulate)
        seconds = self._step_seconds(batch_size, accumulate)
        while True:
            self._hold(needed)
            self._now += seconds * accumulate
            yield batch_size

    def read(self) -> MemoryReading:
        """The total and what others hold as they were, the rest as it is in this run."""
        said = self._run.after if self._limit is None else self._run.before
        return MemoryReading(
            total=said.total,
            used=said.foreign + self._held,
            reserved=self._held,
            peak=self._peak,
            failures=self._failures,
        )

    @contextlib.contextmanager
    def limited(self, budget: int) -> Iterator[None]:
        """Past `budget` the workload is out of memory."""
        self._began += 1
        self._limit, self._peak = budget, self._held
        try:
            yield
        finally:
            self._limit = None

    def attach(self, *objects: Any) -> None:
        """Nothing: there are no tensors."""

    def release(self) -> None:
        """Let go of what the last step held, but for what the runs began with."""
        self._held = self._run.before.reserved

    def clock(self) -> float:
        """Seconds on a clock that only the workload moves."""
        return self._now

    @property
    def _run(self) -> Run:
        runs = self.recording.runs
        return runs[min(max(self._began - 1, 0), len(runs) - 1)]

    def _of_pattern(self, accumulate: int) -> list[Run]:
        """Runs that kept gradients alive as this one does; all of them where there are none that fit."""
        alike = [run for run in self.recording.runs if (run.accumulate > 1) == (accumulate > 1)]
        fitting = any(run.fits for run in alike)
        return alike if fitting else list(self.recording.runs)

    def _step_seconds(self, batch_size: int, accumulate: int) -> float:
        seconds = {
            run.batch_size: run.step_seconds
            for run in self._of_pattern(accumulate)
            if run.step_seconds is not None
        }
        return max(1e-6, _on_lines(seconds, batch_size)) if seconds else 1e-3

    def _hold(self, nbytes: int) -> None:
        import torch

        if self._limit is not None and nbytes > self._limit:
            self._failures += 1
            raise torch.OutOfMemoryError(
                f"out of memory, as recorded: {format_bytes(nbytes)}, of {format_bytes(self._limit)}."
            )
        self._held = max(self._held, nbytes)  # an allocator keeps what it has
        self._peak = max(self._peak, self._held)


def _on_lines(points: Mapping[int, float], at: int) -> float:
    """The value there, on straight lines through neighbouring points, the outer ones drawn on."""
    if at in points:
        return points[at]
    if len(points) == 1:
        points = {0: 0.0, **points}
    places = sorted(points)
    right = min(max(1, bisect_left(places, at)), len(places) - 1)
    a, b = places[right - 1], places[right]
    return points[a] + (points[b] - points[a]) * (at - a) / (b - a)
