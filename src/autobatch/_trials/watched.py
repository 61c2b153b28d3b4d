"""Variables, attributes and containers of the user that a trial changes and nothing restores."""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._trials.reachable import LARGE, PLAIN, attributes_of, reachable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CHANGING: Final = (list, set, deque, dict)


class Watched:
    """Variables, attributes and containers of the user, to see which of them change.

    Their values are not held: a tensor that training would free must not stay on the device.
    """

    def __init__(self, workload: Callable[..., Any], restored: Sequence[Any]) -> None:
        self._workload = workload
        self._restored = set(map(id, restored))  # besides objects with a state_dict
        self._before = self._observed()

    def changed(self) -> list[str]:
        """Return the names of those that differ by now."""
        now = self._observed()
        return [name for name, before in self._before.items() if before != now.get(name, before)]

    def _observed(self) -> dict[str, Any]:
        observed: dict[str, Any] = {}
        for each in reachable(self._workload):
            is_watched = each.is_variable or isinstance(each.value, _CHANGING)
            if is_watched and id(each.value) not in self._restored:
                observed.setdefault(each.name, _observation(each.value))
        return observed


class _Identity:  # noqa: PLW1641 -- a mutable observation, kept in no set
    """The identity of a value that is not held: another may get its address once it has died."""

    __slots__ = ("_key", "_reference")

    def __init__(self, value: Any) -> None:
        self._key = id(value)
        try:
            self._reference: Callable[[], Any] = weakref.ref(value)
        except TypeError:  # of a list, say, which cannot be told from its successor
            self._reference = lambda: True

    def __eq__(self, other: object) -> bool:
        is_same = isinstance(other, _Identity) and self._key == other._key
        return is_same and self._reference() is not None


def _observation(value: Any) -> tuple[Any, ...]:
    """Return what differs once a value has changed: entries, writes of a tensor, identity."""
    if type(value) in PLAIN:
        return (type(value), value)
    if isinstance(value, torch.Tensor):
        # Private name of torch 2.6 to 2.13: how often a tensor was written
        return (_Identity(value), None if value.is_inference() else value._version)  # noqa: SLF001
    if not isinstance(value, _CHANGING):
        return (_Identity(value), *(attributes_of(value) or ()))
    if len(value) > LARGE:
        return (_Identity(value), len(value))
    entries = [*value, *(value.values() if isinstance(value, dict) else ())]
    return (*map(_entry, entries),)


def _entry(value: Any) -> Any:
    if isinstance(value, tuple):
        return (*map(_entry, value),)
    return value if type(value) in PLAIN else _Identity(value)
