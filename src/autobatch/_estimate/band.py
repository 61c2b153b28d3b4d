"""Bands of an estimate: errors that were measured, and wider ones for what was not."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch import nn

from autobatch._report import TuningReport

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from autobatch._estimate.inputs import Inputs
    from autobatch._memory.estimate.events import Event
    from autobatch._memory.estimate.prediction import MemoryEstimate
    from autobatch._trials import Trial

_GIB: Final = 2**30
# Relative errors of the reserved peak on an H200, in bf16-mixed with AdamW: benchmarks/estimate.py
_TRANSFORMER: Final = 0.015
_SMALL_TRANSFORMER: Final = 0.04
_SMALL: Final = 3 * _GIB  # bytes of a peak below which segments of 20 MiB count
_CONVOLUTIONAL: Final = 0.04
_RECURRENT: Final = 0.10  # of one network, by the largest error of a guess before it was fitted
_OTHER: Final = 0.06
# Added for each thing that no GPU was compared in; not measured
_PRECISION: Final = 0.03
_OPTIMIZER: Final = 0.01
_FUSED: Final = 0.01
_LAYOUT: Final = 0.04
_BENCHMARK: Final = 0.04
_OTHER_LSTM: Final = 0.05
_MEASURED_LAYERS: Final = 2
# Of a report that calibrates: errors beside those that the report shows
_CALIBRATED: Final = 0.01
_FACTOR: Final = 4  # of the largest peak; smaller ones say nothing of larger batches
_LARGE_TRIAL: Final = 0.1  # share of the budget, from which a ratio is better than an offset
# Beginnings of the sources of readings on a GPU
_ON_GPU: Final = ("NVML", "torch.cuda")
_SMALLEST: Final = 2  # samples; other kernels run at one
_MAX_ERROR: Final = 0.25  # of the largest trial; beyond, the report is of another step


class Banded(int):
    """A whole number between `low` and `high`, its band.

    Attributes:
        low: Lower end.
        high: Upper end.
    """

    low: int
    high: int

    def __new__(cls, value: int, low: int, high: int) -> Self:
        """Return a number with its band."""
        banded = super().__new__(cls, value)
        banded.low, banded.high = low, high
        return banded

    def __getnewargs__(self) -> tuple[int, int, int]:  # type: ignore[override]
        """Return the arguments of a copy."""
        return int(self), self.low, self.high

    def __repr__(self) -> str:
        return f"{int(self)} ({self.low}–{self.high})"


@dataclass(frozen=True, slots=True)
class Guess:
    """Something that was never compared with a GPU."""

    what: str  # a phrase for people
    share: float  # width that it adds to the band, as a share


EXPANDABLE: Final = Guess("expandable segments", 0.05)


@dataclass(frozen=True, slots=True)
class Band:
    """Relative error of a predicted peak, and its correction by measured peaks."""

    share: float  # error of a peak of at least `small` bytes
    share_of_small: float  # error of a smaller peak
    small: int = _SMALL  # bytes below which a peak is small
    untested: tuple[str, ...] = ()  # what was guessed
    ratio: float = 1.0  # measured over predicted peaks
    offset: int = 0  # bytes by which measured peaks are larger

    def around(self, nbytes: int) -> Banded:
        """Return a corrected peak with its band."""
        peak = self.corrected(nbytes)
        share = self.share_at(peak)
        return Banded(peak, round(peak * (1 - share)), round(peak * (1 + share)))

    def share_at(self, nbytes: int) -> float:
        """Return the error of a peak."""
        return self.share if nbytes >= self.small else self.share_of_small

    def corrected(self, nbytes: int) -> int:
        """Return the measured peak that a prediction stands for."""
        return round(nbytes * self.ratio) + self.offset

    def uncorrected(self, nbytes: float) -> int:
        """Return the prediction that is corrected to these bytes."""
        return max(0, round((nbytes - self.offset) / self.ratio))

    def widened(self, guess: Guess) -> Self:
        """Return a band with one more guess."""
        return replace(
            self,
            share=self.share + guess.share,
            share_of_small=self.share_of_small + guess.share,
            untested=(*self.untested, guess.what),
        )


def band_of(inputs: Inputs, events: Iterable[Event], guesses: Iterable[Guess]) -> Band:
    """Return the band of a step; `guesses` are those about the device."""
    kind = _kind_of(inputs.step.model, {event.name for event in events})
    found = [*_guesses(inputs), *guesses]
    if kind is _OTHER:
        found.insert(0, Guess("networks without attention or convolutions", 0.0))
    band = Band(kind, _SMALL_TRANSFORMER if kind is _TRANSFORMER else kind)
    return reduce(Band.widened, found, band)


def _kind_of(model: nn.Module, operators: set[str]) -> float:
    """Return the error of a kind of network. Convolutions that make patches are no matter."""
    if any(isinstance(part, nn.LSTM) for part in model.modules()):
        return _RECURRENT
    layers = [part for part in model.modules() if isinstance(part, _CONVOLUTIONS)]
    is_convolutional = any(map(_overlaps, layers)) or (
        not layers and any("convolution_backward" in name for name in operators)
    )
    if is_convolutional:
        return _CONVOLUTIONAL
    # By torch's function, or written out as in Swin
    has_attention = any("scaled_dot_product" in name or "._softmax." in name for name in operators)
    return _TRANSFORMER if has_attention else _OTHER


_CONVOLUTIONS: Final = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def _overlaps(layer: nn.Module) -> bool:
    sizes: Any = layer.kernel_size
    strides: Any = layer.stride
    return any(size > stride for size, stride in zip(sizes, strides, strict=True))


def _guesses(inputs: Inputs) -> Iterator[Guess]:
    model, optimizer = inputs.step.model, inputs.step.optimizer
    if inputs.precision != "bf16-mixed":
        yield Guess(f"precision {inputs.precision}", _PRECISION)
    if type(optimizer) is not torch.optim.AdamW:
        yield Guess(f"optimizer {type(optimizer).__name__}", _OPTIMIZER)
    if any(group.get("fused") for group in optimizer.param_groups):
        yield Guess("fused=True of the optimizer", _FUSED)
    if any(map(_is_channels_last, model.parameters())):
        yield Guess("channels_last", _LAYOUT)
    lstms = [part for part in model.modules() if isinstance(part, nn.LSTM)]
    if any(part.num_layers != _MEASURED_LAYERS or part.bidirectional for part in lstms):
        yield Guess("LSTMs other than of two layers in one direction", _OTHER_LSTM)
    has_convolutions = any(isinstance(part, _CONVOLUTIONS) for part in model.modules())
    if has_convolutions and torch.backends.cudnn.benchmark:
        yield Guess("torch.backends.cudnn.benchmark", _BENCHMARK)


def _is_channels_last(parameter: torch.Tensor) -> bool:
    is_image = parameter.ndim == 4 and not parameter.is_contiguous()  # noqa: PLR2004 -- NCHW
    return is_image and parameter.is_contiguous(memory_format=torch.channels_last)


# Calibration


def calibrated(
    band: Band,
    memory: MemoryEstimate,
    gpu_name: str,
    path: str | Path,
    *,
    budget: int,
    accumulate: int,
) -> Band:
    """Return the band around the peaks in a report of the same step; the largest corrects others.

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
    if not _words(gpu_name.partition(" (")[0]) <= _words(report.device.name):
        raise ValueError(
            f"calibrate={str(path)!r} was measured on {report.device.name}, and scratch memory of "
            f"{gpu_name} is another; give a report of this GPU, or device= the one of the report."
        )
    peaks = [trial.peak or 0 for trial in trials]
    predicted = [memory.peaks(trial.batch_size).reserved for trial in trials]
    largest = max(peaks)
    foretold = predicted[peaks.index(largest)]
    error = largest / foretold - 1
    if abs(error) > _MAX_ERROR:
        raise ValueError(
            f"calibrate={str(path)!r} has peaks that are {error:+.0%} off the predicted ones; "
            "give the report of the same model, step, optimizer and precision."
        )
    # A small trial gives an offset and a large one a ratio: allocators have plateaus
    is_large = largest >= _LARGE_TRIAL * budget
    ratio, offset = (largest / foretold, 0) if is_large else (1.0, largest - foretold)
    found = replace(band, ratio=ratio, offset=offset, untested=())
    share = _CALIBRATED + max(
        abs(found.corrected(nbytes) / peak - 1)
        for nbytes, peak in zip(predicted, peaks, strict=True)
        if peak >= largest / _FACTOR
    )
    share_of_small = min(share, band.share_of_small)
    return replace(found, share=min(share, band.share), share_of_small=share_of_small)


def _words(name: str) -> set[str]:
    """Return the parts of a GPU's name: an L4 is not an L40S, and "A100-SXM4-40GB" is an A100."""
    return set(re.split(r"[^A-Z0-9]+", name.upper()))


def _is_comparable(trial: Trial, accumulate: int) -> bool:
    accumulates_alike = (trial.accumulate > 1) == (accumulate > 1)
    return trial.fits and bool(trial.peak) and trial.batch_size >= _SMALLEST and accumulates_alike
