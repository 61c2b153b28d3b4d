"""What a picture says around its panels: the answer above, and below what it was measured with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from autobatch._figure._calls import latency_limit, within_limit
from autobatch._figure._cost import comparable
from autobatch._figure._labels import drawn, short
from autobatch._numbers import SECONDS, percent, quantity
from autobatch._report import page
from autobatch._tradeoff import NoiseRange

if TYPE_CHECKING:
    from autobatch._latency import Latency
    from autobatch._report import TuningReport
    from autobatch._text import Fact

__all__ = [
    "answer",
    "foot",
    "inference_answer",
    "inference_foot",
    "inference_remark",
    "remark",
]

_KNEE: Final = 0.95  # of the fastest
_NAME_WIDTH: Final = 60
_TOGETHER: Final = "\N{NO-BREAK SPACE}"


def answer(report: TuningReport) -> str:
    plan = report.plan
    size, ranks = f"{plan.micro_batch_size:,}", plan.world_size
    if report.task != "train":
        share = f" on each of {ranks} ranks" if ranks > 1 else ""
        return f"Batches of {size}{share} to {report.task}"
    parts = [f"Micro-batch {size}"]
    if plan.accumulate_grad_batches > 1:
        parts.append(f"accumulate {plan.accumulate_grad_batches:,}")
    if ranks > 1:
        parts.append(f"{ranks:,} ranks")
    if len(parts) == 1:
        return f"Micro-batch {size}, one per update"
    return f"{', '.join(parts)}: {plan.effective_batch_size:,} samples per update"


def remark(report: TuningReport) -> str:
    facts = {fact.label: fact for fact in page(report).facts}
    said = [facts[name].value for name in ("Speed", "Memory") if name in facts]
    if "Epoch" in facts:
        said.append(_epoch_said(facts["Epoch"]))
    return "  ·  ".join(said)


def _epoch_said(epoch: Fact) -> str:
    return f"{epoch.value} per epoch" + (f", {epoch.remark}" if epoch.remark else "")


def foot(report: TuningReport) -> list[str]:
    """How it was measured and what is estimated; and on what."""
    said = (_measured(report), _loss_said(report), _rule_said(report))
    return [" ".join(text for text in said if text), _on_what(report)]


def _measured(report: TuningReport) -> str:
    if not report.sizes:
        return ""
    timed = [row.updates for row in report.sizes if row.updates is not None]
    steps = report.settings.steps_per_trial
    how = f"Speed: median step of a trial of {steps} optimizer step{'s' if steps > 1 else ''}."
    if timed:
        least, most = min(timed), max(timed)
        count = f"{least}" if least == most else f"{least}–{most}"
        how = f"Speed: median of {count} timed updates of each size, bars 10–90 %."
    if report.fit is not None:
        how += " Line: a fixed time for each step, plus a time for each sample."
    return how


def _loss_said(report: TuningReport) -> str:
    """What the right panel rests on, or why it says nothing about the loss."""
    noise = report.noise
    if report.task != "train":
        return ""
    if noise is not None and comparable(report):
        scale = NoiseRange.of(noise)
        band = f"{short(scale.low)}–{short(scale.high)}" if scale else ""
        return (
            f"Time to the same loss: estimated from a gradient noise scale of about {short(noise.samples or 0)} "
            f"(updates {noise.first_update:,}–{noise.last_update:,}); band: for one of {band}. "
            "Assumes that the learning rate is retuned. "
            "Estimates: they compare batch sizes, and do not predict how long a run takes."
        )
    return f"Time to the same loss: not estimated; {_no_noise(report)}."


def _rule_said(report: TuningReport) -> str:
    rule = report.learning_rate
    if rule is None or not report.effective:
        return ""
    return f"LR: by the {rule.rule} rule, usual for {_cut(drawn(rule.optimizer))}."


def _no_noise(report: TuningReport) -> str:
    noise = report.noise
    if noise is None:
        return "no gradient noise scale was measured"
    match noise.state:
        case "settling":
            return "the gradient noise scale had not settled yet, and still rises in the first updates"
        case "at_least":
            least = short(noise.samples or 0)
            return f"the gradient noise scale is at least {least}, and these batches are too small to measure more"
        case "unavailable":
            why = f": {drawn(noise.reason).rstrip('.')}" if noise.reason else ""
            return f"the gradient noise scale could not be measured{why}"
        case "ok":
            return "no size was timed"


def _on_what(report: TuningReport) -> str:
    header = [_cut(drawn(part)) for part in page(report).header[1:]]
    versions = [
        _cut(drawn(f"{name} {number}")).replace(" ", _TOGETHER)
        for name, number in report.environment.items()
    ]
    return "Measured on " + " · ".join([*header, *versions])


def _cut(text: str) -> str:
    return text if len(text) <= _NAME_WIDTH else text[: _NAME_WIDTH - 1] + "…"


def inference_answer(report: TuningReport) -> str:
    size, limit = report.plan.micro_batch_size, latency_limit(report)
    row = _latency_of(report, size)
    if limit is not None and row in within_limit(report):
        largest = max(row.batch_size for row in within_limit(report))
        place = "the largest that answers" if size == largest else "answers"
        verb = "is " if size == largest else ""
        return f"Batch {size:,} {verb}{place} within {quantity(limit, SECONDS)}"
    if limit is not None:
        return f"No batch size answers within {quantity(limit, SECONDS)}"
    if row is not None and row.p50:
        return f"Batch {size:,}: {short(size / row.p50)} samples per second"
    return f"Batches of {size:,} to {report.task}"


def _latency_of(report: TuningReport, size: int) -> Latency | None:
    return next((row for row in report.latencies if row.batch_size == size), None)


def inference_remark(report: TuningReport) -> str:
    rows = sorted(report.latencies, key=lambda row: row.batch_size)
    speeds = {row: row.batch_size / row.p50 for row in rows if row.p50}
    said = []
    if speeds:
        peak = max(speeds.values())
        knee = next(row for row in rows if speeds.get(row, 0.0) >= _KNEE * peak)
        took = quantity(knee.at_percentile, SECONDS)
        share = percent(speeds[knee] / peak)
        said.append(
            f"Batch {knee.batch_size:,} already gives {share} of the highest throughput, at {took}"
            if speeds[knee] < peak
            else f"The highest throughput is at batch {knee.batch_size:,}, at {took}"
        )
    if rows[0].batch_size == 1:
        said.append(f"one sample alone: {quantity(rows[0].at_percentile, SECONDS)}")
    return "  ·  ".join(said)


def inference_foot(report: TuningReport) -> list[str]:
    calls = [row.calls for row in report.latencies]
    least, most = min(calls), max(calls)
    count = f"{least:,}" if least == most else f"{least:,}–{most:,}"
    return [
        (
            f"{count} timed calls of each size, none left out. Throughput: by the median call. "
            "Waiting for a batch to fill is not included."
        ),
        _on_what(report),
    ]
