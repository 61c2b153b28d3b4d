"""Gradient noise scale: what the number of updates is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["NoiseReading", "NoiseState"]

NoiseState: TypeAlias = Literal["settling", "ok", "at_least", "unavailable"]


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
        reason: Why it is unavailable.
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
