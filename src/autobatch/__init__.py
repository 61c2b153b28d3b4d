"""Memory-aware batch sizes: what fits, how to reach the effective batch, and what it costs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autobatch._estimate import Estimate, estimate
    from autobatch._find import find
    from autobatch._memory import MemoryProbe, MemoryReading
    from autobatch._noise import NoiseReading
    from autobatch._noise.loop import noise_scale
    from autobatch._plan import BatchPlan
    from autobatch._report import TuningReport
    from autobatch._search import Bisection
    from autobatch._search.guided import GuidedBisection
    from autobatch._trials import Outcome, Trial
    from autobatch.errors import AutobatchError, DoesNotFitError, ProbeError, ShortTrialError
    from autobatch.lightning import AutoBatch, NoiseScale

__all__ = [
    "AutoBatch",
    "AutobatchError",
    "BatchPlan",
    "Bisection",
    "DoesNotFitError",
    "Estimate",
    "GuidedBisection",
    "MemoryProbe",
    "MemoryReading",
    "NoiseReading",
    "NoiseScale",
    "Outcome",
    "ProbeError",
    "ShortTrialError",
    "Trial",
    "TuningReport",
    "estimate",
    "find",
    "noise_scale",
]

# Where each name lives. Nothing is loaded before it is asked for: the import stays light.
_HOMES = {
    "AutoBatch": "lightning",
    "AutobatchError": "errors",
    "BatchPlan": "_plan",
    "Bisection": "_search",
    "DoesNotFitError": "errors",
    "Estimate": "_estimate",
    "GuidedBisection": "_search.guided",
    "MemoryProbe": "_memory",
    "MemoryReading": "_memory",
    "NoiseReading": "_noise",
    "NoiseScale": "lightning",
    "Outcome": "_trials",
    "ProbeError": "errors",
    "ShortTrialError": "errors",
    "Trial": "_trials",
    "TuningReport": "_report",
    "estimate": "_estimate",
    "find": "_find",
    "noise_scale": "_noise.loop",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lightning-autobatch")
    if name == "transformers":  # a module, without a name in `__all__`
        return importlib.import_module(f"{__name__}.transformers")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
