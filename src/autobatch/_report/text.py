"""A report as text: header, facts and tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from autobatch._memory import format_bytes
from autobatch._report.latency import latency_facts, latency_table, percentile_told, within
from autobatch._report.layout import Fact, Page, Table
from autobatch._report.notes import accumulation_costs, tightest_bound, waiting
from autobatch._report.tables import (
    counted,
    data_fact,
    effective_table,
    epoch_fact,
    memory_fact,
    product,
    speed_fact,
    speed_table,
    spread,
    update_fact,
)
from autobatch._report.tradeoff import NoiseRange, is_of
from autobatch._report.units import SECONDS, aligned, percent, plain, quantity
from autobatch._throughput import latest_by_size

if TYPE_CHECKING:
    from autobatch._report import TuningReport
    from autobatch._report.notes import Bound
    from autobatch._settings import LatencyLimit

_FULL: Final = 0.95  # of the budget: a search for what fits does not end below


def completed(report: TuningReport) -> Page:
    """What training has added to a report that was shown when it began.

    The effective batches are shown again only where a noise scale has made something new of them.
    """
    is_new = NoiseRange.of(report.noise) is not None
    return Page(
        header=("autobatch", plain(report.subject), "what training showed"),
        answer="" if is_new else _trust(report),
        asked="",
        facts=(),
        tables=_effective(report) if is_new else (),
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
        f"{counted(len(report.trials))}{_timed(report)} in {took}",
    )
    return tuple(part for part in parts if part)


def _answer(report: TuningReport) -> str:
    if report.task == "train":
        return product(report.plan)
    ranks, limit = report.plan.world_size, report.settings.limit_on_latency
    share = f" on each of {ranks} ranks" if ranks > 1 else ""
    batches = f"Batches of {report.plan.micro_batch_size:,}{share}"
    if limit is None:
        return f"{batches} to {report.task}"
    if report.task == "answer":
        return f"{batches} answer {within(limit)}"
    return f"{batches} to {report.task}, {within(limit)}"


def _timed(report: TuningReport) -> str:
    sizes = len(report.curve or report.latencies)
    return f", {sizes} size{'s' if sizes > 1 else ''} timed" if sizes else ""


def _asked(report: TuningReport) -> str:
    target, got = report.settings.target_batch_size, report.plan.effective_batch_size
    limit = report.settings.limit_on_latency
    if limit is not None:
        return percentile_told(limit, report.latencies, report.plan.micro_batch_size)
    if target is None:
        return _among_sizes(report)
    if target == got:
        return f"asked for {target:,}, exact"
    off = f"{abs(got - target):,} {'more' if got > target else 'fewer'}"
    return f"asked for {target:,}, {off} ({percent(abs(got / target - 1))})"


def _among_sizes(report: TuningReport) -> str:
    """Where the chosen micro-batch stands among those that fit."""
    seen = {trial.batch_size for trial in report.trials}
    seen |= {point.batch_size for point in report.curve}
    seen |= {latency.batch_size for latency in report.latencies}
    if len(seen) == 1:
        return "the only size tried"
    largest, bound = report.largest_fit or 0, _bound(report)
    if (bound and largest >= bound.batch_size) or _is_cut_short(report, largest):
        return "larger sizes not sought"
    if largest == report.plan.micro_batch_size:
        return "the largest found to fit"
    return f"{largest:,} is the largest found to fit"


def _is_cut_short(report: TuningReport, size: int) -> bool:
    """Whether the search for what fits ended at a size for another reason than memory: what calls take there."""
    if report.settings.limit_on_latency is None or report.smallest_failing is not None:
        return False
    peaks = [t.peak or 0 for t in latest_by_size(report.trials) if t.batch_size == size]
    return max(peaks, default=0) < _FULL * report.budget


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
    trial = next((t for t in latest_by_size(report.trials) if t.batch_size == size), None)
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
    trial = next((t for t in latest_by_size(report.trials) if t.batch_size == size), None)
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
        peaks = {trial.batch_size: trial.peak for trial in latest_by_size(report.trials)}
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
        between = f"{report.noise.first_update:,}–{report.noise.last_update:,}"
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
            so_far = f", and was at least {known} so far" if known else ""
            why = f": {noise.reason}" if noise.reason else ""
            return f"Noise scale not settled{so_far}{why}."
        case "at_least":
            batch = f" of {noise.batch_size:,}" if noise.batch_size else ""
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
