"""Small state that a training step changes, kept before each micro-batch to undo a failed one."""

from __future__ import annotations

import operator
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.modules.batchnorm import _NormBase

from autobatch._memory.ledger import unobserved
from autobatch._trials.batches import leaves, map_leaves
from autobatch._trials.reachable import LARGE, PLAIN
from autobatch.lightning._compat import logged_results

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from autobatch.lightning._trainer import Trainer

# Elements of a tensor; a larger one is not copied before each micro-batch, its version shows if it
# was changed
_SMALL: Final = 4096
_CONTAINERS: Final = frozenset({list, dict, set, deque})
_OF_TORCH: Final = frozenset(vars(torch.nn.Module()))  # attributes that every module has


class NotUndoneError(Exception):
    """A failed micro-batch that cannot be undone; the message is the reason."""


class _Attributes:
    """The attributes of an object, and the entries of its small containers."""

    __slots__ = ("contents", "generators", "owner", "tensors", "values")

    def __init__(self, owner: dict[str, Any]) -> None:
        self.owner = owner
        self.values = owner.copy()
        self.contents: list[tuple[Any, Any]] = []  # a container, and its copy
        self.tensors: list[torch.Tensor] = []
        self.generators: list[torch.Generator] = []
        for name, value in owner.items():
            kind = type(value)
            if kind in PLAIN:
                continue
            if kind is torch.Tensor:
                self.tensors.append(value)
            elif kind in _CONTAINERS:
                if len(value) <= LARGE and name not in _OF_TORCH:
                    self.contents.append((value, value.copy()))
            elif kind is torch.Generator:
                self.generators.append(value)

    def restore(self) -> None:
        for name in self.owner.keys() - self.values.keys():
            del self.owner[name]
        self.owner.update(self.values)
        for container, entries in self.contents:
            container.clear()
            (container.extend if hasattr(container, "extend") else container.update)(entries)


class StepState:
    """Buffers, metrics and attributes of a module that a training step may change.

    Copies are made into the same memory each time: of running statistics, which the kernels of
    BatchNorm change without a new version, and of other small tensors.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        module = trainer.lightning_module
        parts = list(module.modules())
        self._device = module.device
        # Without torchmetrics being imported: its classes and those derived from them
        metrics = [vars(part) for part in parts if _is_metric(part)]
        self._objects = [vars(module), *metrics]
        self._buffers = [vars(part)["_buffers"] for part in parts if vars(part)["_buffers"]]
        self._normalizing = {
            id(buffer)
            for part in parts
            if isinstance(part, _NormBase)
            for buffer in part.buffers(recurse=False)
        }
        self._copied: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []

    def keep(self, batch: Any) -> Kept:
        """Keep the state before an attempt at a batch."""
        attributes = [_Attributes(owner) for owner in (*self._objects, *self._buffers)]
        small: list[torch.Tensor] = []
        large: list[torch.Tensor] = []
        for each in attributes:
            for tensor in each.tensors:
                # Copies go into the same tensor again, which inference tensors and leaves refuse
                if not tensor.requires_grad and not tensor.is_inference():
                    (small if self._is_copied(tensor) else large).append(tensor)
        generators = list(self._generators())
        generators += [one for each in attributes for one in each.generators]
        with unobserved(), torch.no_grad():
            self._prepare_copies(small)
            _copy(small, self._copies)
            random = [(each, each.get_state()) for each in generators]
        results = logged_results(self._trainer)
        logged = (vars(results), results, *map(vars, results.values()))
        return Kept(
            batch=map_leaves(_same, batch),
            attributes=attributes,
            logged=[(owner, owner.copy()) for owner in logged],
            small=small,
            copies=self._copies,
            versions=_versions((*large, *leaves(batch))),
            random=random,
        )

    def _prepare_copies(self, tensors: list[torch.Tensor]) -> None:
        """Make room for copies, unless there is from the time before."""
        same = len(tensors) == len(self._copied) and all(map(operator.is_, tensors, self._copied))
        if not same and list(map(_kind, tensors)) != list(map(_kind, self._copies)):
            self._copies = [torch.empty_like(each) for each in tensors]
        self._copied = tensors

    def _is_copied(self, tensor: torch.Tensor) -> bool:
        if tensor.layout is not torch.strided:
            return False
        return tensor.numel() <= _SMALL or id(tensor) in self._normalizing

    def _generators(self) -> Iterator[torch.Generator]:
        yield torch.default_generator
        if self._device.type == "cuda":
            yield torch.cuda.default_generators[self._device.index or 0]


@dataclass(frozen=True, slots=True)
class Kept:
    """State before an attempt.

    Args:
        batch: The batch, in containers of its own.
        attributes: Attributes of objects.
        logged: Collections of logged values, and what they held.
        small: Tensors whose values are kept.
        copies: Those values, until state is kept again.
        versions: Other tensors, and their versions.
        random: Generators, and their states.
    """

    batch: Any
    attributes: list[_Attributes]
    logged: list[tuple[dict[str, Any], dict[str, Any]]]
    small: list[torch.Tensor]
    copies: list[torch.Tensor]
    versions: list[tuple[torch.Tensor, int]]
    random: list[tuple[Any, torch.Tensor]]

    def restore(self) -> None:
        """Restore the state.

        Raises:
            NotUndoneError: The step has written into a tensor of which there is no copy.
        """
        for each in self.attributes:
            each.restore()
        for owner, values in self.logged:
            owner.clear()
            owner.update(values)
        for generator, state in self.random:
            generator.set_state(state)
        with unobserved(), torch.no_grad():
            _copy(self.copies, self.small)
        inputs = {id(leaf) for leaf in leaves(self.batch)}
        for tensor, version in self.versions:
            if tensor._version != version:
                what = "its batch" if id(tensor) in inputs else f"a {tuple(tensor.shape)} buffer"
                raise NotUndoneError(f"training_step writes into {what}")


def _copy(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    """Copy values, those of one dtype together: torch 2.13 copies mixed ones one by one."""
    pairs = list(zip(targets, sources, strict=True))
    for is_floating in (True, False):
        alike = [pair for pair in pairs if pair[0].is_floating_point() is is_floating]
        if alike:
            into, values = zip(*alike, strict=True)
            torch._foreach_copy_(list(into), list(values))


def _same(leaf: Any) -> Any:
    return leaf


def _is_metric(part: object) -> bool:
    return any(kind.__module__.startswith("torchmetrics.") for kind in type(part).__mro__)


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _versions(values: Iterable[Any]) -> list[tuple[torch.Tensor, int]]:
    return [
        (each, each._version)
        for each in values
        if isinstance(each, torch.Tensor) and not each.is_inference()  # those have no version
    ]
