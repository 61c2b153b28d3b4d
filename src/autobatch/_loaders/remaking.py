"""Set the batch size of a loader in place, or by making its parts again as their classes do."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from torch.utils.data import BatchSampler, DataLoader

from autobatch._trials.snapshot import Snapshot
from autobatch._undo import Absent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Attributes of a DataLoader that have nothing to do with its batches, and may have been set since
# it was made
_KEPT: Final = {
    "num_workers",
    "pin_memory",
    "persistent_workers",
    "worker_init_fn",
    "_DataLoader__multiprocessing_context",
    "_iterator",
}


def sampler_of(loader: DataLoader[Any]) -> Any:
    """Return the sampler of single samples, which is not `loader.sampler` under a batch sampler."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def has_torch_iteration(loader: DataLoader[Any]) -> bool:
    """Check that the class of a loader leaves iteration to torch, and computes no part of it."""
    kind = type(loader)
    computed = any(hasattr(kind, name) for name in ("dataset", "sampler", "batch_sampler"))
    return kind.__iter__ is DataLoader.__iter__ and not computed


def samplers_of_same_size(loader: DataLoader[Any]) -> list[Any]:
    """Return the sampler of single samples if it has the batch size in an attribute, too."""
    sampler = sampler_of(loader)
    size = getattr(sampler, "__dict__", {}).get("batch_size", Absent)
    return [sampler] if size == getattr(loader.batch_sampler, "batch_size", None) else []


def resize(loader: DataLoader[Any], batch_size: int, samplers: Sequence[Any]) -> None:
    """Set the `batch_size` of a loader, of its batch sampler, and of some samplers."""
    for sampler in (loader.batch_sampler, *samplers):
        sampler.batch_size = batch_size
    if loader.batch_size is not None:
        # DataLoader refuses plain assignment; iteration uses the batch sampler
        object.__setattr__(loader, "batch_size", batch_size)
    for made in (loader, loader.batch_sampler, *samplers):
        _update_saved_arguments(made, batch_size)


def _update_saved_arguments(made: Any, batch_size: int) -> None:
    """Update the arguments from which Lightning 2.6 makes a loader again for several ranks."""
    saved = saved_arguments(made)
    if saved is None:
        return
    positional, keywords = saved.positional, saved.keywords
    if "batch_size" in saved.names:
        at = saved.names.index("batch_size")
        positional = (*positional[:at], batch_size, *positional[at + 1 :])
    elif "batch_size" in inspect.signature(type(made).__init__).parameters:
        keywords = {**keywords, "batch_size": batch_size}
    # Past the guards of a DataLoader
    object.__setattr__(made, "__pl_saved_args", positional)
    object.__setattr__(made, "__pl_saved_kwargs", keywords)


@dataclass(frozen=True, slots=True)
class Remaking:
    """Sets the batch size of a loader by making its parts again, where they are of other classes.

    A new part gives its attributes to the one that is there, which everybody may hold.
    """

    # An optional argument that is not passed on, in spite of an attribute of its name
    left_out: str | None = None

    def __call__(self, loader: DataLoader[Any], batch_size: int) -> None:
        """Set the batch size; `TypeError` if an argument of a part is not known."""
        if isinstance(getattr(loader.batch_sampler, "batch_size", None), int):
            resize(loader, batch_size, samplers_of_same_size(loader))
        with Snapshot():  # of the random numbers that a part may draw
            for part in remade_parts(loader):
                given = _arguments_of(part, batch_size, self.left_out)
                _take_over(part, type(part)(*given.positional, **given.keywords))


@dataclass(frozen=True, slots=True)
class SavedArguments:
    """Arguments of a loader or sampler made in a hook; Lightning copies it with them for ranks."""

    names: tuple[str, ...]  # of the positional arguments
    positional: tuple[Any, ...]  # their values
    keywords: dict[str, Any]  # the others


def saved_arguments(made: Any) -> SavedArguments | None:
    """Return the arguments Lightning saved of a loader or sampler; None if it saved none."""
    names = getattr(made, "__pl_saved_arg_names", None)
    if names is None:
        return None
    positional = getattr(made, "__pl_saved_args")
    return SavedArguments(names, positional, getattr(made, "__pl_saved_kwargs"))


def remade_parts(loader: DataLoader[Any]) -> list[Any]:
    """Return the samplers, and the loader, whose classes are others than torch's and take a size.

    A loader that leaves iteration to torch follows its batch sampler.
    """
    samplers = (sampler_of(loader), loader.batch_sampler)
    parts = [each for each in samplers if type(each) is not BatchSampler and _takes_size(each)]
    is_own = type(loader).__init__ is not DataLoader.__init__
    if is_own and not has_torch_iteration(loader) and _takes_size(loader):
        parts.append(loader)
    return parts


def arguments_left_open(loader: DataLoader[Any]) -> set[str]:
    """Return the names of arguments that were given, or computed from the size by default.

    Their attributes do not show which. Arguments Lightning saved are known.
    """
    return {
        name
        for part in remade_parts(loader)
        if saved_arguments(part) is None
        for name, parameter in inspect.signature(type(part)).parameters.items()
        if name in vars(part) and _stands_for_another(parameter.default)
    }


def _stands_for_another(default: Any) -> bool:
    is_number = isinstance(default, int) and not isinstance(default, bool)
    return default is None or (is_number and default <= 0)


def _takes_size(part: Any) -> bool:
    return hasattr(part, "__dict__") and "batch_size" in inspect.signature(type(part)).parameters


def _arguments_of(part: Any, batch_size: int, left_out: str | None) -> SavedArguments:
    """Return those Lightning saved in a hook, or else the attributes of the same names."""
    _update_saved_arguments(part, batch_size)
    saved = saved_arguments(part)
    if saved is not None:
        return saved
    return SavedArguments((), (), {**dict(_attributes(part, left_out)), "batch_size": batch_size})


def _attributes(part: Any, left_out: str | None) -> Iterator[tuple[str, Any]]:
    for name, parameter in inspect.signature(type(part)).parameters.items():
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and name in vars(part) and name != left_out:
            yield name, vars(part)[name]
        elif parameter.default is parameter.empty and name != "batch_size":
            raise TypeError(f"the argument {name} of a {type(part).__name__} is not known")


def _take_over(part: Any, made: Any) -> None:
    """Assign the attributes of a new object that differ: others may go on, as an epoch does."""
    for name, value in vars(made).items():
        if name not in _KEPT and not _is_equal(vars(part).get(name, Absent), value):
            vars(part)[name] = value


def _is_equal(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:  # of arrays and the user's classes: not known to be equal
        return False
