"""Objects of libraries that hold what a loop trains: an Accelerator, a Fabric."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._trials.reachable import LARGE, attributes_of, has_state, library_of, reachable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from autobatch._trials.reachable import Reached

_MOST: Final = 5_000  # values that are looked at, for one object
_CONTAINERS: Final = (list, tuple, set, deque, dict)


def with_state(workload: Callable[..., Any]) -> list[Reached]:
    """Return what a workload can reach that has a state, and the parts of holders."""
    reached = reachable(workload)
    return [*(each for each in reached if has_state(each.value)), *parts_of_holders(reached)]


def parts_of_holders(reached: Iterable[Reached]) -> list[Reached]:
    """Return objects of libraries that hold anything with a state, each with its parts.

    A library counts steps in such objects, and remembers loaders and optimizers. Their parts are
    objects of the same library, and what has a state. Objects that hold no state are left alone:
    loggers and progress bars.
    """
    seen: set[int] = set()
    found: list[Reached] = []
    for each in reached:
        library = library_of(each.value)
        if library is None or id(each.value) in seen:
            continue
        parts = _parts_of(each, library)
        seen.update(id(part.value) for part in parts)
        if any(has_state(part.value) for part in parts):
            found.extend(parts)
    return found


def _parts_of(holder: Reached, library: str) -> list[Reached]:
    parts: list[Reached] = []
    pending, opened, looked_at = deque([holder]), {id(holder.value)}, 0
    while pending and looked_at < _MOST:
        reached = pending.popleft()
        if not isinstance(reached.value, _CONTAINERS):
            parts.append(reached)
        for each in _inside(reached):
            looked_at += 1
            value = each.value
            is_part = has_state(value) or library_of(value) == library
            is_opened = isinstance(value, _CONTAINERS) and len(value) <= LARGE
            if (is_part or is_opened) and id(value) not in opened:
                opened.add(id(value))
                pending.append(each)
    return parts


def _inside(reached: Reached) -> Iterator[Reached]:
    """Yield entries of a container and attributes of an object, none of what has a state."""
    value = reached.value
    if isinstance(value, _CONTAINERS):
        yield from reached.entries()
    elif not (has_state(value) or isinstance(value, torch.Tensor)):
        for name, each in (attributes_of(value) or {}).items():
            yield reached.part(f"{reached.name}.{name}", each)
