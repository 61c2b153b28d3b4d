"""Write files atomically."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4


def named(path: object, purpose: str) -> Path:
    """Return the argument `path` as a Path; `purpose` follows the word "Path" in the error."""
    try:
        file = Path(path)  # type: ignore[arg-type]  # that it may not be one is the point
    except TypeError:
        raise ValueError(
            f"path={path!r} is not a path; give a str or a pathlib.Path {purpose}."
        ) from None
    if not file.name:
        raise ValueError(f"path={str(path)!r} does not name a file; give a file {purpose}.")
    return file


def write(path: Path, content: bytes) -> None:
    """Write a file, so that a reader never sees a part of it."""
    partial = path.with_name(f".{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"The report could not be written to {path}: {error.strerror}; give a writable path."
        ) from error
