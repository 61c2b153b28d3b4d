"""Choose the next batch size to try: the Search protocol and bisection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from autobatch._trials import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._trials import Trial


class Search(Protocol):
    """Which batch size to try next: a pure function of the history, so that ranks and reruns agree."""

    def propose(self, trials: Sequence[Trial], *, start: int, high: int, budget: int) -> int | None:
        """Name a size never tried, from 1 to `high`, or None: the largest fit is the answer."""


@dataclass(frozen=True)
class Bisection:
    """Double until a size fails, then halve what is in doubt; never reads memory.

    Args:
        resolution: How far the largest fit may end below a size that failed, as a share of it; at least one sample.
    """

    resolution: float = 0.01

    def __post_init__(self) -> None:
        _check_resolution(self.resolution)

    def propose(
        self,
        trials: Sequence[Trial],
        *,
        start: int,
        high: int,
        budget: int,  # noqa: ARG002
    ) -> int | None:
        """Name a size never tried, from 1 to `high`, or None: the largest fit is the answer."""
        if not trials:
            return min(start, high)
        bracket = _Bracket.of(trials, high)
        return None if bracket.closed(self.resolution) else bracket.middle


class _Bracket(NamedTuple):
    good: int  # largest size that fits; 0 when none does
    refused: int  # largest size too small for the workload; 0 when none is
    bad: int | None  # smallest failure above these: one below a fit is noise
    high: int

    @classmethod
    def of(cls, trials: Sequence[Trial], high: int) -> _Bracket:
        good = max((t.batch_size for t in trials if t.fits), default=0)
        small = [t.batch_size for t in trials if t.outcome is Outcome.REFUSED]
        refused = max(small, default=0)
        failed = [t.batch_size for t in trials if not t.fits]
        above = [size for size in failed if size > max(good, refused)]
        return cls(good, refused, min(above, default=None), high)

    @property
    def low(self) -> int:
        return max(self.good, self.refused)

    @property
    def middle(self) -> int:
        if self.bad is None:
            return self.clip(2 * self.low)
        return self.clip((self.low + self.bad) // 2)

    def clip(self, size: float) -> int:
        ceiling = self.high if self.bad is None else min(self.high, self.bad - 1)
        return int(min(max(size, self.low + 1), ceiling))

    def closed(self, resolution: float) -> bool:
        if self.low >= self.high:
            return True
        if self.bad is None:
            return False
        gap = max(1, int(resolution * self.bad)) if self.good else 1
        return self.bad - self.low <= gap


def _check_resolution(resolution: float) -> None:
    if not isinstance(resolution, float) or not 0 < resolution < 1:
        raise ValueError(f"resolution must lie between 0 and 1, got {resolution!r}.")
