"""TuningReport: the result of a tuning run."""

from __future__ import annotations

import base64
import json
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Annotated, Final, Literal, cast

from pydantic import BaseModel, ValidationError

from autobatch import _throughput
from autobatch._latency import Stream, cameras, stream
from autobatch._noise import NoiseReading  # noqa: TC001 -- pydantic reads it
from autobatch._report import files
from autobatch._report.layout import UNICODE, Glyphs, html, terminal
from autobatch._report.result import Look, Survived  # noqa: TC001 -- pydantic reads them
from autobatch._report.schema import (
    CONFIG,
    KINDS,
    MEASURED,
    Bytes,
    StoredLatency,
    StoredPlan,
    StoredTrial,
    row_written,
    written,
)
from autobatch._report.tables import product
from autobatch._report.tradeoff import (
    Costs,
    EffectiveRow,
    LearningRateRule,
    NoiseRange,
    Optimum,
    effective_rows,
    optimum,
)
from autobatch._report.units import counted, plain
from autobatch._settings import Count, Seconds, Settings  # noqa: TC001 -- pydantic reads it
from autobatch._throughput import CurvePoint, LineFit, SpeedRow, StepTimes, fit_line, speed_rows
from autobatch._throughput.loading import Loading  # noqa: TC001 -- pydantic reads it
from autobatch._trials import Outcome, latest_by_size
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from autobatch._report.figure import Picture

_SCHEMA_VERSION: Final = 1
Task = Literal["train", "answer", "validate", "test", "predict"]


class Device(BaseModel):
    """The device that was tuned.

    Args:
        name: Name for people, "RTX 3060".
        source: Source of the memory readings, "NVML".
        total: Memory of the device, in bytes.
        foreign: Memory used by other processes, in bytes.
    """

    model_config = CONFIG

    name: str
    source: str
    total: Bytes
    foreign: Bytes


