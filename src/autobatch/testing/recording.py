"""Record memory and time of real trials, and replay them without a GPU."""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
from bisect import bisect_left
from collections.abc import Mapping  # noqa: TC003 -- pydantic reads the annotations
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from pydantic import TypeAdapter

from autobatch._memory import MemoryReading, format_bytes
from autobatch._report import files
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from contextlib import AbstractContextManager

    from autobatch._memory import MemoryProbe, Watch

_SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Run:
    """One batch size run under a cap, with memory readings before and after."""

    batch_size: int  # samples per forward pass
    accumulate: int  # micro-batches per optimizer step
    budget: int  # the cap, in bytes
    before: MemoryReading  # at the start
    after: MemoryReading  # at the end, also after a failure
    steps: int  # optimizer steps completed
    step_seconds: float | None  # median of a micro-batch without the first step; None for one step
    # Statistics of the allocator at the end, under its own names
    allocator: Mapping[str, int] = field(default_factory=dict)
    first: MemoryReading | None = None  # after the first step; None if that did not complete

    @property
    def fits(self) -> bool:
        """Return True if the run completed within the budget."""
        return self.steps > 0 and not self.ran_out

    @property
    def ran_out(self) -> bool:
        """Return True after a refusal, a retry since the first step, or an exceeded budget."""
        start = self.first or self.before
        return (
            self.after.refused > self.before.refused
            or self.after.retries > start.retries
            or self.after.peak > self.budget
        )


@dataclass(frozen=True, slots=True)
class Recording:
    """Runs of a search on a device, in order.

    Args:
        device: Name of the device.
        source: Origin of its memory readings.
        subject: Name of the model trained.
        memory_limit: Limit of the search, as passed by the user.
        environment: Versions of the software.
        runs: All runs.
    """

    device: str
    source: str
    subject: str
    memory_limit: float | int | str
    environment: Mapping[str, str]
    runs: tuple[Run, ...]

    def write(self, path: str | Path) -> None:
        """Write the recording to a JSON file."""
        content = {"schema_version": _SCHEMA_VERSION, **asdict(self)}
        files.write(Path(path), f"{json.dumps(content, indent=1)}\n".encode())

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a recording from a file; raise `AutobatchError` for any other content."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("schema_version") != _SCHEMA_VERSION:
                raise ValueError("another schema_version")  # noqa: TRY301 -- like any bad content
            return TypeAdapter(cls).validate_python(content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise AutobatchError(
                f"{path} does not hold a recording of schema_version {_SCHEMA_VERSION}."
            ) from error


class Recorder:
    """Probe that wraps another one, and records the readings of each run.

    Args:
        probe: Probe of the device.
        allocator: Function that returns further statistics to record.

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
        return getattr(self._probe, name)  # everything that is not recorded

    @contextlib.contextmanager
    def limited(self, budget: int) -> Iterator[Watch | None]:
        """Cap the device, and record its readings before and after."""
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
        """Return the same training loop, with batch sizes and step times recorded."""

        @functools.wraps(workload)
        def watched(batch_size: int, accumulate: int) -> Generator[Any]:
            self._size, self._accumulate = batch_size, accumulate
            self._seconds = []
            with contextlib.closing(workload(batch_size, accumulate)) as steps:  # type: ignore[type-var]  # a generator
                while True:
                    began = self.clock()
                    try:
                        samples = next(steps)
                    except StopIteration:
                        return
                    self._seconds.append(self.clock() - began)
                    self._first = self._first or self._probe.read()
                    yield samples

        return watched

    def recording(
        self,
        subject: str,
        *,
        memory_limit: float | str,
        environment: Mapping[str, str] | None = None,
    ) -> Recording:
        """Return the recording of all runs so far."""
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


class TensorlessDevice:
    """Memory and clock of a device on which a workload holds bytes without tensors."""

    _held = _peak = _failures = 0  # bytes, and refused allocations
    _now = 0.0  # seconds
    _limit: int | None = None  # bytes

    @contextlib.contextmanager
    def _limited(self, budget: int) -> Iterator[None]:
        self._limit, self._peak = budget, self._held
        try:
            yield
        finally:
            self._limit = None

    def attach(self, *objects: Any) -> None:
        """Do nothing: there are no tensors."""

    def clock(self) -> float:
        """Return seconds on the device's own clock, which only its workload advances."""
        return self._now

    def _reading(self, total: int, foreign: int) -> MemoryReading:
        return MemoryReading(
            total=total,
            used=foreign + self._held,
            reserved=self._held,
            peak=self._peak,
            failures=self._failures,
        )

    def _hold(self, nbytes: int) -> None:
        import torch

        if self._limit is not None and nbytes > self._limit:
            self._failures += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. A step without tensors takes {format_bytes(nbytes)}, "
                f"of a limit of {format_bytes(self._limit)}."
            )
        self._held = nbytes
        self._peak = max(self._peak, nbytes)


