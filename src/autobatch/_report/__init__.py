"""TuningReport: the result of a tuning run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BaseModel, ValidationError

from autobatch import _throughput
from autobatch._latency import Stream, cameras, knee, stream
from autobatch._noise import NoiseReading  # noqa: TC001 -- pydantic reads it
from autobatch._report import files
from autobatch._report.layout import UNICODE, Glyphs, terminal
from autobatch._report.notes import Look  # noqa: TC001 -- pydantic reads it
from autobatch._report.schema import (
    FROZEN,
    KINDS,
    MEASURED,
    ALatency,
    APlan,
    ATrial,
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
from autobatch._report.units import counted
from autobatch._settings import Count, Seconds, Settings  # noqa: TC001 -- pydantic reads it
from autobatch._throughput import (
    CurvePoint,
    LineFit,
    SpeedRow,
    StepTimes,
    fit_line,
    latest_by_size,
    speed_rows,
)
from autobatch._throughput.loading import Loading  # noqa: TC001 -- pydantic reads it
from autobatch._trials import Outcome
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SCHEMA_VERSION: Final = 1
Task = Literal["train", "answer", "validate", "test", "predict"]


class Device(BaseModel):
    """The device a report is about.

    Args:
        name: What a person calls it.
        source: Where its memory was read.
        total: Bytes it has.
        foreign: Bytes that others hold.
    """

    model_config = FROZEN

    name: str
    source: str
    total: int
    foreign: int


class TuningReport(BaseModel):
    """What a tuning run asked, tried, chose, and what the choice costs; `print` shows it.

    Args:
        schema_version: Of the JSON form.
        autobatch_version: What wrote it.
        settings: What was asked.
        subject: What was tuned, "resnet50 · AdamW · bf16-mixed"; may be empty.
        task: Whether it trains; else there are no updates, and the plan's batch is one forward pass, or one call of a
            workload that answers.
        device: The device it was tuned on, and what others hold there.
        budget: Bytes a trial may take.
        trials: Every trial, in the order they were run.
        plan: What was chosen.
        validation_batch_size: At which validation was tried beside training, and fits; None where it was not.
        can_accumulate: Whether what was tuned can make an update of several micro-batches.
        dataset_size: Samples per epoch, where known.
        look: How far was looked for the largest samples, which trials then ran on.
        curve: Sizes that were timed besides, over whole updates and in turns; empty where a plan was only verified.
        noise: The gradient noise scale, where a run measured it.
        learning_rate: How the learning rate of this optimizer usually goes with the batch, where a rule is known.
        loading: What reading data takes beside a step, where that was measured.
        latencies: How long calls take at each batch size, where inference was timed.
        search_seconds: What the search took.
        notes: What a person should be told.
        environment: Versions of what was running.
    """

    model_config = FROZEN

    schema_version: Literal[1] = _SCHEMA_VERSION
    autobatch_version: str
    settings: Settings
    subject: str
    task: Task = "train"
    device: Device
    budget: int
    trials: tuple[ATrial, ...]
    plan: APlan
    validation_batch_size: Count | None = None
    can_accumulate: bool = True
    dataset_size: Count | None
    look: Annotated[Look | None, *MEASURED] = None
    curve: tuple[Annotated[CurvePoint, *MEASURED], ...] = ()
    noise: Annotated[NoiseReading | None, *MEASURED] = None
    learning_rate: LearningRateRule | None = None
    loading: Annotated[Loading | None, *MEASURED] = None
    latencies: tuple[ALatency, ...] = ()
    search_seconds: Seconds
    notes: tuple[str, ...]
    environment: dict[str, str]

    @property
    def largest_fit(self) -> int | None:
        """The largest micro-batch that was run and fits."""
        fits = (trial.batch_size for trial in latest_by_size(self.trials) if trial.fits)
        return max(fits, default=None)

    @property
    def smallest_failing(self) -> int | None:
        """The smallest micro-batch that memory refused."""
        return min(
            (
                trial.batch_size
                for trial in latest_by_size(self.trials)
                if trial.outcome in {Outcome.OVER_BUDGET, Outcome.OUT_OF_MEMORY}
            ),
            default=None,
        )

    @property
    def sizes(self) -> tuple[SpeedRow, ...]:
        """What each micro-batch gives: measured."""
        return speed_rows(self.trials, self.curve, self.plan.world_size)

    @property
    def pace(self) -> StepTimes:
        """Seconds per micro-batch and per update, as measured."""
        return StepTimes.of(self.trials, self.curve)

    @property
    def fit(self) -> LineFit | None:
        """Seconds of a micro-batch as a line in its size, where one is worth drawing: derived."""
        return fit_line(self.pace)

    @property
    def effective(self) -> tuple[EffectiveRow, ...]:
        """What effective batches around the plan's would cost: derived; empty where nothing trains."""
        if self.task != "train":
            return ()
        rows = effective_rows(self._costs, self.trials, self.curve)
        if self.can_accumulate:
            return rows
        return tuple(row for row in rows if row.accumulate_grad_batches == 1)

    @property
    def optimum(self) -> Optimum | None:
        """Which effective batch would reach the same loss soonest: estimated; None where no noise scale was measured."""
        return optimum(self._costs, self.effective)

    @property
    def _costs(self) -> Costs:
        noise = NoiseRange.of(self.noise)
        return Costs(self.plan, self.pace, self.dataset_size, noise, self.learning_rate)

    @property
    def knee(self) -> int | None:
        """The smallest batch with 95 % of the fastest throughput; None where none was timed."""
        if self.latencies:
            found = knee(self.latencies)
            return found.batch_size if found else None
        return _throughput.knee(self.sizes)

    def stream(self, rate: float) -> Stream:
        """What a stream of samples, so many per second and one by one, gets at each size that was timed.

        `.best` is the row of the size that answers it soonest. `AutobatchError` where no calls were timed.
        """
        return stream(self._timed("stream"), rate, self.settings.latency_limit)

    def cameras(self, fps: float) -> int:
        """How many cameras of so many frames per second, all at the same time, are answered in one batch in time.

        Of the sizes that were timed; 0 where not even one is. `AutobatchError` where no calls were timed.
        """
        return cameras(self._timed("cameras"), fps)

    def _timed(self, asked: str) -> tuple[ALatency, ...]:
        """How long calls take, for those who ask."""
        if not self.latencies:
            raise AutobatchError(
                f"report.{asked} goes by how long calls take, and this report (task {self.task!r}) has timed none; "
                "ask one that was made with latency_limit."
            )
        return self.latencies

    def to_json(self) -> str:
        """The report as JSON, with units in its keys, and with the derived rows."""
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
        stored = self.model_dump(mode="json", by_alias=True)
        return json.dumps(stored | derived, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> TuningReport:
        """The report that `to_json` wrote."""
        return _parsed(text, "The text")

    @classmethod
    def read(cls, path: str | Path) -> TuningReport:
        """The report in a file that `to_json` or a sink wrote."""
        file = files.named(path, "of a report")
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ValueError(
                f"{path} can not be read ({why}); give the JSON file of a report."
            ) from error
        return _parsed(text, str(path))

    def text(self, glyphs: Glyphs = UNICODE) -> str:
        """The report for a terminal, at most 86 columns wide, in these glyphs."""
        from autobatch._report.text import page

        return terminal(page(self), glyphs)

    def plot(self, path: str | Path | None = None, ax: Axes | None = None) -> Figure:
        """The report as a picture: the answer, and what speaks for it; needs matplotlib.

        It opens no window, and leaves pyplot and its settings as they are; a notebook shows what is returned.

        Args:
            path: A file to write as well, which ends in .png, .svg or .pdf.
            ax: Draw only the main panel, into this Axes: what the effective batch costs, where a noise scale was
                measured, else the speed; for inference the latency. Its figure is returned.
        """
        try:
            from autobatch._report.figure import draw
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "matplotlib":
                raise
            raise AutobatchError(
                'A picture needs matplotlib: pip install "lightning-autobatch[plot]".'
            ) from None
        return draw(self, path, ax)

    def _repr_html_(self) -> str:
        from autobatch._report.notebook import to_html

        return to_html(self)

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
            f"{origin} has schema_version={version}, newer than the {_SCHEMA_VERSION} read here; upgrade autobatch."
        )
    try:
        return TuningReport.model_validate(stored)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{origin} is not a complete report ({where}: {first['msg']}); {remedy}."
        ) from error
