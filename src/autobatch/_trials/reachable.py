"""Objects that a workload can reach."""

from __future__ import annotations

import functools
import sys
from typing import Final

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

# Also where they are imported from a checkout
_LIBRARIES: Final = frozenset({"torch", "numpy", "lightning", "pytorch_lightning", "autobatch"})
# Base classes of the standard library that hold no state
_STATELESS: Final = frozenset({"builtins", "abc", "typing"})


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
