"""What reading data takes beside a step: whether the loader keeps up."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Loading"]


@dataclass(frozen=True, slots=True)
class Loading:
    """Waiting for data, beside the steps it is for: measured.

    Args:
        wait_seconds: Seconds spent waiting for the next batch, of all that were measured.
        step_seconds: Seconds between, in which steps ran.
        batches: How many batches that was.
    """

    wait_seconds: float
    step_seconds: float
    batches: int

    @property
    def share(self) -> float:
        """Share of the time that was spent waiting, 0 to 1."""
        whole = self.wait_seconds + self.step_seconds
        return self.wait_seconds / whole if whole else 0.0
