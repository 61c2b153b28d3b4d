"""Gradient noise scale: the estimator and its confidence interval."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

NoiseState: TypeAlias = Literal["settling", "ok", "at_least", "unavailable"]

MAX_WINDOWS: Final = 200  # kept of a run; only the later half of all updates counts anyway
_MIN_UPDATES: Final = 100  # in the first updates of a run the noise scale is far too low
_MIN_WINDOWS: Final = 8  # with fewer, an interval means nothing
_MAX_INTERVAL: Final = 4.0  # an interval wider than this factor is only a lower bound
_RESAMPLES: Final = 200  # of the bootstrap
_TAIL: Final = 0.05  # probability on each side of the interval
_TAIL_ERRORS: Final = NormalDist().inv_cdf(1 - _TAIL)  # the same in standard errors
_SEED: Final = 0  # of a separate generator: the same windows always give the same reading


@dataclass(frozen=True, slots=True)
class NoiseReading:
    """The gradient noise scale, measured in a training run so far.

    Args:
        state: "ok"; "settling" during the first updates, while it is still far too low;
            "at_least" if `samples` is a lower bound; "unavailable" if nothing could be measured,
            for the `reason`.
        samples: The noise scale, tr Σ / |G|², in samples; None if unknown.
        low: Lower end of its 90 % interval, in samples.
        high: Upper end of its 90 % interval, in samples; None if there is none.
        windows: Measured updates that count.
        first_update: The first of them, from 1.
        last_update: The last of them.
        batch_size: Samples per update while it was measured, over all ranks.
        reason: Reason for "unavailable", or for "settling".
    """

    state: NoiseState
    samples: float | None = None
    low: float | None = None
    high: float | None = None
    windows: int = 0
    first_update: int = 0
    last_update: int = 0
    batch_size: int | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """One measured update: the squared norm of its gradient at two batch sizes.

    A factor that all windows share, such as a loss divided by the accumulation, has no effect.
    """

    update: int  # from 1
    small: float  # mean squared norm of the gradients of its parts
    big: float  # squared norm of their mean, the gradient of the whole update
    part_size: float  # samples of a part; for parts of several sizes the harmonic mean
    batch_size: int  # samples of the whole update, over all ranks

    @property
    def signal(self) -> float:
        """Unbiased estimate of |G|², the squared norm of the true gradient; may be negative."""
        part, whole = self.part_size, self.batch_size
        return (whole * self.big - part * self.small) / (whole - part)

    @property
    def noise(self) -> float:
        """Unbiased estimate of tr Σ, the variance of the gradients of single samples."""
        return (self.small - self.big) / (1 / self.part_size - 1 / self.batch_size)

    @property
    def is_finite(self) -> bool:
        """False after an overflow, for example of a scaled loss."""
        return math.isfinite(self.small) and math.isfinite(self.big)


def estimate(windows: Sequence[Window], *, updates: int, is_warming_up: bool) -> NoiseReading:
    """Estimate the noise scale from the windows of a run after `updates` updates.

    The noise scale rises while a run begins and its gradient shrinks: only the later half of the
    updates counts. Signal and noise are averaged first and divided then: a mean of ratios would be
    too high by any factor, since a ratio with a denominator near zero outweighs all others.
    """
    later = [window for window in windows if window.is_finite and window.update > updates // 2]
    counted = later[-MAX_WINDOWS:]
    last = windows[-1].update if windows else 0
    if updates >= _MIN_UPDATES and windows and not any(w.is_finite for w in windows):
        reason = "no measured gradient is finite"
        return NoiseReading("unavailable", last_update=last, reason=reason)
    unsettled = _reason_unsettled(updates, len(counted), is_warming_up=is_warming_up)
    if not counted:
        return NoiseReading("settling", last_update=last, reason=unsettled)
    low, high = _bootstrap_interval(counted)
    if math.isinf(low):
        low = _lower_bound(counted)
    samples = _noise_scale(fmean(w.noise for w in counted), fmean(w.signal for w in counted))
    is_vague = math.isinf(samples) or high > _MAX_INTERVAL * low
    state: NoiseState = "at_least" if is_vague else "ok"
    if unsettled:
        state = "settling"
    return NoiseReading(
        state,
        samples=samples if state == "ok" else _finite(low),
        low=_finite(low),
        high=_finite(high) if state == "ok" else None,
        windows=len(counted),
        first_update=counted[0].update,
        last_update=counted[-1].update,
        batch_size=counted[-1].batch_size,
        reason=unsettled,
    )


def _reason_unsettled(updates: int, counted: int, *, is_warming_up: bool) -> str | None:
    """Return a reason why the number is still too low, from the updates and the windows so far."""
    if updates < _MIN_UPDATES:
        return f"it takes {_MIN_UPDATES} updates or more, and there were {updates}"
    if counted < _MIN_WINDOWS:
        return (
            f"it takes {_MIN_WINDOWS} measured updates in the later half of a run, "
            f"and there were {counted}"
        )
    return "the learning rate was still rising" if is_warming_up else None


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _noise_scale(noise: float, signal: float) -> float:
    """Divide noise by signal; infinite if no gradient can be distinguished from noise."""
    return max(0.0, noise) / signal if signal > 0 else math.inf


def _lower_bound(windows: Sequence[Window]) -> float:
    """Return the noise scale at the largest |G|² that these windows could have missed.

    Infinite if there is one window only.
    """
    if len(windows) == 1:
        return math.inf
    error = stdev(window.signal for window in windows) / math.sqrt(len(windows))
    return _noise_scale(fmean(window.noise for window in windows), _TAIL_ERRORS * error)


def _bootstrap_interval(windows: Sequence[Window]) -> tuple[float, float]:
    """Return the interval of nine in ten ratios of windows resampled with replacement."""
    generator = random.Random(_SEED)  # noqa: S311 -- no secret
    pairs = [(window.noise, window.signal) for window in windows]
    ratios = []
    for _ in range(_RESAMPLES):
        drawn = generator.choices(pairs, k=len(pairs))
        ratios.append(_noise_scale(sum(n for n, _ in drawn), sum(s for _, s in drawn)))
    ratios.sort()
    tail = round(_TAIL * _RESAMPLES)
    return ratios[tail], ratios[-1 - tail]
