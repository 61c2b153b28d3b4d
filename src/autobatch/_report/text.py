"""Content of a report: header, answer, facts, tables and notes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from autobatch._memory import format_bytes
from autobatch._report.accumulation_notes import accumulation_costs
from autobatch._report.latency import Answers, latency_facts, latency_table, percentile_comment
from autobatch._report.layout import Fact, Page
from autobatch._report.notes import survived, waiting
from autobatch._report.tables import effective_table, product, speed_table, spread
from autobatch._report.tradeoff import NoiseRange, is_of
from autobatch._report.units import counted, duration, percent, plain, rounded
from autobatch._settings import tightest_bound
from autobatch._throughput import row_of
from autobatch._trials import latest_by_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._report import TuningReport
    from autobatch._report.layout import Table
    from autobatch._report.tradeoff import EffectiveRow
    from autobatch._throughput import SpeedRow

# Share of the budget: a search that only memory ends uses more
_FULL: Final = 0.95


def page(report: TuningReport) -> Page:
    """Return the content of a report, which every sink shows."""
    return Page(
        header=_header(report),
        answer=_answer(report),
        comment=_comment(report),
        facts=_facts(report),
        tables=_tables(report),
        notes=tuple(map(plain, (*_notes_since_training(report), *report.notes))),
    )


def completed(report: TuningReport) -> Page:
    """Return the content that training has added to a report shown at its beginning.

    Effective batches are shown again only if a noise scale was measured.
    """
    is_compared = NoiseRange.of(report.noise) is not None
    return Page(
        header=("autobatch", plain(report.subject), "what training showed"),
        answer="" if is_compared else trust(report),
        comment="",
        facts=(),
        tables=_effective(report) if is_compared else (),
        notes=tuple(map(plain, _notes_since_training(report))),
    )


def resumed(report: TuningReport) -> str:
    """Return the line of a run that goes on with a plan, which one trial has verified."""
    took = duration(report.search_seconds)
    return f"autobatch · {product(report.plan)} · resumed, verified by one trial in {took}"


def _header(report: TuningReport) -> tuple[str, ...]:
    number, device = report.devices or report.plan.world_size, report.device
    not_run = f", not run on {number} devices" if report.as_if else ""
    timed = len(report.curve or report.latencies)
    done = counted(len(report.trials), "trial")
    if timed:
        done += f", {counted(timed, 'size')} timed"
    parts = (
        "autobatch",
        plain(report.subject),
        f"{number} × {plain(device.name)} {format_bytes(device.total)}{not_run}",
        f"{done} in {duration(report.search_seconds)}",
        _parts_of_time(report),
    )
    return tuple(part for part in parts if part)


def _parts_of_time(report: TuningReport) -> str:
    timing, validation = report.timing_seconds or 0.0, report.validation_seconds or 0.0
    search = max(0.0, report.search_seconds - timing - validation)
    parts = {"search": search, "timing": timing, "validation": validation}
    texts = [f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds]
    return ", ".join(texts) if len(texts) > 1 else ""


def _answer(report: TuningReport) -> str:
    if report.task == "train":
        return product(report.plan)
    ranks, limit = report.plan.world_size, report.settings.limit_on_latency
    share = f" on each of {ranks} ranks" if ranks > 1 else ""
    batches = f"Batches of {report.plan.micro_batch_size:,}{share}"
    within = f"within {duration(limit.seconds)}" if limit else ""
    if limit and report.task == "answer":
        return f"{batches} answer {within}"
    return f"{batches} to {report.task}{f', {within}' if limit else ''}"


def _comment(report: TuningReport) -> str:
    target, got = report.settings.target_batch_size, report.plan.effective_batch_size
    if answers := Answers.of(report):
        return percentile_comment(answers)
    if target is None:
        return _among_sizes(report)
    if target == got:
        return f"asked for {target:,}, exact"
    off = f"{abs(got - target):,} {'more' if got > target else 'fewer'}"
    return f"asked for {target:,}, {off} ({percent(abs(got / target - 1))})"


def _among_sizes(report: TuningReport) -> str:
    """Compare the chosen micro-batch with the others that fit."""
    sizes = {trial.batch_size for trial in report.trials}
    sizes |= {point.batch_size for point in report.curve}
    sizes |= {latency.batch_size for latency in report.latencies}
    if len(sizes) == 1:
        return "the only size tried"
    largest, settings = report.largest_fit or 0, report.settings
    bound = tightest_bound(settings, report.plan.world_size)
    is_at_bound = bound is not None and largest >= bound.batch_size
    is_largest = largest == report.plan.micro_batch_size
    if is_at_bound and not is_largest and settings.target_batch_size is None:
        return f"{largest:,} fits too; larger sizes not sought"
    if is_at_bound or _is_ended_by_latency(report, largest):
        return "larger sizes not sought"
    return "the largest found to fit" if is_largest else f"{largest:,} is the largest found to fit"


def _is_ended_by_latency(report: TuningReport, largest: int) -> bool:
    """Return True if the latency of the largest size ended the search, and not memory."""
    if report.settings.limit_on_latency is None or report.smallest_failing is not None:
        return False
    trial = latest_by_size(report.trials).get(largest)
    return ((trial and trial.peak) or 0) < _FULL * report.budget


# Facts


def _facts(report: TuningReport) -> tuple[Fact, ...]:
    answers = Answers.of(report)
    if answers and answers.latencies:
        facts = (*latency_facts(answers, report.task), _memory(report), _data(report))
    else:
        row = next((row for row in report.effective if is_of(row, report.plan)), None)
        per_update = (_update(report, row), _epoch(row)) if row else ()
        guide = Fact("Search", plain(report.guide), "") if report.guide else None
        facts = (_speed(report), _memory(report), *per_update, _data(report), guide)
    return tuple(fact for fact in facts if fact)


def _speed(report: TuningReport) -> Fact | None:
    rows = report.sizes
    row = row_of(rows, report.plan.micro_batch_size)
    if row is None:
        return None
    value = f"{rounded(row.samples_per_second)} samples/s"
    low, high = row.samples_per_second_low, row.samples_per_second_high
    if low is not None and high is not None:
        share = (high - low) / 2 / row.samples_per_second
        value += f" ±{percent(share)}" if share < 1 else f", {rounded(low)} to {rounded(high)}"
    fastest = max(rows, key=lambda other: other.of_fastest)
    if row == fastest:
        return Fact("Speed", value, _fastest_of(row, rows))
    there = f"{rounded(fastest.samples_per_second)} at {fastest.batch_size:,}"
    return Fact("Speed", value, f"{percent(row.of_fastest)} of the fastest measured ({there})")


def _fastest_of(row: SpeedRow, rows: Sequence[SpeedRow]) -> str:
    timed = [each for each in rows if each.updates is not None]
    if len(rows) == 1:
        return "" if timed else "by one trial, a few steps"
    if not timed:
        return f"the fastest of {len(rows)} sizes, by one trial each"
    if row not in timed:
        return f"by its trial alone; {len(timed)} others were timed"
    by_trial = f", {len(rows) - len(timed)} by trial" if len(timed) < len(rows) else ""
    return f"the fastest of {len(timed)} sizes timed{by_trial}"


def _memory(report: TuningReport) -> Fact | None:
    trial = latest_by_size(report.trials).get(report.plan.micro_batch_size)
    if trial is None or trial.peak is None:
        return None
    budget = format_bytes(report.budget)
    used = format_bytes(trial.peak).removesuffix(f" {budget.split()[-1]}")
    comment = f"{format_bytes(report.budget - trial.peak)} to spare"
    place = _among_sizes(report)
    if place != _comment(report):
        comment += f"; {place}"
    return Fact("Memory", f"{used} of {budget}", comment)


def _update(report: TuningReport, row: EffectiveRow) -> Fact | None:
    trial = latest_by_size(report.trials).get(row.micro_batch_size)
    if trial is None or not row.update_seconds:
        return None
    optimizer = trial.optimizer_seconds
    comment = f"optimizer {percent(optimizer / row.update_seconds)} of it" if optimizer else ""
    return Fact("Update", duration(row.update_seconds), comment)


def _epoch(row: EffectiveRow) -> Fact | None:
    if not row.updates_per_epoch:
        return None
    took = f"{duration(row.epoch_seconds)} in training steps" if row.epoch_seconds else ""
    return Fact("Epoch", counted(row.updates_per_epoch, "update"), took)


def _data(report: TuningReport) -> Fact | None:
    look = report.look
    if look is None:
        return None
    comment = "all of one size" if look.is_even else "trials ran the largest"
    if look.among is not None and look.read < look.among:
        comment = f"of {look.among:,}; {comment}"
    return Fact("Data", f"{counted(look.read, 'sample')} read", comment)


# Tables


def _tables(report: TuningReport) -> tuple[Table, ...]:
    answers = Answers.of(report)
    if answers and answers.latencies:
        latest = latest_by_size(report.trials)
        return (latency_table(answers, {size: each.peak for size, each in latest.items()}),)
    if not report.trials:
        return _effective(report)
    return (speed_table(report.trials, report.sizes, report.plan), *_effective(report))


def _effective(report: TuningReport) -> tuple[Table, ...]:
    rows, noise, rule = report.effective, report.noise, report.learning_rate
    is_timed = any(row.update_seconds for row in rows)
    if not rows or not (report.dataset_size or is_timed):
        return ()
    title = "Effective batch"
    if noise and (scale := NoiseRange.of(noise)):
        title += (
            f", compared with {report.plan.effective_batch_size:,}; "
            f"noise scale {rounded(scale.samples)}, "
            f"updates {noise.first_update:,}–{noise.last_update:,}"
        )
    elif report.dataset_size:
        title += f", over an epoch of {report.dataset_size:,} samples"
    of_rates = f"LR: {plain(rule.optimizer)}'s {rule.rule} rule, not applied." if rule else ""
    foot = " ".join(filter(None, (trust(report), of_rates)))
    return (effective_table(rows, report.plan, title=title, foot=foot),)


def trust(report: TuningReport) -> str:
    """Return how far to trust the times to the same loss, or why there are none."""
    noise = report.noise
    if noise is None:
        return ""
    known = rounded(noise.samples) if noise.samples else ""
    match noise.state:
        case "ok":
            return (
                f"{_likely(report)}Estimates, right within about 4×: they compare batch sizes "
                "and do not predict run times."
            )
        case "settling":
            so_far = f"; at least {known} so far" if known else ""
            why = f": {plain(noise.reason)}" if noise.reason else ""
            return f"Noise scale not settled{so_far}{why}."
        case "at_least":
            batch = f" of {noise.batch_size:,}" if noise.batch_size else ""
            return f"Noise scale at least {known}: updates{batch} are too small to measure more."
        case _:
            return f"Noise scale not measured: {plain(noise.reason or '')}."


def _likely(report: TuningReport) -> str:
    """Return the effective batch with the shortest time to the same loss, if not the plan's."""
    rows = [row for row in report.effective if row.relative_time is not None]
    best = min(rows, key=lambda row: row.relative_time or math.inf, default=None)
    if best is None or is_of(best, report.plan):
        return ""
    return (
        f"{best.effective_batch_size:,} per update would likely take {spread(best)} the time "
        "to the same loss, with the learning rate retuned. "
    )


def _notes_since_training(report: TuningReport) -> tuple[str, ...]:
    best, pace = report.optimum, report.pace
    update_seconds = pace.update(report.plan.micro_batch_size, 1)
    notes = [waiting(report.loading), survived(report.survived, report.plan)]
    if best and update_seconds:
        share = pace.optimizer_seconds / update_seconds
        notes.append(accumulation_costs(report.plan, best.accumulate_grad_batches, share))
    return tuple(note for note in notes if note)
