"""A line that shows where a tuning run is: replaced on a terminal, elsewhere every few seconds."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from autobatch._memory import format_bytes
from autobatch._report.layout import glyphs_for
from autobatch._report.units import counted, plain, rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from autobatch._trials import Trial
    from autobatch._trials.context import Progress

_REDRAW_SECONDS: Final = 0.1  # between two steps of a trial that are shown
_FIRST_SECONDS: Final = 3.0  # until the first line of an output that keeps lines
_LINE_SECONDS: Final = 5.0  # until its next line
_ERASE: Final = str(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))

logger = logging.getLogger("autobatch")


@contextmanager
def progress(
    *, verbose: bool = True, clock: Callable[[], float] = time.monotonic
) -> Iterator[Progress]:
    """Show a tuning run on standard error: one line on a terminal, which is erased at the end.

    A pipe or a file gets a line every few seconds instead, and a notebook nothing. If the logger
    "autobatch" takes INFO, these lines go there. Each trial is in the log at level DEBUG.

    Args:
        verbose: False shows nothing, except in the log at level DEBUG.
        clock: Returns seconds.
    """
    stream = _standard_error() if verbose else None
    terminal = stream if stream and stream.is_terminal else None
    write_line = stream.write_line if stream and not terminal else None
    if verbose and logger.isEnabledFor(logging.INFO):
        write_line = partial(logger.info, "%s")
    shown = _Display(terminal, write_line, clock)
    try:
        yield shown
    finally:
        shown.clear()


class _Display:
    """Shows the latest news of a tuning run: on a terminal, and in lines every few seconds."""

    def __init__(
        self,
        terminal: _Stream | None,
        write_line: Callable[[str], None] | None,
        clock: Callable[[], float],
    ) -> None:
        self._terminal, self._write_line, self._clock = terminal, write_line, clock
        self._redraw_at = 0.0
        self._next_line_at = clock() + _FIRST_SECONDS
        self._part = self._phase = ""
        self._batch_size: int | None = None
        self._trials = 0
        self._fits: int | None = None
        self._failures: set[int] = set()
        self._phase_ends: float | None = None

    def begin_part(self, part: str) -> None:
        self._part = part

    def begin(self, phase: str, seconds: float | None) -> None:
        self._phase, self._batch_size = phase, None
        self._fits, self._failures = None, set()
        self._phase_ends = None if seconds is None else self._clock() + seconds
        self._show()

    def trying(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._show()

    def stepped(self) -> None:
        if self._clock() >= self._redraw_at:
            self._show()

    def tried(self, trial: Trial, *, best: int | None, budget: int) -> None:
        self._trials += 1
        self._fits = best
        if not trial.fits:
            self._failures.add(trial.batch_size)
        if logger.isEnabledFor(logging.DEBUG):
            self.clear()  # the log may go to the same terminal
            logger.debug("%s", _fit(trial, budget) if trial.fits else trial.failure(budget))

    def clear(self) -> None:
        """Erase the line on the terminal."""
        if self._terminal is not None:
            self._terminal.replace_line("")

    def _show(self) -> None:
        now = self._clock()
        self._redraw_at = now + _REDRAW_SECONDS
        if self._write_line is not None and now >= self._next_line_at:
            self._next_line_at = now + _LINE_SECONDS
            self.clear()
            self._write_line(self._text(now))
        if self._terminal is not None:
            self._terminal.replace_line(self._text(now))

    def _text(self, now: float) -> str:
        parts = (
            "autobatch",
            self._part,
            self._phase,
            f"batch size {self._batch_size:,}" if self._batch_size else "",
            counted(self._trials, "trial") if self._trials else "",
            self._bracket,
            "" if self._phase_ends is None else f"{max(0.0, self._phase_ends - now):,.0f} s left",
        )
        return " · ".join(part for part in parts if part)

    @property
    def _bracket(self) -> str:
        """The sizes between which the search goes on."""
        fails = min((size for size in self._failures if size > (self._fits or 0)), default=None)
        if self._fits is None:
            return "" if fails is None else f"{fails:,} does not fit"
        return f"{self._fits:,} fits" + ("" if fails is None else f", {fails:,} does not")


def _standard_error() -> _Stream | None:
    """Return the stream to write to; None if there is none, and in a notebook."""
    # A progress bar of rich may stand in for it, and keeps what does not end with a line break
    file = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    if file is None:
        return None
    console = Console(file=file)
    return None if console.is_jupyter else _Stream(file, console)


class _Stream:
    """A stream that is not written to any more once that has failed.

    Not rich's Live: it expects to begin on an empty line, and here may be the progress bar of a
    Trainer, which draws itself anew on the same line. A Console ends the process at a closed pipe
    (rich 15.0, `Console.on_broken_pipe`).
    """

    def __init__(self, file: Any, console: Console) -> None:
        self.is_terminal = (
            is_a_terminal(file) and console.is_interactive and not console.legacy_windows
        )
        self._file: Any | None = file
        self._glyphs = glyphs_for(getattr(file, "encoding", None))
        self._console = console
        self._shown = ""

    def write_line(self, line: str) -> None:
        self._write(f"{self._glyphs.spell(line)}\n")

    def replace_line(self, line: str) -> None:
        """Show another text on the same line of the terminal."""
        if line == self._shown:
            return
        self._shown = line
        text = Text(self._glyphs.spell(line))
        text.truncate(self._console.width - 1)
        self._write(f"{_ERASE}{text.plain}")

    def _write(self, text: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(text)
            if hasattr(self._file, "flush"):
                self._file.flush()
        except Exception as error:
            self._file = None
            logger.warning("The progress of tuning cannot be shown: %s", plain(repr(error)))


def is_a_terminal(file: Any) -> bool:
    """Return whether a file, or whatever stands in for one, is a terminal."""
    try:
        return bool(file.isatty())
    except (AttributeError, ValueError):  # not a file, or closed
        return False


def _fit(trial: Trial, budget: int) -> str:
    peak = f"peak {format_bytes(trial.peak)} of {format_bytes(budget)}" if trial.peak else ""
    speed = f"{rounded(trial.samples_per_second)} samples/s" if trial.samples_per_second else ""
    measured = ", ".join(filter(None, (peak, speed)))
    return f"batch_size={trial.batch_size} fits{f': {measured}' if measured else ''}"
