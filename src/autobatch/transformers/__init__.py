"""tune() and tune_evaluation(): batch sizes and accumulation of a `transformers.Trainer`."""

from __future__ import annotations

from autobatch.transformers._tune import tune
from autobatch.transformers._tune_evaluation import tune_evaluation

__all__ = ["tune", "tune_evaluation"]
