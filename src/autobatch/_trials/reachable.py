"""Objects that a workload can reach, and parts of library objects that hold such with a state."""

from __future__ import annotations

import functools
import inspect
import random
import sys
from collections import deque
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LARGE: Final = 1000  # entries; a larger container holds data rather than state
# Types of values without parts that a trial could change
PLAIN: Final = frozenset({int, float, complex, bool, str, bytes, type(None)})
CONTAINERS: Final = (list, tuple, set, deque, dict)
_MOST: Final = 20_000  # values that are looked at
_MOST_OF_HOLDER: Final = 5_000  # the same, for one object of a library
_DEEPEST: Final = 12  # steps from the workload to a value
# Also where they are imported from a checkout
_LIBRARIES: Final = frozenset({"torch", "numpy", "lightning", "pytorch_lightning", "autobatch"})
# Their objects are captured by their types
_NO_HOLDERS: Final = frozenset({"torch", "numpy", "autobatch"})
# Base classes of the standard library that hold no state
_STATELESS: Final = frozenset({"builtins", "abc", "typing"})


@dataclass(frozen=True, slots=True)
class Reached:
    """A value that a workload can reach."""

    name: str  # in the user's code, such as `holder.average`
    value: Any
    depth: int  # steps from the workload to the value
    is_variable: bool = False  # it is a variable or an attribute of the user

    def part(self, name: str, value: Any) -> Reached:
        """Return a part that has no name of its own."""
        return Reached(name, value, self.depth + 1)

    def entries(self) -> Iterator[Reached]:
        entries = self.value.items() if isinstance(self.value, dict) else enumerate(self.value)
        return (self.part(f"{self.name}[{key!r}]", each) for key, each in entries)

    def variable(self, name: str, value: Any) -> Reached:
        """Return a value that has a name of its own."""
        return Reached(name, value, self.depth + 1, is_variable=True)


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
    elif isinstance(value, CONTAINERS):
        if len(value) <= LARGE:
            yield from reached.entries()
    elif isinstance(value, torch.nn.Module):
        # Its state is captured with all that it holds; its methods may use globals
        kinds = dict.fromkeys(map(type, value.modules()))
        yield from (reached.part(kind.__name__, kind) for kind in kinds)
    elif not isinstance(value, (torch.Tensor, torch.optim.Optimizer, ModuleType)):
        yield from _attributes_of_object(reached, value)


def _variables_of(reached: Reached, function: FunctionType) -> Iterator[Reached]:
    """Yield the free variables, globals, defaults and attributes of a function."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield reached.variable(name, _content(cell))
    names = _names(function.__code__)
    for name in names:
        value = function.__globals__.get(name)
        if not isinstance(value, ModuleType):
            yield reached.variable(name, value)
        elif is_own_module(value.__name__):
            its = [each for each in names if each in vars(value)]
            yield from (reached.variable(f"{name}.{each}", vars(value)[each]) for each in its)
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
    for key, value in vars(kind).items():
        name = f"{kind.__name__}.{key}"
        method = getattr(value, "__func__", getattr(value, "fget", None))
        if isinstance(value, FunctionType) or method is not None:
            yield reached.part(name, method or value)
        elif not (key.startswith("__") and key.endswith("__")):
            yield reached.variable(name, value)
    yield from (reached.part(base.__name__, base) for base in kind.__bases__)


def _attributes_of_object(reached: Reached, value: Any) -> Iterator[Reached]:
    attributes, kind = attributes_of(value) or {}, type(value)
    name, is_restored = reached.name or "self", has_state_dict(value)
    if reached.depth == 0 or is_own_module(kind.__module__):
        kept = reached.part if is_restored else reached.variable
        yield from (kept(f"{name}.{key}", each) for key, each in attributes.items())
        yield reached.part(kind.__name__, kind)
    elif kind.__module__.partition(".")[0] == "torch" or is_restored:
        # A running iterator of a loader holds samples and workers
        names = [key for key in attributes if key != "_iterator"]
        yield from (reached.part(f"{name}.{key}", attributes[key]) for key in names)


def attributes_of(thing: object) -> dict[str, Any] | None:
    """Return the attributes of an object; None of classes and functions, and without any."""
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


def has_state(value: object) -> bool:
    """Return True for models, optimizers, schedulers, scalers, averages and generators."""
    return has_state_dict(value) or is_generator(value)


def is_generator(value: object) -> bool:
    """Recognise the random number generators of torch, Python and NumPy."""
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if numpy := sys.modules.get("numpy"):
        kinds = (*kinds, numpy.random.Generator, numpy.random.RandomState)
    return isinstance(value, kinds)


def library_of(value: object) -> str | None:
    """Return the package that defines the class of an object, or a base of the user's class.

    None for Python's own objects, and those of torch, NumPy and this package.
    """
    for base in type(value).__mro__:
        root = base.__module__.partition(".")[0]
        if root in sys.stdlib_module_names or root in _NO_HOLDERS:
            return None
        if not is_own_module(base.__module__):
            return root
    return None


def is_plain_object(value: object) -> bool:
    """Return True for an instance of a user's own class that holds state rather than data."""
    kind = type(value)
    is_of_torch = isinstance(value, (torch.nn.Module, Dataset, DataLoader, Sampler))
    if is_of_torch or isinstance(value, type) or hasattr(kind, "train_dataloader"):
        return False
    # Libraries restore the state of their own bases
    homes = [base.__module__ for base in kind.__mro__ if base.__module__ not in _STATELESS]
    return bool(homes) and all(map(is_own_module, homes))


@functools.cache
def is_own_module(name: str) -> bool:
    """Return True for modules of the user: not installed, and not of the standard library."""
    root = name.partition(".")[0]
    if root in _LIBRARIES or root in sys.stdlib_module_names:
        return False
    module = sys.modules.get(root)
    paths = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return not any("-packages" in str(path) for path in paths)


def with_state(workload: Callable[..., Any]) -> list[Reached]:
    """Return what a workload can reach that has a state, and library objects that hold such.

    A library counts steps in these objects, and remembers loaders and optimizers. Each comes with
    its parts: objects of the same library, and what has a state. Objects that hold no state are
    left alone: loggers and progress bars.
    """
    reached = reachable(workload)
    found = [each for each in reached if has_state(each.value)]
    seen: set[int] = set()
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
    while pending and looked_at < _MOST_OF_HOLDER:
        reached = pending.popleft()
        if not isinstance(reached.value, CONTAINERS):
            parts.append(reached)
        for each in _inside(reached):
            looked_at += 1
            value = each.value
            is_part = has_state(value) or library_of(value) == library
            is_opened = isinstance(value, CONTAINERS) and len(value) <= LARGE
            if (is_part or is_opened) and id(value) not in opened:
                opened.add(id(value))
                pending.append(each)
    return parts


def _inside(reached: Reached) -> Iterator[Reached]:
    """Yield entries of a container and attributes of an object, none of what has a state."""
    value = reached.value
    if isinstance(value, CONTAINERS):
        yield from reached.entries()
    elif not (has_state(value) or isinstance(value, torch.Tensor)):
        for name, each in (attributes_of(value) or {}).items():
            yield reached.part(f"{reached.name}.{name}", each)
