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

KEPT: Final = 200  # windows at most; only the later half of all updates counts anyway
_SETTLED: Final = 100  # updates: in the first of a run the noise scale is far too low
_ENOUGH: Final = 8  # windows: from fewer, nothing is said of how sure it is
_SPREAD: Final = 4.0  # an interval wider than this factor is only a lower bound
_DRAWS: Final = 200  # of the bootstrap
_TAIL: Final = 0.05  # on each side of the interval
_QUANTILE: Final = NormalDist().inv_cdf(1 - _TAIL)  # of that, in standard errors
_SEED: Final = 0  # of a generator of its own: the same windows always read the same


@dataclass(frozen=True, slots=True)
class NoiseReading:
    """The gradient noise scale, as far as a training run shows it: measured.

    Args:
        state: "ok"; "settling" in the first updates, where it is still much too low; "at_least" where `samples` is a
            lower bound; "unavailable" where nothing could be measured, for the `reason`.
        samples: The noise scale, tr Σ / |G|², in samples; None where nothing is known.
        low: Lower end of its interval, in samples.
        high: Upper end of its interval, in samples; None where there is none.
        windows: Updates that were measured.
        first_update: The first of them that counts, from 1.
        last_update: The last of them.
        batch_size: Samples per update while it was measured, over all ranks.
        reason: Why it is unavailable, or settling still.
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
    """One update that was measured: its gradient's squared norm at two batch sizes.

    A factor that all windows have in common, such as a loss divided by the accumulation, changes nothing.

    Args:
        update: Which update it was, from 1.
        small: Mean squared norm of the gradients of its parts.
        big: Squared norm of their mean, the gradient of the whole update.
        part_size: Samples of a part; of parts of several sizes the harmonic mean.
        batch_size: Samples of the whole update, over all ranks.
    """

    update: int
    small: float
    big: float
    part_size: float
    batch_size: int

    @property
    def signal(self) -> float:
        """An unbiased estimate of |G|², the squared norm of the true gradient; by chance it may be negative."""
        part, whole = self.part_size, self.batch_size
        return (whole * self.big - part * self.small) / (whole - part)

    @property
    def noise(self) -> float:
        """An unbiased estimate of tr Σ, the variance of the gradients of single samples."""
        return (self.small - self.big) / (1 / self.part_size - 1 / self.batch_size)

    @property
    def is_finite(self) -> bool:
        """Whether it is of numbers, as it is not where a scaled loss overflowed."""
        return math.isfinite(self.small) and math.isfinite(self.big)


def read(windows: Sequence[Window], *, updates: int, is_warming_up: bool) -> NoiseReading:
    """What these windows say after so many updates of a run.

    The noise scale rises while a run begins and its gradient shrinks: only the later half of the updates counts. Both
    estimates are averaged first and divided then: the mean of ratios would be too high by any factor, since a ratio
    whose denominator comes near zero outweighs all others.
    """
    counted = [window for window in windows if window.is_finite and window.update > updates // 2][
        -KEPT:
    ]
    last = windows[-1].update if windows else 0
    if updates >= _SETTLED and windows and not any(w.is_finite for w in windows):
        why = "no gradient that was measured is finite"
        return NoiseReading("unavailable", last_update=last, reason=why)
    unsettled = _unsettled(updates, len(counted), is_warming_up=is_warming_up)
    if not counted:
        return NoiseReading("settling", last_update=last, reason=unsettled)
    low, high = _interval(counted)
    if math.isinf(low):
        low = _detectable(counted)
    estimate = _ratio(counted)
    is_vague = math.isinf(estimate) or high > _SPREAD * low
    state: NoiseState = "settling" if unsettled else "at_least" if is_vague else "ok"
    return NoiseReading(
        state,
        samples=estimate if state == "ok" else _finite(low),
        low=_finite(low),
        high=_finite(high) if state == "ok" else None,
        windows=len(counted),
        first_update=counted[0].update,
        last_update=counted[-1].update,
        batch_size=counted[-1].batch_size,
        reason=unsettled,
    )


def _unsettled(updates: int, counted: int, *, is_warming_up: bool) -> str | None:
    """What a run still lacks, of which so many updates were seen, and so many of its later half measured."""
    if updates < _SETTLED:
        return f"it takes {_SETTLED} updates or more, and there were {updates}"
    if counted < _ENOUGH:
        return f"it takes {_ENOUGH} measured updates in the later half of a run, and there were {counted}"
    return "the learning rate was still rising" if is_warming_up else None


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _ratio(windows: Sequence[Window]) -> float:
    """The ratio of means; infinite where no gradient can be told from noise."""
    return _divided(
        fmean(window.noise for window in windows),
        fmean(window.signal for window in windows),
    )


def _divided(noise: float, signal: float) -> float:
    return max(0.0, noise) / signal if signal > 0 else math.inf


def _detectable(windows: Sequence[Window]) -> float:
    """The noise scale by the largest |G|² that so many windows could have missed; infinite where that is unknown."""
    if len(windows) == 1:
        return math.inf
    error = stdev(window.signal for window in windows) / math.sqrt(len(windows))
    return _divided(fmean(window.noise for window in windows), _QUANTILE * error)


def _interval(windows: Sequence[Window]) -> tuple[float, float]:
    """Where nine in ten ratios lie when windows are drawn anew from those that were measured."""
    generator = random.Random(_SEED)  # noqa: S311 -- no secret
    pairs = [(window.noise, window.signal) for window in windows]
    ratios = []
    for _ in range(_DRAWS):
        drawn = generator.choices(pairs, k=len(pairs))
        ratios.append(_divided(sum(n for n, _ in drawn), sum(s for _, s in drawn)))
    ratios.sort()
    tail = round(_TAIL * _DRAWS)
    return ratios[tail], ratios[-1 - tail]
