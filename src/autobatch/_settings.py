"""Keyword arguments of a tuning run, validated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from autobatch._memory import parse_memory_limit

T = TypeVar("T")

_ALLOWED: Final = {
    "target_batch_size": "a count; give a whole number of samples, 1 or more, or None",
    "prefer": 'a preference; give "fast" or "largest"',
    "max_micro_batch_size": "a count; give a whole number of samples, 1 or more, or None",
    "steps_per_trial": "a count; give a whole number of optimizer steps, 1 or more",
    "time_limit": "a time; give seconds, more than 0, or None for no limit",
    "timing_seconds": "a time; give seconds, 0 or more, or None for the default",
    "dataset_size": "a count; give a whole number of samples, 1 or more, or None",
    "latency_limit": "a time; give seconds, more than 0, or None for no limit",
    "percentile": "a percentile; give a number above 0 and up to 100, or None for 99",
}


# Most seconds for timing sizes if `timing_seconds` is None. Read at each run: tests and benchmarks,
# which tune many times, replace it to time no size
TIMING_SECONDS: Final = 20.0


def checked_switch(name: str, value: object, choice: str) -> bool:
    """Return an argument; `ValueError` with the `choice` if it is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not a switch; give {choice}.")
    return value


def checked_function(name: str, value: T, choice: str) -> T:
    """Return an argument; `ValueError` with the `choice` if it is neither a function nor None."""
    if value is not None and not callable(value):
        raise ValueError(f"{name}={value!r} cannot be called; give {choice}.")
    return value


def checked_verbose(verbose: object) -> bool:
    """Return `verbose`; `ValueError` if it is neither True nor False."""
    choice = "True to show progress and report, or False to print nothing"
    return checked_switch("verbose", verbose, choice)


def _index(value: Any) -> Any:
    """Return a whole number of any type, NumPy's too, as an int; a bool is left as it is."""
    is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
    return value.__index__() if is_whole else value


def _checked_limit(value: Any) -> Any:
    """Return a valid limit as it was given, for the report; `MemoryBudget` parses it."""
    parse_memory_limit(value)
    return _index(value)  # or pydantic makes bytes of NumPy's types a float, which is a share


# Far beyond any measurement, and far from overflow and underflow
MOST: Final = 2**63  # samples, bytes
LONGEST: Final = 1e30  # seconds
SHORTEST: Final = 1e-30  # seconds

Count = Annotated[int, BeforeValidator(_index), Field(ge=1, le=MOST, strict=True)]
Seconds = Annotated[float, Field(ge=0, le=LONGEST, allow_inf_nan=False, strict=True)]


@dataclass(frozen=True, slots=True)
class LatencyLimit:
    """Limit on the time of one inference call.

    Args:
        seconds: Longest time of a call.
        percentile: Percentage of all calls that have to meet it.
    """

    seconds: float
    percentile: float


@dataclass(frozen=True, slots=True)
class Bound:
    """The largest micro-batch that a search may try, and the reason."""

    batch_size: int
    reason: str


class Settings(BaseModel):
    """Validated arguments of a tuning run.

    Args:
        target_batch_size: Samples per optimizer update, over all ranks; None for no target.
        prefer: The micro-batch without a target: the smallest of the fast ones, or the largest.
        memory_limit: A share of the device, bytes, or text such as "10GiB".
        max_micro_batch_size: The largest micro-batch to consider.
        steps_per_trial: Optimizer steps per trial.
        time_limit: Seconds for the search.
        timing_seconds: Most seconds for timing sizes; None for the default.
        dataset_size: Samples per epoch.
        latency_limit: Seconds within which a batch has to be answered; None for no limit.
        percentile: Percentage of calls that have to meet `latency_limit`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_batch_size: Count | None
    memory_limit: Annotated[float | int | str, BeforeValidator(_checked_limit)]
    max_micro_batch_size: Count | None
    steps_per_trial: Count
    time_limit: Annotated[Seconds, Field(ge=SHORTEST)] | None
    dataset_size: Count | None
    # Defaults, because reports of earlier versions lack these; they took the largest
    prefer: Literal["fast", "largest"] = "largest"
    timing_seconds: Seconds | None = None
    latency_limit: Annotated[Seconds, Field(ge=SHORTEST)] | None = None
    percentile: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False, strict=True)] = 99

    @model_validator(mode="after")
    def _has_one_aim(self) -> Settings:
        if self.latency_limit is not None and self.target_batch_size is not None:
            raise ValueError(
                f"latency_limit={self.latency_limit:g} is about inference, which has no updates, "
                f"and target_batch_size={self.target_batch_size} counts the samples of an update; "
                "give one of the two."
            )
        return self

    @property
    def limit_on_latency(self) -> LatencyLimit | None:
        """The limit on the time of a call; None for no limit."""
        if self.latency_limit is None:
            return None
        return LatencyLimit(self.latency_limit, self.percentile)

    @classmethod
    def checked(cls, **values: Any) -> Settings:
        """Return the settings, or raise a ValueError with one sentence about the first error."""
        given = values.get("percentile")
        if given is None:
            values.pop("percentile", None)
        try:
            settings = cls(**values)
        except ValidationError as error:
            raise ValueError(_message(error)) from None
        if given is not None and settings.latency_limit is None:
            raise ValueError(
                f"percentile={given!r} says how many calls have to meet latency_limit, which was "
                "not given; give latency_limit as well, or leave percentile out."
            )
        return settings


def tightest_bound(settings: Settings, world_size: int) -> Bound | None:
    """Return the lowest bound on a micro-batch; None if only memory bounds it."""
    ranks = f" on {world_size} ranks" if world_size > 1 else ""
    bounds = []
    if (target := settings.target_batch_size) is not None:
        size = target // world_size
        reason = f"target_batch_size={target}{ranks} needs no more than {size:,} at once"
        bounds.append(Bound(size, reason))
    if (most := settings.max_micro_batch_size) is not None:
        bounds.append(Bound(most, f"max_micro_batch_size={most} allows no more"))
    if (samples := settings.dataset_size) is not None:
        reason = f"an epoch of {samples:,} samples{ranks} has no more"
        bounds.append(Bound(samples // world_size, reason))
    return min(bounds, key=lambda bound: bound.batch_size, default=None)


def _message(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":  # raised by the validators above
        return str(first["ctx"]["error"])
    name = str(first["loc"][0])
    return f"{name}={first['input']!r} is not {_ALLOWED.get(name, 'a setting')}."
