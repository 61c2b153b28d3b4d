"""Settings in, TuningReport out."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasGenerator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from autobatch import _tradeoff
from autobatch._cautions import accumulation_costs
from autobatch._curve import CurvePoint  # noqa: TC001 -- pydantic reads it
from autobatch._latency import (
    Latency,
    LatencyLimit,
    Stream,
    cameras,
    knee,
    stream,
)
from autobatch._latency_text import (
    latency_facts,
    latency_table,
    percentile_told,
    within,
)
from autobatch._learning_rate import LearningRateRule  # noqa: TC001 -- pydantic reads it
from autobatch._loading import Loading  # noqa: TC001 -- pydantic reads it
from autobatch._memory import format_bytes, parse_memory_limit
from autobatch._noise_scale import NoiseReading  # noqa: TC001 -- pydantic reads it
from autobatch._notes import Bound, Look, tightest_bound, waiting
from autobatch._numbers import SECONDS, aligned, percent, plain, quantity
from autobatch._pace import Pace
from autobatch._plan import BatchPlan
from autobatch._tables import (
    data_fact,
    effective_table,
    epoch_fact,
    memory_fact,
    speed_fact,
    speed_table,
    spread,
    update_fact,
)
from autobatch._text import UNICODE, Fact, Glyphs, Page, Table, terminal
from autobatch._tradeoff import (
    Costs,
    EffectiveRow,
    LineFit,
    NoiseRange,
    Optimum,
    SpeedRow,
    effective_rows,
    fit_line,
    is_of,
    optimum,
    settled,
    speed_rows,
)
from autobatch._trial import Outcome, Trial
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Device", "Settings", "Task", "TuningReport", "page"]

_SCHEMA_VERSION: Final = 1
# What a field is counted in, where its name does not say it
_UNITS = {
    **dict.fromkeys(("budget", "foreign", "peak", "resident", "total"), "bytes"),
    **dict.fromkeys(("low", "high"), "samples"),
}
# Of the numbers at the top of a report; settings are what was asked
_KINDS = {
    "budget_bytes": "derived",
    "dataset_size": "measured",
    "device": "measured",
    "knee": "measured",
    "largest_fit": "measured",
    "search_seconds": "measured",
    "smallest_failing": "measured",
    "validation_batch_size": "measured",
}
# Of a row of effective batches, what is estimated and not worked out from measured times
_ESTIMATED = (
    "relative_updates",
    "relative_samples",
    "relative_time",
    "relative_time_low",
    "relative_time_high",
    "useful_samples_per_second",
)
_ALLOWED = {
    "target_batch_size": "a count; give a whole number of samples, 1 or more, or None",
    "max_micro_batch_size": "a count; give a whole number of samples, 1 or more, or None",
    "steps_per_trial": "a count; give a whole number of optimizer steps, 1 or more",
    "time_limit": "a time; give seconds, more than 0, or None for no limit",
    "dataset_size": "a count; give a whole number of samples, 1 or more, or None",
    "latency_limit": "a time; give seconds, more than 0, or None for no limit",
    "percentile": "a percentile; give a number above 0 and up to 100",
}


def _named(field: str) -> str:
    """The name of a field in JSON, where a reader has no documentation at hand: with its unit."""
    return f"{field}_{_UNITS[field]}" if field in _UNITS else field


_FIELDS = {_named(field): field for field in _UNITS}


def _written(record: Any, kind: str) -> dict[str, Any]:
    """One of the frozen dataclasses in JSON; its kind says where its numbers come from."""
    named = {_named(name): value for name, value in asdict(record).items()}
    return {**named, "kind": kind}


def _read(record: Any) -> Any:
    if not isinstance(record, dict):
        return record
    return {
        _FIELDS.get(name, str(name)): value
        for name, value in record.items()
        if name != "kind"
    }


def _row_written(row: EffectiveRow) -> dict[str, Any]:
    """A row of effective batches, what is estimated apart."""
    written = _written(row, "derived")
    estimated = {name: written.pop(name) for name in _ESTIMATED}
    if row.relative_updates is None:
        return written
    return {**written, "to_same_loss": {**estimated, "kind": "estimated"}}


def _index(value: Any) -> Any:
    """A whole number of any make, NumPy's too; a truth value is none."""
    is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
    return value.__index__() if is_whole else value


