"""Details of a tuning run beside its report: inputs of its text and notes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autobatch._latency import Unfinished
    from autobatch._plan import BatchPlan
    from autobatch._settings import Bound
    from autobatch._throughput.curve import TimingLimit


@dataclass(frozen=True, slots=True)
class Look:
    """Number of samples read to find the largest ones, on which trials run.

    Args:
        read: Samples read.
        among: Samples in the dataset; None if unknown.
        is_even: True if all samples read have one size.
    """

    read: int
    among: int | None
    is_even: bool


@dataclass(frozen=True, slots=True)
class Survived:
    """A micro-batch of training that ran out of memory, and was done in pieces instead.

    Args:
        step: Updates before it.
        epoch: The epoch.
        samples: Samples in the micro-batch.
        pieces: Number of pieces.
        piece_size: Samples in the smallest piece.
        lost_seconds: Seconds of the attempts that failed.
    """

    step: int
    epoch: int
    samples: int
    pieces: int
    piece_size: int
    lost_seconds: float


@dataclass(frozen=True, slots=True)
class SubjectNotes:
    """Notes on the subject of a tuning run."""

    trials: tuple[str, ...] = ()  # differences between trials and training
    plan: tuple[str, ...] = ()  # consequences of the plan


@dataclass(frozen=True, slots=True)
class RunDetails:
    """Details of a tuning run that its notes depend on, and that a report does not keep."""

    bound: Bound | None  # kept the search from larger sizes
    is_out_of_time: bool  # the time limit ended the search
    unreached: tuple[int, ...]  # sizes that the curve had no time for
    timing_limit: TimingLimit  # of the curve
    before: BatchPlan | None  # plan of the training so far, if known
    last_samples: int | None  # samples in the last micro-batch of an epoch, if known
    subject_notes: SubjectNotes
    prior_note: str | None  # on a plan that was known before; None if there is none
    unfinished: Unfinished | None  # timing of calls; None without a latency limit
