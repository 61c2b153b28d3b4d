"""A file that is written whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write"]


def write(path: Path, content: bytes) -> None:
    """Write all of a file or nothing: a reader never sees half a report."""
    half = path.with_name(f".{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            half.write_bytes(content)
            half.replace(path)
        finally:
            half.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"The report could not be written to {path}: {error.strerror}; give a path that can be."
        ) from error
