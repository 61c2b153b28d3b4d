"""The Search protocol and plain bisection; `GuidedBisection`, the default, is in guided.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from autobatch._trials import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._trials import Trial


class Search(Protocol):
    """Choose the next batch size: a pure function of the trials, so that ranks and reruns agree."""

    def propose(self, trials: Sequence[Trial], *, start: int, high: int, budget: int) -> int | None:
        """Return an untried size from 1 to `high`, or None if the largest fit is the answer."""


@dataclass(frozen=True)
class Bisection:
    """Double until a size fails, then bisect; never reads memory.

    Args:
        resolution: Largest gap at which the search ends, between the largest fit and the largest
            size that may fit, as a share of the latter.
    """

    resolution: float = 0.01

    def __post_init__(self) -> None:
        check_resolution(self.resolution)

    def propose(
        self,
        trials: Sequence[Trial],
        *,
        start: int,
        high: int,
        budget: int,  # noqa: ARG002
    ) -> int | None:
        """Return an untried size from 1 to `high`, or None if the largest fit is the answer."""
        if not trials:
            return min(start, high)
        bracket = Bracket.of(trials, high)
        return None if bracket.is_closed(self.resolution) else bracket.middle


class Bracket(NamedTuple):
    """Interval that contains the largest batch size that fits."""

    good: int  # largest size that fits; 0 if none does
    refused: int  # largest size too small for the workload; 0 if there is none
    bad: int | None  # smallest failure above both: a failure below a fit is noise
    high: int  # largest size allowed

    @classmethod
    def of(cls, trials: Sequence[Trial], high: int) -> Bracket:
        good = max((t.batch_size for t in trials if t.fits), default=0)
        refused = max((t.batch_size for t in trials if t.outcome is Outcome.REFUSED), default=0)
        failed = (t.batch_size for t in trials if not t.fits)
        above = (size for size in failed if size > max(good, refused))
        return cls(good, refused, min(above, default=None), high)

    @property
    def low(self) -> int:
        return max(self.good, self.refused)

    @property
    def middle(self) -> int:
        return self.clip(2 * self.low if self.bad is None else (self.low + self.bad) // 2)

    def clip(self, size: float) -> int:
        """Return the nearest size inside the bracket."""
        ceiling = self.high if self.bad is None else min(self.high, self.bad - 1)
        return int(min(max(size, self.low + 1), ceiling))

    def is_closed(self, resolution: float) -> bool:
        if self.low >= self.high:
            return True
        if self.bad is None:
            return False
        most = self.bad - 1  # the largest size that may fit
        return most - self.low <= (int(resolution * most) if self.good else 0)


def check_resolution(resolution: float) -> None:
    """Raise ValueError unless the resolution is a share between 0 and 1."""
    if not isinstance(resolution, float) or not 0 < resolution < 1:
        raise ValueError(f"resolution must lie between 0 and 1, got {resolution!r}.")
