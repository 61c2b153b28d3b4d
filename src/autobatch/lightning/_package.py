"""The installed Lightning package, its functions by path, and the names that it lacks."""

from __future__ import annotations

import importlib
import sys
from enum import StrEnum
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, get_type_hints

from autobatch.lightning._trainer import CombinedLoader, DataFetcher, LightningModule, Trainer

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTED: Final = "2.6.0 to 2.6.6"
_PACKAGES: Final = ("lightning.pytorch", "pytorch_lightning")


def _callback_class() -> type:
    """Return the Callback of the imported Lightning package, else of all installed ones.

    `lightning.pytorch` and `pytorch_lightning` are two packages, and neither knows the class of the
    other.
    """
    imported = [name for name in _PACKAGES if name in sys.modules]
    found = []
    for name in imported or _PACKAGES:
        try:
            found.append(importlib.import_module(name).Callback)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    if not found:
        raise ImportError(
            "AutoBatch needs Lightning, and neither package is installed: pip install "
            '"lightning-autobatch[lightning]", or "[pytorch-lightning]" for the other name.'
        )
    return type("Callback", tuple(found), {})


Callback: Any = _callback_class()


def package_of(thing: Any) -> str:
    """Return the name of the Lightning package a Trainer comes from; "" for any other object."""
    modules = (kind.__module__ for kind in type(thing).__mro__ if kind.__name__ == "Trainer")
    return next((name for module in modules for name in _PACKAGES if module.startswith(name)), "")


def package(trainer: Any) -> Any:
    """Return the Lightning package a Trainer comes from."""
    return sys.modules[package_of(trainer)]


class Imported(StrEnum):
    """Functions and classes of the Lightning package, by their paths."""

    CALL_CALLBACK_HOOKS = "trainer.call._call_callback_hooks"
    CALL_MODULE_HOOK = "trainer.call._call_lightning_module_hook"
    CALL_STRATEGY_HOOK = "trainer.call._call_strategy_hook"
    COMBINED_LOADER = "utilities.combined_loader.CombinedLoader"
    FETCHER = "loops.fetchers._PrefetchDataFetcher"
    REQUEST_LOADERS = "trainer.connectors.data_connector._request_dataloader"
    SAVE_HPARAMS = "core.saving.save_hparams_to_yaml"
    TUNER_EXIT = "utilities.exceptions._TunerExitException"
    TERMINATED = "utilities.exceptions.SIGTERMException"

    def of(self, trainer: Any) -> Any:
        """Return the object from the imported package a Trainer comes from."""
        return attrgetter(self)(package(trainer))


def missing_name(trainer: Any) -> str | None:
    """Return the first attribute that autobatch uses and this Lightning lacks, if any."""
    return next(_missing_names(trainer), None)


def _missing_names(trainer: Any) -> Iterator[str]:
    yield from _missing(trainer, Trainer)
    yield from _missing(trainer.lightning_module, LightningModule, "lightning_module.")
    for name in Imported:
        try:
            name.of(trainer)
        except AttributeError:
            yield name
    # These two have their attributes only once they are made
    loader, fetcher = Imported.COMBINED_LOADER.of(trainer)([]), Imported.FETCHER.of(trainer)()
    yield from _missing(loader, CombinedLoader, "CombinedLoader.")
    yield from _missing(fetcher, DataFetcher, "_DataFetcher.")


def _missing(owner: Any, protocol: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of the attributes that a protocol declares and an object lacks."""
    for name, kind in get_type_hints(protocol).items():
        # The class first: reading a property may do something, as `log_dir` does
        if not (hasattr(type(owner), name) or hasattr(owner, name)):
            yield path + name
        elif getattr(kind, "_is_protocol", False):
            yield from _missing(getattr(owner, name), kind, f"{path}{name}.")