def _limit(value: Any) -> Any:
    parse_memory_limit(value)
    return value


def _sound(record: Any) -> Any:
    if record is not None and not all(
        0 <= value < math.inf
        for value in asdict(record).values()
        if isinstance(value, float)
    ):
        raise ValueError("numbers that are measured are finite, and none is below 0")
    return record


def _sound_trial(trial: Trial) -> Trial:
    seconds = (trial.step_seconds or 0.0, trial.optimizer_seconds or 0.0)
    if min(trial.batch_size, trial.accumulate) < 1 or not all(
        0 <= second < math.inf for second in seconds
    ):
        raise ValueError("a trial has counts of 1 or more and times of 0 or more")
    return replace(trial, profile=())


def _sound_plan(plan: BatchPlan) -> BatchPlan:
    if min(plan.micro_batch_size, plan.accumulate_grad_batches, plan.world_size) < 1:
        raise ValueError("a plan has counts of 1 or more")
    return plan


def _sound_latency(latency: Latency) -> Latency:
    seconds = (
        latency.p50_seconds,
        latency.p90_seconds,
        latency.p99_seconds,
        latency.at_percentile_seconds,
    )
    if min(latency.batch_size, latency.calls) < 1 or not all(
        0 < second < math.inf for second in seconds
    ):
        raise ValueError("a latency has counts of 1 or more and times above 0")
    return latency


