"""Facts, table and notes of a report about inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from autobatch._latency import calls_above, enough_calls, largest_within, stream
from autobatch._report.layout import Column, Fact, Table
from autobatch._report.tables import bar, counts, measures, numbers, table_of, thinned
from autobatch._report.units import (
    BYTES,
    SECONDS,
    counted,
    duration,
    listed,
    percent,
    rounded,
    trimmed,
    unit_for,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from autobatch._latency import Latency, TooSlow, Unfinished
    from autobatch._report import TuningReport
    from autobatch._settings import LatencyLimit

_LISTED: Final = 6  # sizes below the table that are listed one by one
_NOISY: Final = 3  # times the median: calls of a workload alone seldom differ by more
_KNEE_APART: Final = 2 / 3  # of the chosen size: a knee above it is not worth a line
_ALL: Final = 100  # % of calls


@dataclass(frozen=True, slots=True)
class Answers:
    """Latencies of a report with a limit, the chosen size and the knee."""

    latencies: Sequence[Latency]
    limit: LatencyLimit
    chosen: int
    knee: int | None

    @classmethod
    def of(cls, report: TuningReport) -> Answers | None:
        """Return the answers of a report; None without a limit."""
        limit = report.settings.limit_on_latency
        if limit is None:
            return None
        return cls(report.latencies, limit, report.plan.micro_batch_size, report.knee)

    @property
    def row(self) -> Latency | None:
        """Latency of the chosen size; None if it was not timed."""
        return self.at(self.chosen)

    @property
    def largest_within(self) -> int | None:
        """The largest size within the limit; None if there is none."""
        largest = largest_within(self.latencies, self.limit.seconds)
        return largest.batch_size if largest else None

    @property
    def over(self) -> list[Latency]:
        return [each for each in self.latencies if self.is_over(each)]

    @property
    def next_over(self) -> Latency | None:
        """The smallest size above the chosen one that is over the limit."""
        larger = (each for each in self.over if each.batch_size > self.chosen)
        return min(larger, key=lambda each: each.batch_size, default=None)

    def at(self, batch_size: int | None) -> Latency | None:
        return next((each for each in self.latencies if each.batch_size == batch_size), None)

    def is_over(self, latency: Latency) -> bool:
        return latency.at_percentile_seconds > self.limit.seconds


def percentile_comment(answers: Answers) -> str:
    """Return the share of calls that has to meet the limit, or the number of calls if few."""
    row, percentile = answers.row, answers.limit.percentile
    if row is not None and not calls_above(row.calls, percentile):
        return f"{counted(row.calls, 'call')} timed, asked for {percentile:g} %"
    return "every call that was timed" if percentile == _ALL else f"{percentile:g} % of calls"


def too_slow_reason(too_slow: TooSlow, limit: LatencyLimit) -> str:
    """Return why the memory search did not go above a size."""
    size, seconds = too_slow.batch_size, too_slow.step_seconds
    parameter = f"latency_limit={limit.seconds:g} seconds"
    if seconds is None:
        return f"at {size} at least half of the calls take longer than {parameter}"
    took = f"at {size} a step of its trial took {duration(seconds)}"
    if seconds > limit.seconds:
        return f"{took}, longer than {parameter}"
    return f"{took}, too long to be timed repeatedly"


def nothing_within(latencies: Sequence[Latency], limit: LatencyLimit) -> str:
    """Return the error for a limit that no size meets."""
    nothing = f"No batch size answers within {duration(limit.seconds)}"
    if not latencies:
        return f"{nothing}: none could be timed."
    row = min(latencies, key=lambda each: each.batch_size)
    smallest = f"a batch of {row.batch_size:,}, the smallest that was timed,"
    batch = "a single sample" if row.batch_size == 1 else smallest
    slowest = duration(row.at_percentile_seconds)
    at = f"at {_name(limit.percentile)}"
    if not calls_above(row.calls, limit.percentile):
        at = f"in the slowest of {counted(row.calls, 'call')}"
    return (
        f"{nothing}: {batch} takes {slowest} {at}, {duration(row.p50_seconds)} at the "
        "median. Raise latency_limit, lower percentile, or make the model faster."
    )


def latency_facts(answers: Answers, task: str) -> list[Fact]:
    """Return the facts about the chosen size; none if it was not timed."""
    row, latencies, limit = answers.row, answers.latencies, answers.limit
    if row is None:
        return []
    facts = [_latency_fact(answers, row), _speed_fact(latencies, row)]
    bend = answers.at(answers.knee)
    if bend is not None and bend.batch_size <= _KNEE_APART * answers.chosen:
        share = bend.samples_per_second / max(each.samples_per_second for each in latencies)
        sooner, later = (duration(each.at_percentile_seconds) for each in (bend, row))
        comment = f"{percent(share)} of the fastest, in {sooner} instead of {later}"
        facts.append(Fact("Knee", f"batches of {bend.batch_size:,}", comment))
    # Streams with one sample per limit: cameras, if that is the time of one frame
    rate = 1 / limit.seconds
    best = stream(latencies, rate, limit.seconds).best
    alone = f"; alone: batches of {best.batch_size:,}" if best else ""
    streams = f"{answers.chosen:,} at {trimmed(rate)} samples/s"
    facts.append(Fact("Streams", streams, f"a sample of each per batch{alone}"))
    timed = "with the copy to the device, without reading data"
    if task == "answer":
        timed = "with all that the workload does in a call"
    facts.append(Fact("Calls", f"{counted(row.calls, 'call')} timed", timed))
    return facts


def _latency_fact(answers: Answers, row: Latency) -> Fact:
    limit, over = answers.limit, answers.next_over
    median, top = (duration(each) for each in (row.p50_seconds, row.at_percentile_seconds))
    name = _name(limit.percentile) if calls_above(row.calls, limit.percentile) else "max"
    spare = duration(max(0.0, limit.seconds - row.at_percentile_seconds))
    comment = f"; {over.batch_size:,} is over the limit" if over else ""
    return Fact("Latency", f"{median}, {name} {top}", f"{spare} to spare{comment}")


def _speed_fact(latencies: Sequence[Latency], row: Latency) -> Fact:
    fastest = max(latencies, key=lambda each: each.samples_per_second)
    speed, highest = (rounded(each.samples_per_second) for each in (row, fastest))
    share = percent(row.samples_per_second / fastest.samples_per_second)
    comment = f"{share} of the fastest measured ({highest} at {fastest.batch_size:,})"
    if row == fastest:
        comment = f"the fastest of {len(latencies)} sizes timed" if len(latencies) > 1 else ""
    return Fact("Speed", f"{speed} samples/s", comment)


def latency_table(answers: Answers, peaks: Mapping[int, int | None]) -> Table:
    """Return the sizes that were timed, with percentiles, throughput and peak memory."""
    latencies, chosen, limit = answers.latencies, answers.chosen, answers.limit
    over = answers.next_over.batch_size if answers.next_over else chosen
    sizes = thinned([each.batch_size for each in latencies], {chosen, over, answers.knee})
    shown = [each for each in latencies if each.batch_size in sizes]
    fastest = max(each.samples_per_second for each in latencies)
    shares = [each.samples_per_second / fastest for each in shown]
    bars = [
        "over the limit" if answers.is_over(each) else bar(share)
        for each, share in zip(shown, shares, strict=True)
    ]
    return table_of(
        [
            counts("batch", [each.batch_size for each in shown]),
            *_percentiles(shown, limit.percentile),
            numbers("samples/s", [each.samples_per_second for each in shown]),
            Column("", bars, align="<"),
            Column("of fastest", [percent(share) for share in shares]),
            measures("peak {}", [peaks.get(each.batch_size) for each in shown], BYTES),
        ],
        chosen=[each.batch_size == chosen for each in shown],
        foot=_foot(shown, len(latencies) - len(shown), limit),
    )


def _percentiles(latencies: Sequence[Latency], percentile: float) -> list[Column]:
    """Return three columns in one unit, the percentile of the limit among them."""
    columns = {
        50.0: [each.p50_seconds for each in latencies],
        90.0: [each.p90_seconds for each in latencies],
        99.0: [each.p99_seconds for each in latencies],
    }
    if percentile not in columns:
        del columns[90.0]
        columns[percentile] = [each.at_percentile_seconds for each in latencies]
    unit = unit_for([each for column in columns.values() for each in column], SECONDS)
    return [
        numbers(f"{_name(each)} {unit.name}", [value / unit.factor for value in columns[each]])
        for each in sorted(columns)
    ]


def _foot(shown: Sequence[Latency], left_out: int, limit: LatencyLimit) -> str:
    """Return the number of calls of sizes with few, and of sizes that are not shown."""
    sentences, enough = [], enough_calls(limit.percentile)
    if few := [each for each in shown if each.calls < enough]:
        calls = ", ".join(f"{each.calls:,} at {each.batch_size:,}" for each in few)
        if len(few) > _LISTED:
            calls = f"fewer than {enough:,} at {len(few)} sizes"
        is_slowest = not any(calls_above(each.calls, limit.percentile) for each in few)
        slowest = f"; there {_name(limit.percentile)} is the slowest" if is_slowest else ""
        sentences.append(f"Calls: {calls}{slowest}")
    if left_out:
        sentences.append(f"{left_out} more timed; report.latencies has them all")
    return ". ".join(sentences)


def latency_notes(report: TuningReport, unfinished: Unfinished) -> tuple[str, ...]:
    """Return the notes about latency: waiting, sizes that were not timed, few calls, noise."""
    answers = Answers.of(report)
    if answers is None:
        return ()
    return (*_filling(answers), *_not_timed(answers, unfinished), *_disturbed(answers, unfinished))


def _filling(answers: Answers) -> Iterator[str]:
    """Note the time that a batch takes to fill, in a stream with one sample per limit."""
    chosen, rate = answers.chosen, 1 / answers.limit.seconds
    one = stream(answers.latencies, rate, None)
    row = next((row for row in one.rows if row.batch_size == chosen), None)
    if row is None or chosen == 1:
        return
    sooner = ""
    if one.best is not None and one.best.batch_size < chosen:
        soonest = duration(one.best.worst_seconds)
        sooner = f"; in batches of {one.best.batch_size:,} it is answered within {soonest}"
    yield (
        "Waiting for a batch to fill comes on top: one stream of "
        f"{trimmed(rate)} samples/s takes {duration(row.filling_seconds)} to fill {chosen:,}"
        f"{sooner}."
    )


def _not_timed(answers: Answers, unfinished: Unfinished) -> Iterator[str]:
    """Note sizes that were not timed, or by few calls."""
    row, percentile, over = answers.row, answers.limit.percentile, unfinished.over
    largest, enough = answers.largest_within, enough_calls(percentile)
    if unfinished.is_open and largest is not None:
        sizes = f"sizes above {largest:,}"
        if over is not None:
            sizes = f"sizes between {largest:,} and {over:,}"
        if unfinished.seconds is None:
            yield f"Not timed were {sizes}: they may answer in time too."
        else:
            after = f"after {unfinished.seconds:g} seconds, its limit"
            yield f"Timing stopped {after}: {sizes} may answer in time too."
    if row is not None and row.calls < enough:
        is_slowest = not calls_above(row.calls, percentile)
        slowest = f": {_name(percentile)} is the slowest of them"
        yield (
            f"There was no time for {enough:,} calls at {row.batch_size:,}, only for "
            f"{row.calls:,}{slowest if is_slowest else ''}."
        )
    if unfinished.left_out:
        sizes = listed(unfinished.left_out)
        yield (
            f"Smaller sizes were not timed ({sizes}): they may suit one stream better, or be as "
            "fast."
        )
    if over is not None and unfinished.by_trial:
        yield (
            f"Batches of {over:,} took longer than the limit in the few steps of their trial; "
            "their calls were not timed."
        )


def _disturbed(answers: Answers, unfinished: Unfinished) -> Iterator[str]:
    """Note calls that something else slowed down."""
    row, limit, over = answers.row, answers.limit, answers.next_over
    is_limited = unfinished.over is not None or over is not None  # the reason to stop at this size
    if row is not None and _is_noisy(row) and is_limited:
        yield (
            f"At {answers.chosen:,} {_name(limit.percentile)} is "
            f"{row.at_percentile_seconds / row.p50_seconds:,.0f} times the median, probably from "
            "noise: on a quiet machine larger batches may answer in time."
        )
    if over is not None and over.p50_seconds <= limit.seconds and _is_noisy(over):
        median, slow = duration(over.p50_seconds), duration(over.at_percentile_seconds)
        yield (
            f"Half of the calls at {over.batch_size:,} take no longer than {median}, and some "
            f"{slow}: on a quiet machine larger batches may answer in time."
        )
    largest = answers.largest_within or 0
    if smaller := [each.batch_size for each in answers.over if each.batch_size < largest]:
        yield (
            f"Batches of {listed(smaller)} are over the limit although larger ones meet it: "
            "noise, or slow kernels for these shapes."
        )


def _is_noisy(latency: Latency) -> bool:
    return latency.at_percentile_seconds >= _NOISY * latency.p50_seconds


def _name(percentile: float) -> str:
    return f"p{percentile:g}"
