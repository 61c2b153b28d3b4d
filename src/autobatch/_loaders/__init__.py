"""DataLoaders: their batch size, their order, and batches of their largest samples for trials."""

from __future__ import annotations
