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
        rule: "linear" (arXiv 1706.02677) or "square root" (arXiv 2205.10287).
    """

    optimizer: str
    rule: Literal["linear", "square root"]

    def factor(self, batches: float) -> float:
        """What multiplies the learning rate where the effective batch is multiplied by `batches`."""
        return batches if self.rule == "linear" else math.sqrt(batches)


def rule_for(optimizer: object) -> LearningRateRule | None:
    """The rule for an optimizer, by its class or one it extends; None where no rule is known."""
    return _rule_of(type(optimizer))


def common_rule(kinds: Iterable[type]) -> LearningRateRule | None:
    """The one rule for optimizers of these classes; None where there is none, or not one for all."""
    names = sorted(kinds, key=lambda kind: kind.__name__)
    rules = [_rule_of(kind) for kind in names]
    known = [rule for rule in rules if rule is not None]
    if not known or len(known) < len(rules) or len({rule.rule for rule in known}) > 1:
        return None
    return LearningRateRule(
        " and ".join(rule.optimizer for rule in known), known[0].rule
    )


def _rule_of(kind: type) -> LearningRateRule | None:
    for ancestor in kind.__mro__:
        if ancestor.__name__ in _LINEAR:
            return LearningRateRule(kind.__name__, "linear")
        if ancestor.__name__ in _SQUARE_ROOT:
            return LearningRateRule(kind.__name__, "square root")
    return None
