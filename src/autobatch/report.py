"""The types that a TuningReport and an Estimate are made of, for annotations and isinstance checks.

Import the report itself from here or from `autobatch`. Its numbers are bytes, seconds and samples.
"""

from __future__ import annotations

from autobatch._estimate import Estimate, EstimatedChange, EstimatedPeak
from autobatch._estimate.band import Banded
from autobatch._latency import Latency, Stream, StreamRow
from autobatch._noise import NoiseReading
from autobatch._plan import BatchPlan
from autobatch._report import Device, TuningReport
from autobatch._report.result import Look, Survived
from autobatch._report.tradeoff import EffectiveRow, LearningRateRule, NoiseRange, Optimum
from autobatch._settings import LatencyLimit, Settings
from autobatch._throughput import CurvePoint, LineFit, SpeedRow, StepTimes
from autobatch._throughput.loading import Loading
from autobatch._throughput.preference import SampleTime
from autobatch._trials import Outcome, Trial

__all__ = [
    "Banded",
    "BatchPlan",
    "CurvePoint",
    "Device",
    "EffectiveRow",
    "Estimate",
    "EstimatedChange",
    "EstimatedPeak",
    "Latency",
    "LatencyLimit",
    "LearningRateRule",
    "LineFit",
    "Loading",
    "Look",
    "NoiseRange",
    "NoiseReading",
    "Optimum",
    "Outcome",
    "SampleTime",
    "Settings",
    "SpeedRow",
    "StepTimes",
    "Stream",
    "StreamRow",
    "Survived",
    "Trial",
    "TuningReport",
]
