"""Sizes at which the workload raised an error of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch._trials import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch._trials import Trial


def refused_sizes(trials: Sequence[Trial]) -> set[int]:
    """Return the sizes that the workload refused and never ran."""
    refused = {trial.batch_size for trial in trials if trial.outcome is Outcome.REFUSED}
    return refused - {trial.batch_size for trial in trials if trial.fits}


def is_selective(trials: Sequence[Trial]) -> bool:
    """Return True if the workload refused a size for another reason than too few samples."""
    least = min((trial.batch_size for trial in trials if trial.fits), default=1)
    return any(size > least for size in refused_sizes(trials))
