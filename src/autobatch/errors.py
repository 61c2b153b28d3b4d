"""Every exception of autobatch that a caller may catch, drawn as a tree.

AutobatchError
├── DoesNotFitError        no batch size that may be used fits the budget, or answers in time
├── ShortTrialError        a workload ended before its trial had run
├── ProbeError             a device's memory can not be read
└── FixedBatchSizeError    the batch size of a DataLoader cannot be changed

A bad argument is a plain `ValueError`. A user's own exception passes through as it is.
"""

from __future__ import annotations

__all__ = [
    "AutobatchError",
    "DoesNotFitError",
    "FixedBatchSizeError",
    "ProbeError",
    "ShortTrialError",
]


class AutobatchError(Exception):
    """What autobatch raises on its own account; also raised when a set-up is one it can not tune."""


class DoesNotFitError(AutobatchError):
    """No batch size that may be used fits the budget, or answers within the limit; the message lists what was tried."""


class ShortTrialError(AutobatchError):
    """A workload ended before the trial had run all of its steps, so nothing was proven."""


class ProbeError(AutobatchError):
    """A device does not exist, or its memory can not be read."""


class FixedBatchSizeError(AutobatchError):
    """The batch size of a DataLoader cannot be changed; AutoBatch only."""
