"""Calls of a workload, timed one by one, with the sizes taking turns."""

from __future__ import annotations

from contextlib import ExitStack, closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from autobatch._memory import is_oom
from autobatch._trial import Run, clean_up, compiles, forget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from autobatch._trial import Bench, Workload

__all__ = ["Calls"]

_TURN: Final = 10  # calls that a size has in its turn, one after the other
_TURN_SECONDS: Final = 0.5  # after which the turn of a slow one is over
_WARM_UP: Final = 2  # calls before those, which find the device as another size left it


class Calls:
    """Times calls; one by one, with the device waited for each time, and so with all that a caller would wait for.

    What a size takes differs from minute to minute: where sizes take turns, this falls on all of them alike. Only the
    first calls of each turn are left out, and those that had to start the workload anew.

    Args:
        workload: Answers one batch each time it yields.
        bench: What trials run on.
    """

    def __init__(self, workload: Workload, bench: Bench) -> None:
        self.seconds: dict[int, list[float]] = {}  # of each call, by size
        self.spent = 0.0  # seconds, all told
        self._workload = workload
        self._bench = bench
        self._took: dict[int, float] = {}  # seconds of the last turn, by size

    def rounds(
        self,
        sizes: Iterable[int],
        is_done: Callable[[Sequence[float]], bool],
        until: float,
    ) -> None:
        """Let sizes take turns until the calls of each are all it takes, or so many seconds are spent all told."""
        waiting = list(sizes)
        while waiting:
            waiting = [
                size
                for size in waiting
                if not is_done(self.seconds.get(size, ()))
                and self.affords(size, until)
                and self.turn(size)
            ]

    def affords(self, size: int, until: float) -> bool:
        """Whether the turn of a size should be over before so many seconds are spent."""
        smaller = max((each for each in self._took if each <= size), default=None)
        if smaller is None:
            return self.spent < until
        return self.spent + self._took[smaller] * size / smaller <= until

    def turn(self, size: int) -> bool:
        """Time some calls of one size; False where memory, which had room for its trial, has none any more."""
        clock = self._bench.probe.clock
        began = clock()
        try:
            self._turn(size)
        except Exception as error:
            if not is_oom(error):
                error.add_note(f"autobatch was timing batch_size={size}")
                raise
            forget(error)
            self.seconds[size] = []
        if not self.seconds[size]:
            clean_up(self._bench.probe)
        self._took[size] = clock() - began
        self.spent += self._took[size]
        return bool(self.seconds[size])

    def _turn(self, size: int) -> None:
        bench, clock = self._bench, self._bench.probe.clock
        bench.probe.release()
        run = Run(self._workload, size, 1)
        looking = nullcontext if compiles() else bench.first_touch
        anew: list[float] = []
        steady: list[float] = []
        with _capped(bench), closing(run):
            if size not in self.seconds:
                with looking():
                    run.step()
            for _ in range(_WARM_UP):
                run.step()
            until = clock() + _TURN_SECONDS
            while not steady or (len(steady) < _TURN and clock() < until):
                starts, began = run.starts, clock()
                run.step()
                kind = steady if run.starts == starts else anew
                kind.append(clock() - began)
                if len(anew) == _TURN:  # it never gets further than one call
                    break
        self.seconds.setdefault(size, []).extend(steady or anew)


@contextmanager
def _capped(bench: Bench) -> Iterator[None]:
    """Under the cap of the trials, unless what holds it watches every operator: that would slow the calls down."""
    with ExitStack() as held:
        watch = held.enter_context(bench.probe.limited(bench.budget()))
        if watch is not None:
            held.close()
        yield
