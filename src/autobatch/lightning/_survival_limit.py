"""Size of the pieces that micro-batches begin with after memory ran out."""

from __future__ import annotations

import math
from typing import Final

# Micro-batches in pieces that have to succeed before pieces of twice the size are tried
_FIRST_WAIT: Final = 32


class PieceLimit:
    """The largest piece that a micro-batch begins with, in bytes of its tensors.

    A batch with longer samples is cut into more pieces than others. After a failure the limit is
    the piece that succeeded. It doubles after a number of micro-batches in pieces, and that number
    doubles with each further failure: a size that never fits is tried less and less.
    """

    def __init__(self) -> None:
        self._most: int | None = None  # bytes; None before the first failure
        self._good = 0  # micro-batches in pieces since the last change
        self._wait = _FIRST_WAIT

    @property
    def is_set(self) -> bool:
        """True after the first failure."""
        return self._most is not None

    def pieces(self, nbytes: int, samples: int) -> int:
        """Return the number of pieces for a batch."""
        return 1 if self._most is None else min(samples, math.ceil(nbytes / self._most))

    def fail(self, nbytes: int) -> None:
        """Take the bytes of the piece that a failed micro-batch was done in."""
        if self._most is not None:
            self._wait *= 2
        self._most, self._good = max(1, nbytes), 0

    def succeed(self, pieces: int) -> None:
        """Count a micro-batch without a failure."""
        if self._most is None or pieces == 1:
            return
        self._good += 1
        if self._good >= self._wait:
            self._most, self._good = 2 * self._most, 0
