"""Notice whether `configure_optimizers` reads the batch size, the accumulation or the loader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

from torch.utils.data import DataLoader

from autobatch._trials.batches import leaves
from autobatch._undo import Absent, Undo, patched
from autobatch.lightning._attribute import holders
from autobatch.lightning._compat import data_source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autobatch.lightning._trainer import Trainer

# Methods of mappings that return an entry; `**mapping` iterates
_ENTRY_METHODS: Final = ("__getitem__", "__getattr__", "get", "pop", "items", "values", "__iter__")
_LENGTH_METHODS: Final = ("__len__", "__iter__")


class BatchSizeReads(Undo):
    """Notices reads of whatever a plan changes, while it is entered.

    The classes of the objects have other descriptors and methods meanwhile. An object whose class
    cannot be changed, such as a dict, counts as read.

    Args:
        trainer: The Trainer, whose accumulation a plan changes.
        name: Attribute or hyperparameter that holds the batch size.
    """

    def __init__(self, trainer: Trainer, name: str) -> None:
        super().__init__()
        self.happened = False
        self._trainer = trainer
        self._name = name

    def start(self) -> None:
        self._watch_attribute(self._trainer, "accumulate_grad_batches")
        for holder in holders(self._trainer.lightning_module, self._name):
            if isinstance(holder.owner, Mapping):
                self._watch_methods(holder.owner, _ENTRY_METHODS, holder.key)
            else:
                self._watch_attribute(holder.owner, holder.key)
        for loader in leaves(data_source(self._trainer.fit_loop).instance):
            if isinstance(loader, DataLoader):
                for part in (loader, loader.batch_sampler):
                    self._watch_attribute(part, "batch_size")
                    self._watch_methods(part, _LENGTH_METHODS, None)

    def _note(self) -> None:
        self.happened = True

    def _watch_attribute(self, owner: Any, name: str) -> None:
        former = getattr(type(owner), name, Absent)
        if hasattr(former, "__set__"):  # a property may read its value from anywhere
            self._note()
        else:
            self._replace(owner, name, _NotingAttribute(owner, name, former, self._note))

    def _watch_methods(self, owner: Any, names: Sequence[str], key: str | None) -> None:
        for name in names:
            method = getattr(type(owner), name, None)
            if method is not None:
                self._replace(owner, name, _noting(method, owner, key, self._note))

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        patch = patched(type(owner), **{name: value})
        self.add(patch.restore)
        try:
            patch.apply()
        except TypeError:  # a class that is not written in Python
            self._note()


@dataclass(frozen=True, slots=True)
class _NotingAttribute:
    """Stands in for an attribute in a class, and calls a function if that of one object is read."""

    owner: Any
    name: str
    former: Any  # in the class
    note: Callable[[], None]

    def __get__(self, instance: Any, kind: type) -> Any:
        if instance is not None:
            if instance is self.owner:
                self.note()
            if self.name in vars(instance):
                return vars(instance)[self.name]
        if self.former is Absent:
            raise AttributeError(f"{kind.__name__!r} object has no attribute {self.name!r}")
        bind = getattr(self.former, "__get__", None)
        return self.former if bind is None else bind(instance, kind)

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self.name] = value

    def __delete__(self, instance: Any) -> None:
        if vars(instance).pop(self.name, Absent) is Absent:
            raise AttributeError(self.name)


def _noting(
    method: Callable[..., Any], owner: Any, key: str | None, note: Callable[[], None]
) -> Callable[..., Any]:
    """Return a method that calls `note` if it reads `key`, or everything, of one object."""

    @wraps(method)
    def noting(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self is owner and (not arguments or arguments[0] == key):
            note()
        return method(self, *arguments, **keywords)

    return noting