Task = Literal["train", "answer", "validate", "test", "predict"]
_Count = Annotated[int, BeforeValidator(_index), Field(ge=1, strict=True)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
_Trial = Annotated[
    Trial,
    BeforeValidator(_read),
    AfterValidator(_sound_trial),
    PlainSerializer(
        lambda t: {k: v for k, v in _written(t, "measured").items() if k != "profile"}
    ),
]
_Plan = Annotated[
    BatchPlan,
    AfterValidator(_sound_plan),
    PlainSerializer(
        lambda p: (
            _written(p, "derived") | {"effective_batch_size": p.effective_batch_size}
        )
    ),
]
_MEASURED = (
    BeforeValidator(_read),
    AfterValidator(_sound),
    PlainSerializer(
        lambda record: _written(record, "measured"), when_used="unless-none"
    ),
)
_Latency = Annotated[
    Latency,
    AfterValidator(_sound_latency),
    PlainSerializer(
        lambda each: (
            _written(each, "measured") | {"samples_per_second": each.samples_per_second}
        )
    ),
]
_FROZEN = ConfigDict(
    frozen=True,
    alias_generator=AliasGenerator(
        validation_alias=lambda field: AliasChoices(_named(field), field),
        serialization_alias=_named,
    ),
)


class Settings(BaseModel):
    """What was asked, checked.

    Args:
        target_batch_size: Samples per optimizer update, over all ranks; None for the largest micro-batch that fits.
        memory_limit: A share of the device, bytes, or text such as "10GiB".
        max_micro_batch_size: The largest micro-batch to consider.
        steps_per_trial: Optimizer steps per trial.
        time_limit: Seconds for the search.
        dataset_size: Samples per epoch.
        latency_limit: Seconds within which a batch has to be answered; None where that is not asked.
        percentile: So many percent of the calls have to be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_batch_size: _Count | None
    memory_limit: Annotated[float | int | str, BeforeValidator(_limit)]
    max_micro_batch_size: _Count | None
    steps_per_trial: _Count
    time_limit: Annotated[_Seconds, Field(gt=0)] | None
    dataset_size: _Count | None
    # As in reports from before there was a limit on latency
    latency_limit: Annotated[_Seconds, Field(gt=0)] | None = None
    percentile: Annotated[
        float, Field(gt=0, le=100, allow_inf_nan=False, strict=True)
    ] = 99

    @model_validator(mode="after")
    def _has_one_aim(self) -> Settings:
        if self.latency_limit is not None and self.target_batch_size is not None:
            raise ValueError(
                f"latency_limit={self.latency_limit:g} is about inference, which has no updates for "
                f"target_batch_size={self.target_batch_size} to count the samples of; give one of the two."
            )
        return self

    @property
    def limit_on_latency(self) -> LatencyLimit | None:
        """What a call may take, where that is asked."""
        if self.latency_limit is None:
            return None
        return LatencyLimit(self.latency_limit, self.percentile)

    @classmethod
    def checked(cls, **values: Any) -> Settings:
        """The settings, or a ValueError with one sentence about the first that is wrong."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ValueError(_complaint(error)) from None


def _complaint(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":  # a sentence of our own
        return str(first["ctx"]["error"])
    name = str(first["loc"][0])
    return f"{name}={first['input']!r} is not {_ALLOWED.get(name, 'a setting')}."


class Device(BaseModel):
    """The device a report is about.

    Args:
        name: What a person calls it.
        source: Where its memory was read.
        total: Bytes it has.
        foreign: Bytes that others hold.
    """

    model_config = _FROZEN

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

    model_config = _FROZEN

    schema_version: Literal[1] = _SCHEMA_VERSION
    autobatch_version: str
    settings: Settings
    subject: str
    task: Task = "train"
    device: Device
    budget: int
    trials: tuple[_Trial, ...]
    plan: _Plan
    validation_batch_size: _Count | None = None
    can_accumulate: bool = True
    dataset_size: _Count | None
    look: Annotated[Look | None, *_MEASURED] = None
    curve: tuple[Annotated[CurvePoint, *_MEASURED], ...] = ()
    noise: Annotated[NoiseReading | None, *_MEASURED] = None
    learning_rate: LearningRateRule | None = None
    loading: Annotated[Loading | None, *_MEASURED] = None
    latencies: tuple[_Latency, ...] = ()
    search_seconds: _Seconds
    notes: tuple[str, ...]
    environment: dict[str, str]

    @property
    def largest_fit(self) -> int | None:
        """The largest micro-batch that was run and fits."""
        fits = (trial.batch_size for trial in settled(self.trials) if trial.fits)
        return max(fits, default=None)

    @property
    def smallest_failing(self) -> int | None:
        """The smallest micro-batch that memory refused."""
        return min(
            (
                trial.batch_size
                for trial in settled(self.trials)
                if trial.outcome in {Outcome.OVER_BUDGET, Outcome.OUT_OF_MEMORY}
            ),
            default=None,
        )

    @property
    def sizes(self) -> tuple[SpeedRow, ...]:
        """What each micro-batch gives: measured."""
        return speed_rows(self.trials, self.curve, self.plan.world_size)

    @property
    def pace(self) -> Pace:
        """Seconds per micro-batch and per update, as measured."""
        return Pace.of(self.trials, self.curve)

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
        return _tradeoff.knee(self.sizes)

    def stream(self, rate: float) -> Stream:
        """What a stream of samples, so many per second and one by one, gets at each size that was timed.

        `.best` is the row of the size that answers it soonest.
        """
        return stream(self.latencies, rate, self.settings.latency_limit)

    def cameras(self, fps: float) -> int:
        """How many cameras of so many frames per second, all at the same time, are answered in one batch in time.

        Of the sizes that were timed; 0 where not even one is.
        """
        return cameras(self.latencies, fps)

    def to_json(self) -> str:
        """The report as JSON, with units in its keys, and with the derived rows."""
        derived = {
            "largest_fit": self.largest_fit,
            "smallest_failing": self.smallest_failing,
            "sizes": [_written(row, "measured") for row in self.sizes],
            "fit": _written(self.fit, "derived") if self.fit else None,
            "effective": [_row_written(row) for row in self.effective],
            "optimum": _written(self.optimum, "estimated") if self.optimum else None,
            "knee": self.knee,
            "kinds": _KINDS,
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
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ValueError(
                f"{path} can not be read ({why}); give the JSON file of a report."
            ) from error
        return _parsed(text, str(path))

    def text(self, glyphs: Glyphs = UNICODE) -> str:
        """The report for a terminal, at most 86 columns wide, in these glyphs."""
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
            from autobatch._figure import draw
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "matplotlib":
                raise
            raise AutobatchError(
                'A picture needs matplotlib: pip install "lightning-autobatch[plot]".'
            ) from None
        return draw(self, path, ax)

    def _repr_html_(self) -> str:
        from autobatch._notebook import to_html

        return to_html(self)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"<TuningReport: {_product(self.plan)}, {_counted(len(self.trials))}>"


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


def completed(report: TuningReport) -> Page:
    """What training has added to a report that was shown when it began."""
    return Page(
        header=("autobatch", plain(report.subject), "what training showed"),
        answer="",
        asked="",
        facts=(),
        tables=_effective(report),
        notes=tuple(plain(note) for note in _since_training(report)),
    )


def page(report: TuningReport) -> Page:
    """What the report says, in the order it says it; every sink shows this."""
    return Page(
        header=_header(report),
        answer=_answer(report),
        asked=_asked(report),
        facts=_facts(report),
        tables=_tables(report),
        notes=tuple(plain(note) for note in _notes(report)),
    )


def _notes(report: TuningReport) -> tuple[str, ...]:
    """Those of the tuning run, and what was measured since."""
    return (*_since_training(report), *report.notes)


def _since_training(report: TuningReport) -> tuple[str, ...]:
    told = (waiting(report.loading), _accumulation_costs(report))
    return tuple(note for note in told if note)


def _accumulation_costs(report: TuningReport) -> str | None:
    best, pace = report.optimum, report.pace
    alone = pace.update(report.plan.micro_batch_size, 1)
    if best is None or not alone:
        return None
    share = pace.optimizer_seconds / alone
    return accumulation_costs(report.plan, best.accumulate_grad_batches, share)


def _header(report: TuningReport) -> tuple[str, ...]:
    device = f"{plain(report.device.name)} {format_bytes(report.device.total)}"
    took = quantity(report.search_seconds, SECONDS)
    parts = (
        "autobatch",
        plain(report.subject),
        f"{report.plan.world_size} × {device}",
        f"{_counted(len(report.trials))}{_timed(report)} in {took}",
    )
    return tuple(part for part in parts if part)


def _answer(report: TuningReport) -> str:
    if report.task == "train":
        return _product(report.plan)
    ranks, limit = report.plan.world_size, report.settings.limit_on_latency
    share = f" on each of {ranks} ranks" if ranks > 1 else ""
    batches = f"Batches of {report.plan.micro_batch_size}{share}"
    if limit is None:
        return f"{batches} to {report.task}"
    if report.task == "answer":
        return f"{batches} answer {within(limit)}"
    return f"{batches} to {report.task}, {within(limit)}"


def _product(plan: BatchPlan) -> str:
    ranks = f" × {plan.world_size} ranks" if plan.world_size > 1 else ""
    factors = (
        f"{plan.micro_batch_size} × accumulate {plan.accumulate_grad_batches}{ranks}"
    )
    return f"Micro-batch {factors} = {plan.effective_batch_size} per update"


def _counted(trials: int) -> str:
    return "1 trial" if trials == 1 else f"{trials} trials"


def _timed(report: TuningReport) -> str:
    timed = report.curve or report.latencies
    return f", {len(timed)} sizes timed" if timed else ""


def _asked(report: TuningReport) -> str:
    target, got = report.settings.target_batch_size, report.plan.effective_batch_size
    limit = report.settings.limit_on_latency
    if limit is not None:
        return percentile_told(limit)
    if target is None:
        return _among_sizes(report)
    if target == got:
        return f"asked for {target}, exact"
    off = f"{abs(got - target)} {'more' if got > target else 'fewer'}"
    return f"asked for {target}, {off} ({percent(abs(got / target - 1))})"


def _among_sizes(report: TuningReport) -> str:
    """Where the chosen micro-batch stands among those that fit."""
    if len(settled(report.trials)) == 1:
        return "the only size tried"
    largest, bound = report.largest_fit or 0, _bound(report)
    if bound is not None and largest >= bound.batch_size:
        return "larger sizes not sought"
    if largest == report.plan.micro_batch_size:
        return "the largest found to fit"
    return f"{largest} is the largest found to fit"


def _bound(report: TuningReport) -> Bound | None:
    return tightest_bound(
        target_batch_size=report.settings.target_batch_size,
        max_micro_batch_size=report.settings.max_micro_batch_size,
        dataset_size=report.dataset_size,
        world_size=report.plan.world_size,
    )


def _facts(report: TuningReport) -> tuple[Fact, ...]:
    limit = report.settings.limit_on_latency
    if report.latencies and limit is not None:
        return _facts_of_answers(report, limit)
    plan, sizes = report.plan, report.sizes
    size = plan.micro_batch_size
    trial = next((t for t in settled(report.trials) if t.batch_size == size), None)
    speed = next((row for row in sizes if row.batch_size == size), None)
    row = next((row for row in report.effective if is_of(row, plan)), None)
    facts = []
    if speed:
        facts.append(speed_fact(speed, sizes))
    if trial and trial.peak is not None:
        asked = report.settings.target_batch_size is not None
        place = _among_sizes(report) if asked else ""  # or the answer has said it
        facts.append(memory_fact(trial.peak, report.budget, place))
    if trial and row and row.update_seconds:
        facts.append(update_fact(row.update_seconds, trial.optimizer_seconds))
    if row and row.updates_per_epoch:
        facts.append(epoch_fact(row.updates_per_epoch, row.epoch_seconds))
    if report.look:
        facts.append(data_fact(report.look))
    return tuple(facts)


def _facts_of_answers(report: TuningReport, limit: LatencyLimit) -> tuple[Fact, ...]:
    size = report.plan.micro_batch_size
    trial = next((t for t in settled(report.trials) if t.batch_size == size), None)
    facts = [*latency_facts(report.latencies, limit, size, report.task)]
    if trial and trial.peak is not None:
        facts.append(memory_fact(trial.peak, report.budget, _among_sizes(report)))
    if report.look:
        facts.append(data_fact(report.look))
    return tuple(facts)


def _tables(report: TuningReport) -> tuple[Table, ...]:
    limit = report.settings.limit_on_latency
    if report.latencies and limit is not None:
        size = report.plan.micro_batch_size
        peaks = {trial.batch_size: trial.peak for trial in settled(report.trials)}
        return (latency_table(report.latencies, limit, size, peaks),)
    if not report.trials:
        return _effective(report)
    return (
        speed_table(report.trials, report.sizes, report.plan),
        *_effective(report),
    )


def _effective(report: TuningReport) -> tuple[Table, ...]:
    """The ladder of effective batches, where anything is known of it."""
    rows = report.effective
    timed = any(row.update_seconds for row in rows)
    if not rows or not (report.dataset_size or timed):
        return ()
    title, foot = _effective_title(report), _effective_foot(report)
    return (effective_table(rows, report.plan, title=title, foot=foot),)


def _effective_title(report: TuningReport) -> str:
    noise = NoiseRange.of(report.noise)
    title = "Effective batch"
    if noise and report.noise:
        between = f"{report.noise.first_update}–{report.noise.last_update}"
        title += f", compared with {report.plan.effective_batch_size:,}; noise scale {aligned([noise.samples])[0]}, updates {between}"
    elif report.dataset_size:
        title += f", over an epoch of {report.dataset_size:,} samples"
    return title


def _effective_foot(report: TuningReport) -> str:
    """What stands below the ladder: how far to trust it, and which rule its learning rates go by."""
    rule = report.learning_rate
    told = [
        _trust(report),
        f"LR: {rule.optimizer}'s {rule.rule} rule, not applied." if rule else "",
    ]
    return " ".join(sentence for sentence in told if sentence)


def _trust(report: TuningReport) -> str:
    """How far to trust the times to the same loss, or why there are none."""
    noise = report.noise
    if noise is None:
        return ""
    known = aligned([noise.samples])[0] if noise.samples else ""
    match noise.state:
        case "ok":
            return f"{_likely(report)}Estimates, right within about 4×: they compare batches, not how long runs take."
        case "settling":
            so_far = f", at least {known} so far" if known else ""
            return f"Noise scale not settled after {noise.last_update:,} updates{so_far}; it usually rises in the first hundred."
        case "at_least":
            batch = f" of {noise.batch_size}" if noise.batch_size else ""
            return f"Noise scale at least {known}: updates{batch} are too small to measure more."
        case _:
            return f"Noise scale not measured: {noise.reason}."


def _likely(report: TuningReport) -> str:
    """What the shortest time to the same loss would be, where that is not the plan's own."""
    rows = [row for row in report.effective if row.relative_time is not None]
    best = min(rows, key=lambda row: row.relative_time or math.inf, default=None)
    if best is None or is_of(best, report.plan):
        return ""
    return (
        f"{best.effective_batch_size:,} per update would likely take {spread(best)} the time to the same loss, "
        "with the learning rate retuned. "
    )