class ReplayedDevice(TensorlessDevice):
    """Device that repeats the readings of a recording, with a matching workload; no tensors.

    A recorded size peaks at its recorded value; other peaks lie on straight lines through these.
    At and above the smallest size that failed, memory runs out. Memory of other processes is that
    of the run of the same number; after the last run it stays.

    Args:
        recording: A recording, or the path of its file.

    Example:
        >>> device = ReplayedDevice("tests/recordings/resnet.json")  # doctest: +SKIP
        >>> find(device.workload, device=device, memory_limit=device.recording.memory_limit)  # doctest: +SKIP
    """

    def __init__(self, recording: Recording | str | Path) -> None:
        if not isinstance(recording, Recording):
            recording = Recording.read(recording)
        if not any(run.fits for run in recording.runs):
            raise ValueError(
                f"recording={recording.subject!r} has no run that fits; there is nothing to replay."
            )
        self.recording = recording
        self.name = f"replay of {recording.device}"
        self.source = "a recording"
        self._started = 0  # number of runs
        self._held = self._run.before.reserved

    @property
    def largest(self) -> int:
        """Largest recorded size that fits."""
        return max(run.batch_size for run in self.recording.runs if run.fits)

    def needs(self, batch_size: int, accumulate: int) -> int:
        """Return the peak bytes of a step."""
        runs = self._of_pattern(accumulate)
        peaks = {run.batch_size: run.after.peak for run in runs if run.fits}
        failed = [run for run in runs if run.ran_out and run.batch_size > max(peaks)]
        first = min(failed, key=lambda run: run.batch_size, default=None)
        at_least = min(run.before.reserved for run in runs)
        if first and batch_size >= first.batch_size:
            at_least = first.budget + 1
        return max(at_least, int(_on_lines(peaks, batch_size)))

    def workload(self, batch_size: int, accumulate: int) -> Generator[int]:
        """Run a training loop with the recorded memory and times."""
        needed = self.needs(batch_size, accumulate)
        seconds = self._step_seconds(batch_size, accumulate)
        while True:
            self._hold(max(self._held, needed))  # an allocator keeps what it has
            self._now += seconds * accumulate
            yield batch_size

    def read(self) -> MemoryReading:
        """Return the recorded total and use by other processes, and the memory of this replay."""
        recorded = self._run.after if self._limit is None else self._run.before
        return self._reading(recorded.total, recorded.foreign)

    def limited(self, budget: int) -> AbstractContextManager[None]:
        """Begin the next run; let the workload run out of memory beyond `budget`."""
        self._started += 1
        return self._limited(budget)

    def release(self) -> None:
        """Free the memory of the last step, down to the memory at the start of the run."""
        self._held = self._run.before.reserved

    @property
    def _run(self) -> Run:
        runs = self.recording.runs
        return runs[min(max(self._started - 1, 0), len(runs) - 1)]

    def _of_pattern(self, accumulate: int) -> list[Run]:
        """Runs with gradient accumulation, or without; all runs if none of these fits."""
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


def _on_lines(points: Mapping[int, float], at: int) -> float:
    """Interpolate linearly between neighbouring points, and extrapolate beyond the outer ones."""
    if at in points:
        return points[at]
    if len(points) == 1:
        points = {0: 0.0, **points}
    places = sorted(points)
    right = min(max(1, bisect_left(places, at)), len(places) - 1)
    a, b = places[right - 1], places[right]
    return points[a] + (points[b] - points[a]) * (at - a) / (b - a)
