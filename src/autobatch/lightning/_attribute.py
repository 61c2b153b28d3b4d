"""The attributes and hyperparameters that name the batch size, in a module and its datamodule."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Final

from autobatch._undo import Absent
from autobatch.errors import AutobatchError
from autobatch.lightning._compat import hyperparameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEFAULT_NAME: Final = "batch_size"


def checked_name(batch_arg_name: str) -> str:
    """Return the name; `ValueError` if it cannot be one."""
    is_text = isinstance(batch_arg_name, str)
    if is_text and all(part.isidentifier() for part in batch_arg_name.split(".")):
        return batch_arg_name
    raise ValueError(
        f"batch_arg_name={batch_arg_name!r} is no name; give that of an attribute or "
        'hyperparameter, with dots for one inside of another: "data.batch_size".'
    )


def check_attribute(module: Any, name: str) -> None:
    """Raise `AutobatchError` if the batch size of this name cannot be set.

    Nothing needs to have the default name; any other was given by the user.
    """
    if name != DEFAULT_NAME and not holders(module, name):
        raise AutobatchError(_nothing_held(module, name))
    for holder in holders(module, name):
        restore = _restoring(holder)
        try:
            holder.set(holder.value)
        except Exception as error:
            raise AutobatchError(
                f"{name}={holder.value}, {holder.kind}, cannot be set to the batch size of a trial "
                f"or a plan ({_first_line(error)}); make it writable while the Trainer runs, or "
                "train without AutoBatch."
            ) from error
        restore()


class BatchSizeAttribute(AbstractContextManager["BatchSizeAttribute"]):
    """The batch size in all attributes and hyperparameters of a name, of a module and datamodule.

    A `with` statement writes back the one they had when this was made.
    """

    def __init__(self, module: Any, name: str) -> None:
        self._module = module
        self._name = name
        self._restores = list(map(_restoring, holders(module, name)))

    @property
    def exists(self) -> bool:
        """True if anything holds the batch size under this name."""
        return bool(holders(self._module, self._name))

    def set(self, batch_size: int) -> None:
        """Set the batch size wherever it is held now."""
        for holder in holders(self._module, self._name):
            holder.set(batch_size)

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        for restore in self._restores:
            restore()


@dataclass(frozen=True, slots=True)
class Holder:
    """A place that holds the batch size."""

    owner: Any  # an object with an attribute, or a mapping with an entry
    key: str  # name of the attribute or entry
    kind: str  # the place in words: "a hyperparameter of Model"

    @property
    def value(self) -> Any:
        return _read(self.owner, self.key)

    def set(self, value: Any) -> None:
        """Assign a value; an error of a closed owner passes."""
        if isinstance(self.owner, Mapping):
            self.owner[self.key] = value  # type: ignore[index]  # a closed mapping raises
        else:
            setattr(self.owner, self.key, value)


def holders(module: Any, name: str) -> list[Holder]:
    """Return all places of the module and its datamodule that hold a whole number of this name.

    A property without a setter computes its number from something else. It is passed over under the
    default name.
    """
    found = []
    for holder in _places(module, name):
        if name == DEFAULT_NAME and _is_computed(holder):
            continue
        if isinstance(holder.value, Integral) and not isinstance(holder.value, bool):
            found.append(holder)
    return found


def _places(module: Any, name: str) -> Iterator[Holder]:
    """Yield all places of this name, whatever they hold."""
    for root in (module, module.trainer.datamodule):
        yield from _followed(root, name, f"an attribute of {type(root).__name__}")
        for kept in hyperparameters(root):
            yield from _followed(kept, name, f"a hyperparameter of {type(root).__name__}")


def _followed(start: Any, name: str, kind: str) -> Iterator[Holder]:
    """Follow a dotted name through attributes and mappings; yield nothing if a part is missing."""
    *path, key = name.split(".")
    owner = start
    for part in path:
        owner = _read(owner, part)
    if _read(owner, key) is not Absent:
        yield Holder(owner, key, kind)


def _read(owner: Any, key: str) -> Any:
    try:
        if isinstance(owner, Mapping):
            return owner.get(key, Absent)
        return getattr(owner, key, Absent)
    except Exception:
        return Absent


def _is_computed(holder: Holder) -> bool:
    attribute = getattr(type(holder.owner), holder.key, None)
    return isinstance(attribute, property) and attribute.fset is None


def _restoring(holder: Holder) -> Callable[[], object]:
    """Return a function that writes back the present value of a place."""
    owner, key = holder.owner, holder.key
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and isinstance(owner, omegaconf.DictConfig):
        # An interpolation, such as "${data.batch_size}", stays one
        return partial(holder.set, omegaconf.OmegaConf.to_container(owner, resolve=False)[key])
    attribute = getattr(type(owner), key, Absent)
    of_class = attribute is not Absent and not hasattr(attribute, "__set__")
    if of_class and not isinstance(owner, Mapping) and key not in vars(owner):
        return partial(vars(owner).pop, key, None)
    return partial(holder.set, holder.value)


def _nothing_held(module: Any, name: str) -> str:
    for holder in _places(module, name):
        return (
            f"batch_arg_name={name!r} names a {type(holder.value).__name__}, and a batch size is "
            "a whole number; give the name of one."
        )
    return (
        f"batch_arg_name={name!r} is no attribute or hyperparameter of the module or its "
        "datamodule."
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
