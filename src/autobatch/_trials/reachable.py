"""Objects that a workload can reach, and changes of those that no snapshot restores."""

from __future__ import annotations

import functools
import inspect
import sys
from collections import deque
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

LARGE: Final = 1000  # entries; a larger container holds data rather than state
# Types of values without parts that a trial could change
PLAIN: Final = frozenset({int, float, complex, bool, str, bytes, type(None)})
_MOST: Final = 20_000  # values that are looked at
_DEEPEST: Final = 12  # steps from the workload to a value
# Also where they are imported from a checkout
_LIBRARIES: Final = frozenset({"torch", "numpy", "lightning", "pytorch_lightning", "autobatch"})
# Base classes of the standard library that hold no state
_STATELESS: Final = frozenset({"builtins", "abc", "typing"})


@dataclass(frozen=True, slots=True)
class Reached:
    """A value that a workload can reach.

    Args:
        name: The name in the user's code, such as `holder.average`.
        value: The value.
        depth: Number of steps from the workload to the value.
        namespace: Attributes or variables of the user among which the value is, if it is.
        key: Its name there.
    """

    name: str
    value: Any
    depth: int
    namespace: Mapping[str, Any] | CellType | None = None
    key: str = ""

    def current(self) -> Any:
        """Return the value that has the name now."""
        if isinstance(self.namespace, CellType):
            return _content(self.namespace)
        return self.value if self.namespace is None else self.namespace.get(self.key)

    def part(self, name: str, value: Any) -> Reached:
        """Return a part that cannot get another value without a change of this one."""
        return Reached(name, value, self.depth + 1)

    def variables(
        self, namespace: Mapping[str, Any], keys: Sequence[str], prefix: str = ""
    ) -> Iterator[Reached]:
        """Yield the values of some names of a namespace."""
        for key in keys:
            yield Reached(f"{prefix}{key}", namespace[key], self.depth + 1, namespace, key)


def reachable(workload: Callable[..., Any]) -> list[Reached]:
    """Return what a workload can reach, the nearest first.

    That is its arguments, closure, globals and object; functions and classes of the user that are
    among these, and their globals; attributes and entries of all of them. Objects of libraries
    are not opened, except some of torch, and neither are containers of more than 1,000 entries.
    """
    pending = deque([Reached("", workload, 0)])
    found: list[Reached] = []
    opened: set[int] = set()
    while pending and len(found) < _MOST:
        reached = pending.popleft()
        found.append(reached)
        if type(reached.value) in PLAIN or id(reached.value) in opened:
            continue
        opened.add(id(reached.value))
        if reached.depth < _DEEPEST:
            pending.extend(_parts(reached))
    return found


def _parts(reached: Reached) -> Iterator[Reached]:
    value = reached.value
    if isinstance(value, functools.partial):
        yield reached.part(reached.name, value.func)
        arguments = [*enumerate(value.args), *value.keywords.items()]
        yield from (reached.part(str(key), each) for key, each in arguments)
    elif isinstance(value, MethodType):
        yield reached.part(reached.name, value.__func__)
        yield reached.part("self", value.__self__)
    elif isinstance(value, FunctionType):
        if reached.depth == 0 or is_own_module(value.__module__ or ""):
            yield from _variables_of(reached, value)
    elif isinstance(value, type):
        if is_own_module(value.__module__):
            yield from _attributes_of_class(reached, value)
    elif isinstance(value, (list, tuple, set, deque, dict)):
        if len(value) <= LARGE:
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            yield from (reached.part(f"{reached.name}[{key!r}]", each) for key, each in entries)
    elif isinstance(value, torch.nn.Module):
        # Its state is captured with all that it holds; its methods may use globals
        kinds = dict.fromkeys(map(type, value.modules()))
        yield from (reached.part(kind.__name__, kind) for kind in kinds)
    elif not isinstance(value, (torch.Tensor, torch.optim.Optimizer, ModuleType)):
        yield from _attributes_of_object(reached, value)


