"""Exceptions raised by autobatch, as a tree.

AutobatchError
├── DoesNotFitError        no allowed batch size fits the budget, or meets the latency limit
├── ShortTrialError        a workload ended before its first step
├── ProbeError             the memory of a device cannot be read
├── FixedBatchSizeError    the batch size of a DataLoader cannot be changed
└── WorstCaseError         a worst_case ignores the batch size; also a ValueError

Any other bad argument is a plain `ValueError`. Exceptions of the user's code pass unchanged.
"""

from __future__ import annotations

__all__ = [
    "AutobatchError",
    "DoesNotFitError",
    "FixedBatchSizeError",
    "ProbeError",
    "ShortTrialError",
    "WorstCaseError",
]


class AutobatchError(Exception):
    """Base of all exceptions of autobatch; also raised for a set-up that cannot be tuned."""


class DoesNotFitError(AutobatchError):
    """No allowed batch size fits the budget or meets the latency limit; lists all trials."""


class ShortTrialError(AutobatchError):
    """A workload, started or started again, ended before its first step."""


class ProbeError(AutobatchError):
    """A device does not exist, or its memory cannot be read."""


class FixedBatchSizeError(AutobatchError):
    """The batch size of a DataLoader cannot be changed; AutoBatch only."""


class WorstCaseError(AutobatchError, ValueError):
    """A `worst_case` makes as much data for one batch size as for another; AutoBatch only."""
