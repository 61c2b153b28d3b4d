"""estimate(): the batch size that fits on a GPU, without running a step."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._estimate.band import EXPANDABLE, Band, Banded, band_of, calibrated
from autobatch._estimate.breakdown import moments, peak
from autobatch._estimate.changes import changed
from autobatch._estimate.device import target_gpu
from autobatch._estimate.inputs import Inputs
from autobatch._memory import memory_budget, parse_memory_limit
from autobatch._memory.estimate.allocator import ExpandableAllocator
from autobatch._report import needing_matplotlib
from autobatch._report.layout import UNICODE, Glyphs, html, terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

    from autobatch._estimate.device import TargetGpu
    from autobatch._estimate.inputs import Optimizer
    from autobatch._memory.estimate.prediction import MemoryEstimate

_MOST: Final = 2**31  # samples; larger batches are not sought


def estimate(
    model: torch.nn.Module,
    step: Callable[[torch.nn.Module, Any], Any],
    batch: Any,
    *,
    optimizer: Optimizer = torch.optim.AdamW,
    precision: str = "32-true",
    device: str | int | None = None,
    memory_limit: float | str = 0.9,
    accumulate: int = 1,
    calibrate: str | Path | None = None,
) -> Estimate:
    """Estimate the memory of a training step on a GPU, which need not be there.

    The step runs on fake tensors at batch sizes 2, 3 and 5: nothing is computed, no parameter is
    copied, and nothing of the model changes. What CUDA would allocate is replayed through a model
    of torch's allocator. The answer is an estimate with a band, and no trial confirms it.

    Args:
        model: The model in training mode, on any device; "meta" is enough.
        step: `step(model, batch)` returns the loss. It makes no tensor with `device="cuda"`.
        batch: A collated batch, whose tensors have one row per sample; its rows are repeated.
        optimizer: An optimizer of the model, or a function of its parameters that returns one.
        precision: As in a Trainer: "32-true", "bf16-mixed", "16-mixed"; "bf16-true" and
            "16-true" for a model that is in this precision.
        device: Name of a GPU, such as "H100" or "A100-40GB"; its memory in bytes or as text; None
            or "cuda:1" for one that is present.
        memory_limit: A share of the device, less its context; or bytes, or text such as "10GiB".
        accumulate: Micro-batches per update.
        calibrate: The report file of a tuning run of the same step on a GPU: its measured peaks
            correct the estimate and narrow its band.

    Returns:
        The estimate: `.largest`, `.at(n)`, `.untested`; `print` shows it all.

    Raises:
        ValueError: An argument is wrong.
        AutobatchError: The memory of the step cannot be estimated.

    Example:
        >>> import torch, autobatch
        >>> model = torch.nn.Linear(512, 512)
        >>> def step(model, batch):
        ...     return model(batch).square().mean()
        >>> estimate = autobatch.estimate(model, step, torch.randn(8, 512), device="T4")
        >>> 500_000 < estimate.largest.low < estimate.largest < estimate.largest.high
        True
    """
    limit = parse_memory_limit(memory_limit)
    inputs = Inputs.checked(model, step, batch, optimizer, precision, accumulate)
    return estimate_of(inputs, target_gpu(device), limit, calibrate)


def estimate_of(
    inputs: Inputs, target: TargetGpu, limit: float, calibrate: str | Path | None
) -> Estimate:
    """Return the estimate of checked inputs on a GPU."""
    memory = inputs.estimated(target.gpu)
    band = band_of(inputs, memory.events.at(2), target.guesses)
    budget = max(0, memory_budget(target.reading, limit))
    if calibrate is not None:
        accumulate = inputs.step.accumulate
        band = calibrated(
            band, memory, target.name, calibrate, budget=budget, accumulate=accumulate
        )
    if isinstance(limit, float):  # a share of the device, less its context
        band = reduce(Band.widened, target.guesses_of_context, band)
    return Estimate(inputs, target, limit, budget, band, memory)


@dataclass(frozen=True, slots=True)
class EstimatedPeak:
    """Memory of a training step at one batch size: estimated.

    Args:
        batch_size: Samples per forward pass.
        allocated: Most bytes in use after the first step, as `torch.cuda.max_memory_allocated`.
        reserved: Most bytes that the allocator holds, as `torch.cuda.max_memory_reserved`; `.low`
            and `.high` are its band.
        context: Bytes outside of the allocator: CUDA's context, and other processes on a GPU that
            is present.
        phase: Part of the step with the peak: "forward", "backward" or "optimizer".
        operator: Operator that reaches it.
        module: Module that it belongs to; empty if none is known.
        held: Bytes by use: parameters, gradients, activations and others; "rounding" is what blocks
            are larger than tensors, "fragments" what is reserved and not in use, "correction" by
            how much measured peaks are larger.
        activations: Bytes of activations by module, the largest first; those of repeated blocks
            together, as "layers.*.mlp".
    """

    batch_size: int
    allocated: int
    reserved: Banded
    context: int
    phase: str
    operator: str
    module: str
    held: dict[str, int]
    activations: dict[str, int]


@dataclass(frozen=True, slots=True)
class EstimatedChange:
    """A change of the step, and its effect: estimated.

    Args:
        change: The change, in words.
        largest: Largest batch size with it; `.low` and `.high` are its band.
        untested: Guesses that no GPU was compared with.
    """

    change: str
    largest: Banded
    untested: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """Estimated memory of a training step on a GPU at any batch size; `print` shows it.

    Attributes:
        budget: Bytes that training may reserve.
    """

    _inputs: Inputs
    _target: TargetGpu
    _limit: float
    budget: int
    _band: Band
    _memory: MemoryEstimate

    @property
    def device(self) -> str:
        """Name of the GPU."""
        return self._target.name

    @property
    def subject(self) -> str:
        """Model, optimizer and precision."""
        step = self._inputs.step
        names = (type(each).__name__ for each in (step.model, step.optimizer))
        return " · ".join((*names, self._inputs.precision))

    @property
    def fp16_instead(self) -> str | None:
        """Precision to use instead of bf16 on a GPU that emulates it with fp32, else None."""
        is_emulated = self._inputs.precision.startswith("bf16") and not self._target.gpu.has_bf16
        return self._inputs.precision.removeprefix("bf") if is_emulated else None

    @property
    def untested(self) -> tuple[str, ...]:
        """Guesses that no GPU was compared with, and that widen the band; () if there are none."""
        return self._band.untested

    @property
    def band_share(self) -> float:
        """Relative width of the band of a peak that fills the budget."""
        return self._band.share_at(self.budget)

    @cached_property
    def largest(self) -> Banded:
        """Largest batch size that fits the budget, in samples; 0 if not even one sample does.

        `.low` and `.high` are its band: the largest sizes if the memory is more, or less, than
        predicted.
        """
        share = self.band_share
        low, middle, high = (
            self._memory.largest(self._band.uncorrected(self.budget / (1 + error)), _MOST)
            for error in (share, 0, -share)
        )
        return Banded(middle, min(low, middle), max(middle, high))

    def at(self, batch_size: int) -> EstimatedPeak:
        """Return the memory of a step at a batch size, and what holds it.

        Args:
            batch_size: Samples per forward pass.

        Raises:
            ValueError: It is not a whole number of 1 or more.
        """
        if type(batch_size) not in (int, Banded) or batch_size < 1:
            raise ValueError(
                f"batch_size={batch_size!r} is not a count; give a whole number of samples, 1 or "
                "more."
            )
        size = int(batch_size)
        peaks = self._memory.steps(size)
        allocated = peaks[-1].allocated
        reserved = max(each.reserved for each in peaks)
        events = list(self._memory.events.at(size))
        highest = peak(events, self._target.gpu, self._inputs.step.model)
        held = {str(use): nbytes for use, nbytes in highest.held.items() if nbytes}
        rest = allocated - sum(held.values())
        return EstimatedPeak(
            batch_size=size,
            allocated=self._band.corrected(allocated),
            reserved=self._band.around(reserved),
            context=self._target.reading.foreign,
            phase=str(highest.phase),
            operator=highest.operator,
            module=highest.module,
            held=held
            | {
                "rounding": max(0, rest),
                "fragments": reserved - allocated,
                "correction": self._band.corrected(reserved) - reserved,
            },
            activations=highest.activations,
        )

    def plot(self, path: str | Path | None = None, batch_size: int | None = None) -> Figure:
        """Draw the memory over one step with its phases, by use, and the budget.

        Args:
            path: A .png, .svg or .pdf file to write as well.
            batch_size: Samples per forward pass; None: the largest that fits.

        Raises:
            AutobatchError: matplotlib is not installed.
            ValueError: The path has another ending.
        """
        with needing_matplotlib():
            from autobatch._estimate.figure import draw
        peak = self.at(max(1, self.largest) if batch_size is None else batch_size)
        events = list(self._memory.events.at(peak.batch_size))
        return draw(self, moments(events, self._target.gpu), peak, path)

    def changes(self) -> tuple[EstimatedChange, ...]:
        """Return the largest batch size with one thing changed; most take a trace of their own.

        These are bf16-mixed instead of 32-true, gradient checkpointing if the model has a switch
        for it, SGD with momentum instead of another optimizer, 8-bit state instead of that of Adam
        or AdamW, two micro-batches per update, and expandable segments of torch's allocator.
        """
        estimates = {
            words: estimate_of(inputs, self._target, self._limit, None)
            for words, inputs in changed(self._inputs)
        }
        estimates["expandable segments"] = replace(
            self,
            _memory=replace(self._memory, allocator=ExpandableAllocator),
            _band=self._band.widened(EXPANDABLE),
        )
        return tuple(
            EstimatedChange(words, estimate.largest, estimate.untested)
            for words, estimate in estimates.items()
        )

    def to_json(self, changes: Sequence[EstimatedChange] = ()) -> str:
        """Return the estimate as JSON, at its largest batch size.

        Args:
            changes: Changes to write too, as `changes()` returns them.
        """
        shown = {
            "kind": "estimated",
            "subject": self.subject,
            "device": self.device,
            "total_bytes": self._target.reading.total,
            "context_bytes": self._target.reading.foreign,
            "budget_bytes": self.budget,
            "largest": _banded(self.largest),
            "untested": self.untested,
            "band": self.band_share,
            "at_largest": _written(self.at(max(1, self.largest))),
            "changes": [
                {"change": each.change, "largest": _banded(each.largest), "untested": each.untested}
                for each in changes
            ],
        }
        return json.dumps(shown, indent=2, ensure_ascii=False)

    def text(self, glyphs: Glyphs = UNICODE, changes: Sequence[EstimatedChange] = ()) -> str:
        """Return the estimate as text of at most 86 columns.

        Args:
            glyphs: Characters that the output can show.
            changes: Changes to show too, as `changes()` returns them.
        """
        from autobatch._estimate.text import page

        return terminal(page(self, changes), glyphs)

    def _repr_html_(self) -> str:
        from autobatch._estimate.text import page

        return html(page(self, ()))

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"<Estimate: {self.subject} on {self.device}>"


def _written(peak: EstimatedPeak) -> dict[str, Any]:
    """Return a peak for JSON, with units in its keys."""
    return {
        "batch_size": peak.batch_size,
        "allocated_bytes": peak.allocated,
        "reserved_bytes": _banded(peak.reserved),
        "phase": peak.phase,
        "operator": peak.operator,
        "module": peak.module,
        "held_bytes": peak.held,
        "activations_bytes": peak.activations,
    }


def _banded(number: Banded) -> dict[str, int]:
    return {"value": int(number), "low": number.low, "high": number.high}