def _variables_of(reached: Reached, function: FunctionType) -> Iterator[Reached]:
    """Yield the free variables, globals, defaults and attributes of a function."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield Reached(name, _content(cell), reached.depth + 1, cell, name)
    names = _names(function.__code__)
    known = function.__globals__
    yield from reached.variables(known, [name for name in names if name in known])
    for name in names:
        module = known.get(name)
        if isinstance(module, ModuleType) and is_own_module(module.__name__):
            space = vars(module)
            its = [each for each in names if each in space]
            yield from reached.variables(space, its, prefix=f"{name}.")
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for each in (*defaults, *vars(function).values()):
        yield reached.part(f"{function.__name__}()", each)


def _names(code: CodeType) -> list[str]:
    """Return the names of globals and attributes in a function and the functions inside it."""
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    return list(dict.fromkeys([*code.co_names, *(name for one in inner for name in _names(one))]))


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable yet to come
        return None


def _attributes_of_class(reached: Reached, kind: type) -> Iterator[Reached]:
    space = vars(kind)
    keys = [key for key in space if not (key.startswith("__") and key.endswith("__"))]
    for each in reached.variables(space, keys, prefix=f"{kind.__name__}."):
        yield each
        method = getattr(each.value, "__func__", getattr(each.value, "fget", None))
        if method is not None:
            yield reached.part(each.name, method)
    for method in (space.get("__call__"), space.get("__iter__"), space.get("__next__")):
        yield reached.part(kind.__name__, method)
    yield from (reached.part(base.__name__, base) for base in kind.__bases__)


def _attributes_of_object(reached: Reached, value: Any) -> Iterator[Reached]:
    attributes = attributes_of(value)
    kind = type(value)
    if reached.depth == 0 or is_own_module(kind.__module__):
        if attributes is not None:
            name = reached.name or "self"
            yield from reached.variables(attributes, list(attributes), prefix=f"{name}.")
        yield reached.part(kind.__name__, kind)
    elif attributes is not None and (_is_of_torch(kind) or has_state_dict(value)):
        # A running iterator of a loader holds samples and workers
        names = [name for name in attributes if name != "_iterator"]
        yield from (reached.part(f"{reached.name}.{name}", attributes[name]) for name in names)


def _is_of_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def attributes_of(thing: object) -> dict[str, Any] | None:
    """Return the attributes of an object; None for classes, functions, and without writable ones."""
    if isinstance(thing, (type, ModuleType)) or inspect.isroutine(thing):
        return None
    attributes = getattr(thing, "__dict__", None)
    return attributes if isinstance(attributes, dict) else None


def has_state_dict(value: object) -> bool:
    """Return True for objects with a state that can be saved and loaded."""
    # Some DataLoaders have a state_dict that starts their workers
    if isinstance(value, (DataLoader, type)):
        return False
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def is_plain_object(value: object) -> bool:
    """Return True for an instance of a user's own class that holds state rather than data."""
    kind = type(value)
    if isinstance(value, (torch.nn.Module, Dataset, DataLoader, Sampler, type)):
        return False
    return _is_plain_class(kind) and not hasattr(kind, "train_dataloader")


def _is_plain_class(kind: type) -> bool:
    """Return True if a class and its bases are the user's: libraries restore their own state."""
    own = [base.__module__ for base in kind.__mro__ if base.__module__ not in _STATELESS]
    return bool(own) and all(map(is_own_module, own))


@functools.cache
def is_own_module(name: str) -> bool:
    """Return True for modules of the user: not installed, and not of the standard library."""
    root = name.partition(".")[0]
    if root in _LIBRARIES or root in sys.stdlib_module_names:
        return False
    module = sys.modules.get(root)
    paths = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return not any("-packages" in str(path) for path in paths)


class Watched:
    """Variables, attributes and containers of the user, to see which of them change.

    Args:
        reached: What a workload can reach.
        restored: Objects among these that are restored, with all that they hold.
    """

    def __init__(self, reached: Sequence[Reached], restored: Sequence[Any]) -> None:
        spaces = {id(attributes_of(each)) for each in restored}
        kept = {id(each) for each in restored}
        self._before = [
            (each, _contents(each.value))
            for each in reached
            if id(each.namespace) not in spaces and id(each.value) not in kept
        ]

    def changed(self) -> list[str]:
        """Return the names of those that differ by now."""
        names = [each.name for each, contents in self._before if _differs(each, contents)]
        return list(dict.fromkeys(names))


def _contents(value: Any) -> Any:
    """Return what a later comparison needs: entries of a container, writes of a tensor."""
    if isinstance(value, torch.Tensor):
        return None if value.is_inference() else value._version  # noqa: SLF001 -- no public name
    if isinstance(value, (list, set, deque, dict)) and len(value) <= LARGE:
        return list(value.items()) if isinstance(value, dict) else list(value)
    return len(value) if isinstance(value, (list, set, deque, dict)) else None


def _differs(before: Reached, contents: Any) -> bool:
    now = before.current()
    if now is not before.value:
        is_plain = type(now) in PLAIN and type(before.value) in PLAIN
        return not (is_plain and _equal(now, before.value))
    after = _contents(now)
    if isinstance(contents, list) and isinstance(after, list):
        return len(after) != len(contents) or not all(map(_equal, contents, after))
    return bool(contents != after)


def _equal(one: Any, other: Any) -> bool:
    """Compare plain values by value, and everything else by identity."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if type(one) in PLAIN and type(one) is type(other):
        return bool(one == other or one != one)  # noqa: PLR0124 -- NaN
    return one is other
