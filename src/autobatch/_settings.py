"""Keyword arguments of a tuning run, validated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from autobatch._memory import parse_memory_limit

_ALLOWED: Final = {
    "target_batch_size": "a count; give a whole number of samples, 1 or more, or None",
    "max_micro_batch_size": "a count; give a whole number of samples, 1 or more, or None",
    "steps_per_trial": "a count; give a whole number of optimizer steps, 1 or more",
    "time_limit": "a time; give seconds, more than 0, or None for no limit",
    "dataset_size": "a count; give a whole number of samples, 1 or more, or None",
    "latency_limit": "a time; give seconds, more than 0, or None for no limit",
    "percentile": "a percentile; give a number above 0 and up to 100, or None for 99",
}


def _index(value: Any) -> Any:
    """A whole number of any make, NumPy's too; a truth value is none."""
    is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
    return value.__index__() if is_whole else value


def _limit(value: Any) -> Any:
    parse_memory_limit(value)
    return value


Count = Annotated[int, BeforeValidator(_index), Field(ge=1, strict=True)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]


@dataclass(frozen=True, slots=True)
class LatencyLimit:
    """Limit on the time of one inference call.

    Args:
        seconds: Longest time of a call.
        percentile: Percentage of all calls that have to meet it.
    """

    seconds: float
    percentile: float


class Settings(BaseModel):
    """What was asked, checked.

    Args:
        target_batch_size: Samples per optimizer update, over all ranks; None for the largest micro-batch that fits.
        memory_limit: A share of the device, bytes, or text such as "10GiB".
        max_micro_batch_size: The largest micro-batch to consider.
        steps_per_trial: Optimizer steps per trial.
        time_limit: Seconds for the search.
        dataset_size: Samples per epoch.
        latency_limit: Seconds within which a batch has to be answered; None where that is not asked.
        percentile: So many percent of the calls have to be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_batch_size: Count | None
    memory_limit: Annotated[float | int | str, BeforeValidator(_limit)]
    max_micro_batch_size: Count | None
    steps_per_trial: Count
    time_limit: Annotated[Seconds, Field(gt=0)] | None
    dataset_size: Count | None
    # As in reports from before there was a limit on latency
    latency_limit: Annotated[Seconds, Field(gt=0)] | None = None
    percentile: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False, strict=True)] = 99

    @model_validator(mode="after")
    def _has_one_aim(self) -> Settings:
        if self.latency_limit is not None and self.target_batch_size is not None:
            raise ValueError(
                f"latency_limit={self.latency_limit:g} is about inference, which has no updates for "
                f"target_batch_size={self.target_batch_size} to count the samples of; give one of the two."
            )
        return self

    @property
    def limit_on_latency(self) -> LatencyLimit | None:
        """Limit on the time of a call; None if there is none."""
        if self.latency_limit is None:
            return None
        return LatencyLimit(self.latency_limit, self.percentile)

    @classmethod
    def checked(cls, **values: Any) -> Settings:
        """The settings, or a ValueError with one sentence about the first that is wrong."""
        given = values.get("percentile")
        if given is None:
            values.pop("percentile", None)
        try:
            settings = cls(**values)
        except ValidationError as error:
            raise ValueError(_complaint(error)) from None
        if given is not None and settings.latency_limit is None:
            raise ValueError(
                f"percentile={given!r} says how many calls have to meet latency_limit, which was not given; give "
                "latency_limit as well, or leave percentile out."
            )
        return settings


def _complaint(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":  # a sentence of our own
        return str(first["ctx"]["error"])
    name = str(first["loc"][0])
    return f"{name}={first['input']!r} is not {_ALLOWED.get(name, 'a setting')}."
