"""tune(): batch size and accumulation of a `transformers.Trainer`."""

from __future__ import annotations

from autobatch.transformers._tune import tune

__all__ = ["tune"]
