"""Undo changes, whatever interrupts them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable


class Undo(ExitStack):
    """Undoes changes on leaving, the latest first; each is registered before it is made.

    Ctrl-C may come at any line. Every undo is therefore called twice: the second call completes one
    that was interrupted, and has to change nothing otherwise. The lines in between are those of
    `ExitStack`, which calls the others after an exception in one. A subclass makes its changes in
    `start`.
    """

    def __enter__(self) -> Self:
        try:
            self.start()
            return self  # noqa: TRY300 -- an interrupt may come here as well
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Make the changes of this object."""

    def add(self, undo: Callable[[], object]) -> None:
        """Register an undo before the change is made."""
        self.callback(undo)
        self.callback(undo)

    def hook(self, register: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        """Register a hook of torch, and remove it on leaving."""
        handles: list[Any] = []
        self.add(lambda: [handle.remove() for handle in handles])
        handles.append(register(*arguments, **keywords))


class Absent:
    """Value of an attribute that an object did not have; a class, which copies and pickles keep."""


class patched(Undo):  # noqa: N801 -- reads as what it does: with patched(owner, name=value)
    """Replace attributes of an object while the body runs, and restore exactly what was there.

    A value goes into the `vars` of the object, where it hides a method or an attribute of the
    class, and is deleted from there if the object had none of its own. Properties are set, and so
    are attributes of a class. A class rather than a generator, so that a callback that holds one
    can be copied and pickled: it calls `apply` and `restore`.

    Example:
        >>> with patched(loop, setup_data=replacement):  # doctest: +SKIP
        ...     trainer.validate(model)
    """

    def __init__(self, owner: Any, **values: Any) -> None:
        super().__init__()
        self._owner = owner
        self._values = values
        self._former: dict[str, Any] = {}  # of the names that are replaced now

    def start(self) -> None:
        # Not `add`, which keeps a closure: no pickle takes one
        self.push(self.restore)
        self.push(self.restore)
        self.apply()

    def apply(self) -> None:
        """Replace the attributes until `restore`."""
        for name, value in self._values.items():
            self._former[name] = _own(self._owner, name)
            _set(self._owner, name, value)

    def restore(self, *_: object) -> None:
        """Restore what was there; a second call changes nothing, or completes the first."""
        while self._former:
            name, former = next(reversed(self._former.items()))
            if former is not Absent:
                if _own(self._owner, name) is not former:  # a class may have refused the value
                    _set(self._owner, name, former)
            elif not isinstance(self._owner, type):
                vars(self._owner).pop(name, None)
            elif name in vars(self._owner):
                delattr(self._owner, name)
            del self._former[name]


def _own(owner: Any, name: str) -> Any:
    if _is_property(owner, name):
        return getattr(owner, name)
    return vars(owner).get(name, Absent)


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, type) or _is_property(owner, name):
        setattr(owner, name, value)
    else:
        vars(owner)[name] = value


def _is_property(owner: Any, name: str) -> bool:
    return hasattr(getattr(type(owner), name, None), "__set__")
