"""Small state that a training step changes, kept before each micro-batch to undo a failed one."""

from __future__ import annotations

import operator
from collections import defaultdict, deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.modules.batchnorm import _NormBase

from autobatch._memory.ledger import unobserved
from autobatch._trials.batches import leaves, map_leaves
from autobatch._trials.reachable import LARGE, PLAIN
from autobatch.lightning._compat import logged_results

if TYPE_CHECKING:
    from collections.abc import Iterable

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

    Running statistics, which the kernels of BatchNorm change without a new version, and other small
    tensors are copied before each micro-batch.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        module = trainer.lightning_module
        parts = list(module.modules())
        self._generators = [torch.default_generator]
        if module.device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[module.device.index or 0])
        # Without torchmetrics being imported: its classes and those derived from them
        self._objects = [vars(module), *(vars(part) for part in parts if is_metric(part))]
        self._owners = [vars(part)["_buffers"] for part in parts if vars(part)["_buffers"]]
        self._normalizing = {
            id(buffer)
            for part in parts
            if isinstance(part, _NormBase)
            for buffer in part.buffers(recurse=False)
        }
        self._seen: list[torch.Tensor | None] = []  # all buffers, sorted into those that follow
        self._small: list[list[torch.Tensor]] = []
        self._large: list[torch.Tensor] = []

    def keep(self, batch: Any) -> Kept:
        """Keep the state before an attempt at a batch."""
        noted: list[Any] = []
        containers = map_leaves(partial(_noted, noted), batch)
        attributes = [_Attributes(owner) for owner in self._objects]
        owners = list(map(dict.copy, self._owners))
        buffers = [tensor for owner in owners for tensor in owner.values()]
        if len(buffers) != len(self._seen) or not all(map(operator.is_, buffers, self._seen)):
            self._sort(buffers)
        noted += self._large
        generators = list(self._generators)
        small: list[torch.Tensor] = []
        for each in attributes:
            generators += each.generators
            for tensor in each.tensors:
                (small if self._is_copied(tensor) else noted).append(tensor)
        with unobserved(), torch.no_grad():
            copies = [(alike, _flat(alike)) for alike in self._small]
            copies += [([tensor], tensor.clone()) for tensor in small]
        results = logged_results(self._trainer)
        logged = (vars(results), results, *map(vars, results.values()))
        return Kept(
            batch=containers,
            attributes=attributes,
            entries=[
                *zip(self._owners, owners, strict=True),
                *((owner, owner.copy()) for owner in logged),
            ],
            copies=copies,
            versions=_versions(noted),
            random=[(each, each.get_state()) for each in generators],
        )

    def _sort(self, buffers: list[torch.Tensor | None]) -> None:
        """Sort buffers into large ones, and groups of small ones that are copied together."""
        groups: dict[Any, list[torch.Tensor]] = defaultdict(list)
        self._seen, self._large = buffers, []
        for each in buffers:
            if each is not None and self._is_copied(each):
                groups[each.dtype, each.device, min(each.ndim, 2)].append(each)
            elif each is not None:
                self._large.append(each)
        self._small = list(groups.values())

    def _is_copied(self, tensor: torch.Tensor) -> bool:
        # Copies go into the same tensor again, which leaves and, in training, inference tensors refuse
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            return False
        if tensor.requires_grad or tensor.layout is not torch.strided:
            return False
        return tensor.numel() <= _SMALL or id(tensor) in self._normalizing


@dataclass(frozen=True, slots=True)
class Kept:
    """State before an attempt.

    Args:
        batch: The batch, in containers of its own.
        attributes: Attributes of objects.
        entries: Dictionaries of buffers and of logged values, and what they held.
        copies: Tensors, and their values one after the other.
        versions: Other tensors, and their versions.
        random: Generators, and their states.
    """

    batch: Any
    attributes: list[_Attributes]
    entries: list[tuple[dict[str, Any], dict[str, Any]]]
    copies: list[tuple[list[torch.Tensor], torch.Tensor]]
    versions: list[tuple[torch.Tensor, int]]
    random: list[tuple[Any, torch.Tensor]]

    def restore(self) -> None:
        """Restore the state.

        Raises:
            NotUndoneError: The step has written into a tensor of which there is no copy.
        """
        for each in self.attributes:
            each.restore()
        for owner, entries in self.entries:
            owner.clear()
            owner.update(entries)
        for generator, state in self.random:
            generator.set_state(state)
        with unobserved(), torch.no_grad():
            for tensors, values in self.copies:
                of_each = values.flatten().split([tensor.numel() for tensor in tensors])
                for tensor, value in zip(tensors, of_each, strict=True):
                    tensor.copy_(value.view(tensor.shape))
        inputs = {id(leaf) for leaf in leaves(self.batch)}
        for tensor, version in self.versions:
            if tensor._version != version:
                what = "its batch" if id(tensor) in inputs else f"a {tuple(tensor.shape)} buffer"
                raise NotUndoneError(f"training_step writes into {what}")


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the values of tensors that have the same dtype and, up to two, dimensions.

    A copy of each takes two to four times as long.
    """
    if tensors[0].ndim == 0:
        return torch.stack(tensors)
    return torch.cat(tensors if tensors[0].ndim == 1 else [each.flatten() for each in tensors])


def _noted(noted: list[Any], leaf: Any) -> Any:
    noted.append(leaf)
    return leaf


def is_metric(part: object) -> bool:
    """Return True for a metric of torchmetrics, without importing it."""
    return any(kind.__module__.startswith("torchmetrics.") for kind in type(part).__mro__)


def _versions(values: Iterable[Any]) -> list[tuple[torch.Tensor, int]]:
    return [
        (each, each._version)
        for each in values
        if isinstance(each, torch.Tensor) and not each.is_inference()  # those have no version
    ]
