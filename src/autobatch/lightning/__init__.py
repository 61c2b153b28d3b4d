"""AutoBatch and NoiseScale: callbacks for a Lightning Trainer."""

from __future__ import annotations

from autobatch.lightning._autobatch import AutoBatch
from autobatch.lightning._noise_scale import NoiseScale

__all__ = ["AutoBatch", "NoiseScale"]

# The public path: LightningCLI writes it into YAML files as class_path.
AutoBatch.__module__ = NoiseScale.__module__ = __name__
