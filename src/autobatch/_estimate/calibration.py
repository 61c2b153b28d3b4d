"""Correction of an estimate by peaks that a tuning run measured."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from autobatch._report import TuningReport

if TYPE_CHECKING:
    from pathlib import Path

    from autobatch._estimate.band import Band
    from autobatch._estimate.device import TargetGpu
    from autobatch._memory.estimate.prediction import MemoryEstimate
    from autobatch._trials import Trial

# Beginnings of the sources of readings on a GPU
_ON_GPU: Final = ("NVML", "torch.cuda")
_SMALLEST: Final = 2  # samples; other kernels run at one
_MAX_ERROR: Final = 0.25  # of the largest trial; beyond, the report is of another step


def calibrated(
    band: Band,
    memory: MemoryEstimate,
    target: TargetGpu,
    path: str | Path,
    *,
    budget: int,
    accumulate: int,
) -> Band:
    """Return the band around the peaks in a report of the same step.

    Raises:
        ValueError: The file is not a report, or not one that fits this step.
    """
    report = TuningReport.read(path)
    trials = [trial for trial in report.trials if _is_comparable(trial, accumulate)]
    if report.task != "train" or not report.device.source.startswith(_ON_GPU) or not trials:
        raise ValueError(
            f"calibrate={str(path)!r} has no peak of this step that was measured on a GPU; give "
            "the report of a tuning run on one, with the same accumulation."
        )
    if target.name.split(" (")[0] not in report.device.name:
        raise ValueError(
            f"calibrate={str(path)!r} was measured on {report.device.name}, and scratch memory of "
            f"{target.name} is another; give a report of this GPU, or device= the one of the report."
        )
    predicted = [max(p.reserved for p in memory.steps(t.batch_size, None)) for t in trials]
    found = band.calibrated(trials, predicted, budget)
    if abs(found.error) > _MAX_ERROR:
        raise ValueError(
            f"calibrate={str(path)!r} has peaks that are {found.error:+.0%} off the predicted ones; "
            "give the report of the same model, step, optimizer and precision."
        )
    return replace(found, untested=())


def _is_comparable(trial: Trial, accumulate: int) -> bool:
    accumulates_alike = (trial.accumulate > 1) == (accumulate > 1)
    return trial.fits and bool(trial.peak) and trial.batch_size >= _SMALLEST and accumulates_alike
