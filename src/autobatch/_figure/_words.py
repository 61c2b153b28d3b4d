"""What a picture says around its panels: the answer above, and below what it was measured with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from autobatch._figure._cost import comparable
from autobatch._figure._labels import drawn, short
from autobatch._page import page
from autobatch._tradeoff import NoiseRange

if TYPE_CHECKING:
    from autobatch._report import TuningReport
    from autobatch._text import Fact

__all__ = [
    "answer",
    "foot",
    "inference_foot",
    "inference_remark",
    "remark",
]

_NAME_WIDTH: Final = 60
_TOGETHER: Final = "\N{NO-BREAK SPACE}"


def answer(report: TuningReport) -> str:
    """What was chosen."""
    plan = report.plan
    size, ranks = f"{plan.micro_batch_size:,}", plan.world_size
    if report.task != "train":
        return page(report).answer
    parts = [f"Micro-batch {size}"]
    if plan.accumulate_grad_batches > 1:
        parts.append(f"accumulate {plan.accumulate_grad_batches:,}")
    if ranks > 1:
        parts.append(f"{ranks:,} ranks")
    if len(parts) == 1:
        return f"Micro-batch {size}, one per update"
    return f"{', '.join(parts)}: {plan.effective_batch_size:,} samples per update"


def remark(report: TuningReport) -> str:
    """What it comes to: speed, memory, an epoch."""
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
        by_trial = [str(row.batch_size) for row in report.sizes if row.updates is None]
        if by_trial:
            how = f"{how[:-1]}; at {', '.join(by_trial)} of the steps of a trial alone."
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


def inference_remark(report: TuningReport) -> str:
    """What stands below it: how long, how many, how much memory; and which smaller batch does about as well."""
    facts = {fact.label: fact for fact in page(report).facts}
    said = [
        facts[name].value for name in ("Latency", "Speed", "Memory") if name in facts
    ]
    if "Knee" in facts:
        said.append(f"{facts['Knee'].value} give {facts['Knee'].remark}")
    return "  ·  ".join(said)


def inference_foot(report: TuningReport) -> list[str]:
    """How it was measured, and on what."""
    calls = [row.calls for row in report.latencies]
    least, most = min(calls), max(calls)
    many = f"{least:,}" if least == most else f"{least:,}–{most:,}"
    facts = {fact.label: fact for fact in page(report).facts}
    what = f", {facts['Calls'].remark}" if "Calls" in facts else ""
    said = (
        f"{many} timed calls of each size{what}; left out are the first of each turn, of quick calls the first two, "
        "and those that start the workload anew. Throughput: by the median call. "
        "Waiting for a batch to fill is not included."
    )
    return [said, _on_what(report)]