class TuningReport(BaseModel):
    """Result of a tuning run: settings, trials, plan and costs; `print` shows it.

    Args:
        schema_version: Version of the JSON form.
        autobatch_version: Version of autobatch that made the report.
        settings: Arguments of the tuning run.
        subject: Model, optimizer and precision, "resnet50 · AdamW · bf16-mixed"; may be empty.
        task: Use of the batches. Only "train" has updates; otherwise the plan's batch is one
            forward pass, or one call of a workload that answers.
        device: Device, and memory used by other processes on it.
        budget: Memory that a trial may use, in bytes.
        trials: All trials, in the order they were run.
        plan: The chosen micro-batch size, accumulation and ranks.
        validation_batch_size: Batch size at which validation was tried beside training and fits,
            in samples; None if validation was not tried.
        can_accumulate: Whether an update of the workload can have several micro-batches.
        devices: Devices that train together; None in reports of earlier versions.
        as_if: True if one process stood for all devices, which did not run.
        dataset_size: Samples per epoch; None if unknown.
        look: Samples that were read to find the largest ones, on which trials run.
        curve: Sizes that were timed after the search, over whole updates and in turns; empty if
            a known plan was only verified.
        noise: Gradient noise scale, in samples; None if no run measured it.
        learning_rate: Usual rule for the learning rate of this optimizer; None if none is known.
        loading: Time spent waiting for data beside time in steps, in seconds; None if not
            measured.
        survived: Micro-batches of training that ran out of memory and were done in pieces.
        latencies: Latency of calls at each batch size, in seconds; empty without latency_limit.
        guide: Kind of memory that the search followed, "by predicted memory"; None where there was
            nothing to predict.
        search_seconds: Duration of tuning from its beginning to its end, in seconds.
        timing_seconds: Part of it that timed sizes, in seconds; None in reports of earlier versions.
        validation_seconds: Part of it that tried validation, in seconds; None without it.
        notes: Sentences about consequences of the plan and limits of the measurements.
        environment: Versions of Python packages and drivers, by name.
    """

    model_config = CONFIG

    schema_version: Literal[1] = _SCHEMA_VERSION
    autobatch_version: str
    settings: Settings
    subject: str
    task: Task = "train"
    device: Device
    budget: Bytes
    trials: tuple[StoredTrial, ...]
    plan: StoredPlan
    validation_batch_size: Count | None = None
    can_accumulate: bool = True
    devices: Count | None = None
    as_if: bool = False
    dataset_size: Count | None
    look: Annotated[Look, *MEASURED] | None = None
    curve: tuple[Annotated[CurvePoint, *MEASURED], ...] = ()
    noise: Annotated[NoiseReading, *MEASURED] | None = None
    learning_rate: LearningRateRule | None = None
    loading: Annotated[Loading, *MEASURED] | None = None
    survived: tuple[Annotated[Survived, *MEASURED], ...] = ()
    latencies: tuple[StoredLatency, ...] = ()
    guide: str | None = None
    search_seconds: Seconds
    timing_seconds: Seconds | None = None
    validation_seconds: Seconds | None = None
    notes: tuple[str, ...]
    environment: dict[str, str]

    @property
    def largest_fit(self) -> int | None:
        """Largest micro-batch that was run and fits, in samples: measured."""
        latest = latest_by_size(self.trials)
        return max((size for size, trial in latest.items() if trial.fits), default=None)

    @property
    def smallest_failing(self) -> int | None:
        """Smallest micro-batch that was over the budget or out of memory: measured."""
        failures = {Outcome.OVER_BUDGET, Outcome.OUT_OF_MEMORY}
        latest = latest_by_size(self.trials)
        return min((size for size, t in latest.items() if t.outcome in failures), default=None)

    @property
    def sizes(self) -> tuple[SpeedRow, ...]:
        """Throughput and peak memory of each micro-batch that was timed: measured."""
        return speed_rows(self.trials, self.curve, self.plan.world_size)

    @property
    def pace(self) -> StepTimes:
        """Seconds per micro-batch and per update, interpolated between measured sizes."""
        return StepTimes.of(self.trials, self.curve)

    @property
    def fit(self) -> LineFit | None:
        """Seconds of a micro-batch as a line in its size: derived; None if no line fits."""
        return fit_line(self.pace)

    @property
    def effective(self) -> tuple[EffectiveRow, ...]:
        """Costs of effective batches around the plan's: derived; empty if nothing is trained."""
        if self.task != "train":
            return ()
        rows = effective_rows(self._costs, self.trials, self.curve)
        if self.can_accumulate:
            return rows
        return tuple(row for row in rows if row.accumulate_grad_batches == 1)

    @property
    def optimum(self) -> Optimum | None:
        """Effective batch with the shortest time to the same loss: estimated.

        None without a noise scale.
        """
        return optimum(self._costs, self.effective)

    @property
    def _costs(self) -> Costs:
        noise = NoiseRange.of(self.noise)
        return Costs(self.plan, self.pace, self.dataset_size, noise, self.learning_rate)

    @property
    def knee(self) -> int | None:
        """Smallest batch with 95 % of the fastest throughput: measured; None if none was timed."""
        timed = self.latencies or self.sizes
        return _throughput.knee({row.batch_size: row.samples_per_second for row in timed})

    def stream(self, rate: float) -> Stream:
        """Return the response times to a stream of samples at each batch size that was timed.

        Args:
            rate: Samples per second, which arrive one by one.

        Returns:
            A row per batch size; `.best` is the row with the shortest response time.

        Raises:
            ValueError: The rate is not a number above 0.
            AutobatchError: The report has no latencies.
        """
        return stream(self._timed_latencies("stream"), rate, self.settings.latency_limit)

    def cameras(self, fps: float) -> int:
        """Return the number of cameras whose simultaneous frames one batch answers in time.

        Args:
            fps: Frames per second of each camera.

        Returns:
            A batch size that was timed; 0 if none is fast enough.

        Raises:
            ValueError: The rate is not a number above 0.
            AutobatchError: The report has no latencies.
        """
        return cameras(self._timed_latencies("cameras"), fps)

    def _timed_latencies(self, method: str) -> tuple[StoredLatency, ...]:
        if not self.latencies:
            raise AutobatchError(
                f"report.{method} goes by how long calls take, and this report "
                f"(task {self.task!r}) has timed none; ask one that was made with latency_limit."
            )
        return self.latencies

    def to_json(self) -> str:
        """Return the report as JSON, with units in its keys and with its derived rows."""
        stored = self.model_dump(mode="json", by_alias=True)
        derived = {
            "largest_fit": self.largest_fit,
            "smallest_failing": self.smallest_failing,
            "sizes": [written(row, "measured") for row in self.sizes],
            "fit": written(self.fit, "derived") if self.fit else None,
            "effective": [row_written(row) for row in self.effective],
            "optimum": written(self.optimum, "estimated") if self.optimum else None,
            "knee": self.knee,
            "kinds": KINDS,
        }
        return json.dumps(stored | derived, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> TuningReport:
        """Return the report that `to_json` wrote.

        Raises:
            ValueError: The text is not such a report.
        """
        return _parsed(text, "The text")

    @classmethod
    def read(cls, path: str | Path) -> TuningReport:
        """Return the report in a JSON file.

        Args:
            path: A file that a sink, a logger or `to_json` wrote.

        Raises:
            ValueError: The file cannot be read, or is not a report.
        """
        file = files.named(path, "of a report")
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ValueError(
                f"{path} cannot be read ({reason}); give the JSON file of a report."
            ) from error
        return _parsed(text, str(path))

    def text(self, glyphs: Glyphs = UNICODE) -> str:
        """Return the report as text of at most 86 columns.

        Args:
            glyphs: Characters that the output can show.
        """
        from autobatch._report.text import page

        return terminal(page(self), glyphs)

    def plot(self, path: str | Path | None = None, ax: Axes | None = None) -> Figure:
        """Draw the report with matplotlib: the plan, and the measurements behind it.

        Opens no window and changes neither pyplot nor its settings; a notebook shows the figure
        that is returned.

        Args:
            path: A .png, .svg or .pdf file to write as well.
            ax: Axes for the main panel alone: cost of the effective batch if a noise scale was
                measured, otherwise throughput; latency for inference.

        Returns:
            The figure, or the figure of `ax`.

        Raises:
            AutobatchError: matplotlib is not installed.
            ValueError: The path has another ending.
        """
        with needing_matplotlib():
            from autobatch._report.figure import draw
        return draw(self, path, ax)

    def _repr_html_(self) -> str:
        from autobatch._report.text import page

        content = page(self)
        text = html(content)
        try:
            figure = self.plot()
        except AutobatchError:  # matplotlib is not installed
            return text
        image = base64.b64encode(cast("Picture", figure)._repr_png_()).decode()
        source = f"data:image/png;base64,{image}"
        return f'{text}<img alt="{escape(content.answer)}" style="max-width:100%" src="{source}">'

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"<TuningReport: {product(self.plan)}, {counted(len(self.trials), 'trial')}>"


def _parsed(text: str, origin: str) -> TuningReport:
    remedy = "give what TuningReport.to_json() wrote"
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin} is not JSON ({error}); {remedy}.") from error
    if not isinstance(stored, dict) or "schema_version" not in stored:
        raise ValueError(f"{origin} is JSON, but not a report of autobatch; {remedy}.")
    version = stored["schema_version"]
    if isinstance(version, int) and version > _SCHEMA_VERSION:
        raise ValueError(
            f"{origin} has schema_version={version}, and this version of autobatch reads up to "
            f"{_SCHEMA_VERSION}; upgrade autobatch."
        )
    try:
        # Strictly: true is no number, nor is text
        return TuningReport.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{origin} is not a complete report ({plain(field)}: {plain(first['msg'])}); {remedy}."
        ) from error


@contextmanager
def needing_matplotlib() -> Iterator[None]:
    """Import what draws in the body; `AutobatchError` if matplotlib is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise AutobatchError(
            'A picture needs matplotlib: pip install "lightning-autobatch[plot]".'
        ) from None
