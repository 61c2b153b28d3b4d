"""Memory curves measured on a GPU: `recordings/h200.json`, with lines between the sizes that ran.

A row holds batch size, reserved, allocated and requested bytes, and the outcome: fits, flushed (the
allocator emptied its cache in the first step, and fitted then) or out of memory. The three curves
at 125 GiB have few rows, since only the sizes of one search ran; the last row of ViT-B is the limit
by extrapolation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PATH = Path(__file__).parent / "recordings" / "h200.json"


@dataclass(frozen=True)
class MeasuredCurve:
    name: str
    budget: int
    resident: int
    points: tuple

    @property
    def largest(self):
        """Return the largest size that fits without a flush, by the line through the last two."""
        known = [point for point in self._fitting if point[4] == "fits"]
        (a, low, *_), (b, top, *_) = known[-2:]
        more = int((self.budget - top) * (b - a) / (top - low))
        failed = [size for size, *_, outcome in self.points if outcome != "fits" and size > b]
        return min(b + more, *(size - 1 for size in failed)) if failed else b + more

    def fits(self, size):
        outcomes = {point[0]: point[4] for point in self.points}
        if size in outcomes:
            return outcomes[size] != "out of memory"
        return size <= max(self.largest, self._fitting[-1][0])

    def peak(self, size):
        return self._between(size, 1)

    def allocated(self, size):
        """Return allocated bytes at a size; None if too few were read."""
        if any(point[2] is None for point in self._fitting):
            return None
        return self._between(size, 2)

    def requested(self, size):
        """Return requested bytes at a size; None if they were not read."""
        if any(point[3] is None for point in self._fitting):
            return None
        return self._between(size, 3)

    @property
    def _fitting(self):
        return [point for point in self.points if point[4] != "out of memory"]

    def _between(self, size, column):
        points = self._fitting
        sizes = [point[0] for point in points]
        if size <= sizes[-1]:
            return int(np.interp(size, sizes, [point[column] for point in points]))
        a, b = points[-2:]
        return int(b[column] + (size - b[0]) * (b[column] - a[column]) / (b[0] - a[0]))


def measured_curves():
    content = json.loads(PATH.read_text())
    return [
        MeasuredCurve(c["name"], c["budget"], c["resident"], tuple(map(tuple, c["points"])))
        for c in content["searches"]
    ]


def starts(curve):
    """Return the starts of the searches on a curve; 13 on all of them."""
    if curve.budget < 100 * 2**30:
        return (2, 8, 32)
    return (8, 32) if curve.name.startswith("GPT-2") else (32,)
