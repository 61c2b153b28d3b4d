"""Facts, table and notes of a report about inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from autobatch._latency import enough_calls, knee, largest_within, stream, tells_percentile
from autobatch._report.layout import Column, Fact
from autobatch._report.tables import bar, measures, numbers, table_of
from autobatch._report.units import BYTES, SECONDS, aligned, percent, quantity, unit_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autobatch._latency import Latency, LatencyLimit, Unfinished
    from autobatch._report.layout import Table

_SIZES: Final = 12  # rows of the table: the whole report is one screen
_SIZES_TOLD: Final = 6  # one by one, how many calls each had
_ALWAYS: Final = (50, 90, 99)  # percentiles that are shown
# What was timed: at most 51 characters, for one line of the page
_IN_A_CALL: Final = "with all that the workload does in a call"
_IN_A_STEP: Final = "with the copy to the device, without reading data"
_DISTURBED: Final = 3  # times the median, which a workload alone seldom takes
# Of the chosen size: a knee closer to it is of no interest
_SMALLER: Final = 2 / 3


def within(limit: LatencyLimit) -> str:
    """The limit, as an answer says it."""
    return f"within {quantity(limit.seconds, SECONDS)}"


def percentile_told(limit: LatencyLimit, latencies: Sequence[Latency], chosen: int) -> str:
    """How many of the calls are to meet it; of few calls, that those have."""
    here = _row(latencies, chosen)
    if here is not None and not tells_percentile(here.calls, limit.percentile):
        return f"{_calls(here.calls)} timed, asked for {limit.percentile:g} %"
    if limit.percentile >= 100:  # noqa: PLR2004 -- all of them
        return "every call that was timed"
    return f"{limit.percentile:g} % of calls"


def _row(latencies: Sequence[Latency], size: int) -> Latency | None:
    return next((each for each in latencies if each.batch_size == size), None)


def _calls(count: int) -> str:
    return f"{count:,} call{'s' if count > 1 else ''}"


def nothing_within(latencies: Sequence[Latency], limit: LatencyLimit) -> str:
    """What was measured where no size meets the limit, and the way out."""
    told = f"No batch size answers {within(limit)}"
    if not latencies:
        return f"{told}: none could be timed."
    least = min(latencies, key=lambda each: each.batch_size)
    samples = (
        "a single sample"
        if least.batch_size == 1
        else f"a batch of {least.batch_size:,}, the smallest that was timed,"
    )
    took = quantity(least.at_percentile_seconds, SECONDS)
    middle = quantity(least.p50_seconds, SECONDS)
    at = f"at the {_ordinal(limit.percentile)} percentile"
    if not tells_percentile(least.calls, limit.percentile):
        at = f"in the slowest of {_calls(least.calls)}"
    return (
        f"{told}: {samples} takes {took} {at}, {middle} at the median. "
        "Raise latency_limit, lower percentile, or make the model faster."
    )


def latency_facts(
    latencies: Sequence[Latency], limit: LatencyLimit, chosen: int, task: str
) -> list[Fact]:
    """What the chosen size means; nothing where it was not timed."""
    here = _row(latencies, chosen)
    if here is None:
        return []
    facts = [_latency_fact(latencies, here, limit), _speed_fact(latencies, here)]
    bend = knee(latencies)
    if bend is not None and bend.batch_size <= _SMALLER * chosen:
        facts.append(_knee_fact(latencies, bend, here))
    facts.append(_streams_fact(latencies, here, limit))
    many = f"{_calls(here.calls)} timed"
    facts.append(Fact("Calls", many, _IN_A_CALL if task == "answer" else _IN_A_STEP))
    return facts


def _latency_fact(latencies: Sequence[Latency], here: Latency, limit: LatencyLimit) -> Fact:
    middle = quantity(here.p50_seconds, SECONDS)
    top = quantity(here.at_percentile_seconds, SECONDS)
    name = _name(limit.percentile)
    if not tells_percentile(here.calls, limit.percentile):
        name = "max"
    over = min(
        (e.batch_size for e in latencies if e.batch_size > here.batch_size),
        default=None,
    )
    spare = f"{quantity(max(0.0, limit.seconds - here.at_percentile_seconds), SECONDS)} to spare"
    return Fact(
        "Latency",
        f"{middle}, {name} {top}",
        f"{spare}; {over:,} is over the limit" if over else spare,
    )


def _speed_fact(latencies: Sequence[Latency], here: Latency) -> Fact:
    fastest = max(latencies, key=lambda each: each.samples_per_second)
    speed, most = (aligned([e.samples_per_second])[0] for e in (here, fastest))
    share = percent(here.samples_per_second / fastest.samples_per_second)
    remark = f"{share} of the fastest measured ({most} at {fastest.batch_size:,})"
    if here == fastest:
        many = len(latencies)
        remark = f"the fastest of {many} sizes timed" if many > 1 else ""
    return Fact("Speed", f"{speed} samples/s", remark)


def _knee_fact(latencies: Sequence[Latency], bend: Latency, here: Latency) -> Fact:
    most = max(each.samples_per_second for each in latencies)
    sooner, later = (quantity(each.at_percentile_seconds, SECONDS) for each in (bend, here))
    return Fact(
        "Knee",
        f"batches of {bend.batch_size:,}",
        f"{percent(bend.samples_per_second / most)} of the fastest, in {sooner} instead of {later}",
    )


def _streams_fact(latencies: Sequence[Latency], here: Latency, limit: LatencyLimit) -> Fact:
    """Streams with a sample in each span of the limit: cameras, where that is one frame."""
    rate = 1 / limit.seconds
    best = stream(latencies, rate, None).best
    alone = f"; alone: batches of {best.batch_size:,}" if best else ""
    return Fact(
        "Streams",
        f"{here.batch_size:,} at {_rounded(rate)} samples/s",
        f"a sample of each per batch{alone}",
    )


def latency_table(
    latencies: Sequence[Latency],
    limit: LatencyLimit,
    chosen: int,
    peaks: Mapping[int, int | None],
) -> Table:
    """The sizes that were timed, with what was measured."""
    shown = _thinned(latencies, limit, chosen)
    most = max(each.samples_per_second for each in latencies)
    shares = [each.samples_per_second / most for each in shown]
    over = [each.at_percentile_seconds > limit.seconds for each in shown]
    return table_of(
        [
            Column("batch", tuple(f"{each.batch_size:,}" for each in shown)),
            *_quantiles(shown, limit.percentile),
            numbers("samples/s", [each.samples_per_second for each in shown]),
            Column(
                "",
                tuple(
                    "over the limit" if slow else bar(share)
                    for share, slow in zip(shares, over, strict=True)
                ),
                align="<",
            ),
            Column("of fastest", tuple(map(percent, shares))),
            measures("peak {}", [peaks.get(each.batch_size) for each in shown], BYTES),
        ],
        chosen=[each.batch_size == chosen for each in shown],
        foot=_foot(latencies, shown, limit),
    )


def _foot(latencies: Sequence[Latency], shown: Sequence[Latency], limit: LatencyLimit) -> str:
    told = [_counts(shown, limit)]
    if len(shown) < len(latencies):
        told.append(f"{len(latencies) - len(shown)} more timed; report.latencies has them all")
    return ". ".join(each for each in told if each)


def _counts(shown: Sequence[Latency], limit: LatencyLimit) -> str:
    """How many calls stand behind the sizes with few, and what that does to the percentiles."""
    few = [each for each in shown if each.calls < enough_calls(limit.percentile)]
    if not few:
        return ""
    blind = [e for e in few if not tells_percentile(e.calls, limit.percentile)]
    what = f"; there {_name(limit.percentile)} is the slowest" if blind == few else ""
    return f"Timed: {_by_count(few)}{what}"


def _by_count(latencies: Sequence[Latency]) -> str:
    """Calls and their sizes, "2 calls at 16; 1 call at 1, 2"; of many, between what and what."""
    sizes: dict[int, list[str]] = {}
    for each in latencies:
        sizes.setdefault(each.calls, []).append(str(each.batch_size))
    if len(latencies) > _SIZES_TOLD:
        least, most = min(sizes), max(sizes)
        between = _calls(most) if least == most else f"{least:,} to {_calls(most)}"
        return f"{between} at {len(latencies)} sizes"
    return "; ".join(f"{_calls(n)} at {', '.join(each)}" for n, each in sizes.items())


def _quantiles(latencies: Sequence[Latency], percentile: float) -> list[Column]:
    """Three columns in one unit, that of the percentile that was asked for among them."""
    columns = {
        50.0: [each.p50_seconds for each in latencies],
        90.0: [each.p90_seconds for each in latencies],
        99.0: [each.p99_seconds for each in latencies],
    }
    if percentile not in _ALWAYS:
        del columns[90.0]
        columns[percentile] = [each.at_percentile_seconds for each in latencies]
    unit = unit_for([each for column in columns.values() for each in column], SECONDS)
    return [
        numbers(
            f"{_name(percent)} {unit.name}",
            [value / unit.factor for value in columns[percent]],
        )
        for percent in sorted(columns)
    ]


def _thinned(latencies: Sequence[Latency], limit: LatencyLimit, chosen: int) -> list[Latency]:
    """A screenful: without the sizes closest to their neighbours."""
    shown = list(latencies)
    over = (e for e in shown if e.at_percentile_seconds > limit.seconds)
    above = next((each for each in over if each.batch_size > chosen), None)
    keep = {chosen, *(e.batch_size for e in (above, knee(latencies)) if e)}
    while len(shown) > _SIZES:
        spare = [
            (after.batch_size / before.batch_size, each.batch_size, each)
            for before, each, after in zip(shown, shown[1:], shown[2:], strict=False)
            if each.batch_size not in keep
        ]
        shown.remove(min(spare)[-1])
    return shown


# What a person should know


def latency_notes(
    latencies: Sequence[Latency],
    limit: LatencyLimit,
    chosen: int,
    unfinished: Unfinished,
) -> tuple[str, ...]:
    """All that there is to say of it."""
    told = (
        _filling(latencies, limit, chosen),
        _open(chosen, unfinished),
        _few_calls(latencies, limit, chosen),
        _left_out(unfinished),
        _over_by_trial(unfinished),
        _disturbed(latencies, limit, chosen, unfinished),
        _disturbed_above(latencies, limit, chosen),
        _not_monotone(latencies, limit),
    )
    return tuple(note for note in told if note)


def _filling(latencies: Sequence[Latency], limit: LatencyLimit, chosen: int) -> str | None:
    rate = 1 / limit.seconds
    one = stream(latencies, rate, None)
    row = next((row for row in one.rows if row.batch_size == chosen), None)
    if row is None or chosen == 1:
        return None
    filling = quantity(row.filling_seconds, SECONDS)
    told = (
        f"Waiting for a batch to fill comes on top: one stream of {_rounded(rate)} samples/s takes {filling} to fill "
        f"{chosen:,}"
    )
    if one.best is None or one.best.batch_size >= chosen:
        return f"{told}."
    soonest = quantity(one.best.worst_seconds, SECONDS)
    return f"{told}; in batches of {one.best.batch_size:,} it is answered within {soonest}."


def _open(chosen: int, unfinished: Unfinished) -> str | None:
    """Where a larger size may be in time as well, and was not asked."""
    if not unfinished.is_open:
        return None
    where = f"sizes above {chosen:,}"
    if unfinished.over == chosen + 2:
        where = f"batches of {chosen + 1:,}"
    elif unfinished.over is not None:
        where = f"sizes between {chosen:,} and {unfinished.over:,}"
    if unfinished.seconds is None:
        return f"Not timed were {where}: they may answer in time too."
    return (
        f"Timing stopped after {unfinished.seconds:g} seconds, all that it may take: {where} may answer in time "
        "too."
    )


def _few_calls(latencies: Sequence[Latency], limit: LatencyLimit, chosen: int) -> str | None:
    enough = enough_calls(limit.percentile)
    here = _row(latencies, chosen)
    if here is None or here.calls >= enough:
        return None
    told = f"There was no time for {enough:,} calls at {chosen:,}, only for {here.calls:,}"
    if tells_percentile(here.calls, limit.percentile):
        return f"{told}."
    return f"{told}: what stands for the {_ordinal(limit.percentile)} percentile is the slowest of them."


def _left_out(unfinished: Unfinished) -> str | None:
    if not unfinished.left_out:
        return None
    sizes = ", ".join(f"{size:,}" for size in unfinished.left_out)
    return f"Smaller sizes that were not timed, {sizes}, may suit a single stream better, or be as fast."


def _over_by_trial(unfinished: Unfinished) -> str | None:
    if unfinished.over is None or not unfinished.by_trial:
        return None
    return f"{unfinished.over:,} took longer than the limit in the few steps of its trial; its calls were not timed."


def _disturbed(
    latencies: Sequence[Latency],
    limit: LatencyLimit,
    chosen: int,
    unfinished: Unfinished,
) -> str | None:
    """Where few calls take much longer than the others, and a larger size was over the limit."""
    here = _row(latencies, chosen)
    if here is None or here.at_percentile_seconds < _DISTURBED * here.p50_seconds:
        return None
    slower = (e.at_percentile_seconds for e in latencies if e.batch_size > chosen)
    if unfinished.over is None and all(taken <= limit.seconds for taken in slower):
        return None  # something else than the limit ends it here
    times = here.at_percentile_seconds / here.p50_seconds
    return (
        f"At {chosen:,} the {_ordinal(limit.percentile)} percentile is {times:,.0f} times the median: something disturbs "
        "the calls, on a quiet machine larger batches may answer in time."
    )


def _disturbed_above(latencies: Sequence[Latency], limit: LatencyLimit, chosen: int) -> str | None:
    """Where the next size is over the limit by some of its calls only, far from the others."""
    above = [each for each in latencies if each.batch_size > chosen]
    over = min(above, key=lambda each: each.batch_size, default=None)
    if over is None or over.p50_seconds > limit.seconds:
        return None
    if over.at_percentile_seconds < _DISTURBED * over.p50_seconds:
        return None
    return (
        f"Half of the calls at {over.batch_size:,} take no longer than {quantity(over.p50_seconds, SECONDS)}, and some "
        f"{quantity(over.at_percentile_seconds, SECONDS)}: on a quiet machine larger batches may answer in time."
    )


def _not_monotone(latencies: Sequence[Latency], limit: LatencyLimit) -> str | None:
    """A smaller size over the limit that a larger one meets: slow by itself, or disturbed."""
    best = largest_within(latencies, limit.seconds)
    odd = [
        f"{each.batch_size:,}"
        for each in latencies
        if best and each.batch_size < best.batch_size and each.at_percentile_seconds > limit.seconds
    ]
    if not odd:
        return None
    return (
        f"Batches of {', '.join(odd)} are over the limit though larger ones meet it: the machine was disturbed, or has "
        "a slow way with these sizes."
    )


def _rounded(rate: float) -> str:
    """A rate to three digits, "30": that of a limit is seldom round."""
    value = float(f"{rate:.3g}")
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"  # noqa: PLR2004 -- no exponent


def _name(percentile: float) -> str:
    return f"p{percentile:g}"


def _ordinal(percentile: float) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    whole = percentile == int(percentile) and int(percentile) // 10 != 1
    last = int(percentile) % 10 if whole else 0
    return f"{percentile:g}{endings.get(last, 'th')}"
