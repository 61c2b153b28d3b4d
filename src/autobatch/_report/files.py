"""Write files atomically."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4


def named(path: object, which: str) -> Path:
    """A path as it was given, refused where it is none; `which` says what it has to be."""
    try:
        return Path(path)  # type: ignore[arg-type]  # that it may not be one is the point
    except TypeError:
        raise ValueError(
            f"path={path!r} is not a path; give a str or a pathlib.Path {which}."
        ) from None


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
