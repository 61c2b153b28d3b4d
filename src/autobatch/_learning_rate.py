"""What a changed batch usually wants of the learning rate: the rule, and its factor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["LearningRateRule", "common_rule", "rule_for"]

_LINEAR: Final = {"SGD"}
_SQUARE_ROOT: Final = {
    "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adafactor", "SparseAdam",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LearningRateRule:
    """How a learning rate usually goes with the effective batch; printed, never applied.

    Args:
        optimizer: The class it is about.
        rule: "linear" (arXiv 1706.02677) or "square-root" (arXiv 2205.10287).
    """

    optimizer: str
    rule: Literal["linear", "square-root"]

    def factor(self, batches: float) -> float:
        """What multiplies the learning rate where the effective batch is multiplied by `batches`."""
        return batches if self.rule == "linear" else math.sqrt(batches)


def rule_for(optimizer: object) -> LearningRateRule | None:
    """The rule for an optimizer, by its class or one it extends; None where no rule is known."""
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _LINEAR:
            return LearningRateRule(type(optimizer).__name__, "linear")
        if kind.__name__ in _SQUARE_ROOT:
            return LearningRateRule(type(optimizer).__name__, "square-root")
    return None


def common_rule(optimizers: Iterable[object]) -> LearningRateRule | None:
    """The rule that all of these have; None where they differ, or where one has none."""
    rules = {rule_for(optimizer) for optimizer in optimizers}
    return rules.pop() if len(rules) == 1 else None
