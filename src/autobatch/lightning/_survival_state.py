"""Small state that a training step changes, kept before each micro-batch to undo a failed one."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.modules.batchnorm import _NormBase

from autobatch._memory.ledger import unobserved
from autobatch._trials.batches import leaves, map_leaves
from autobatch.lightning._compat import logged_results

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from autobatch.lightning._trainer import Trainer

# Elements of a tensor; a larger one is not copied before each micro-batch, its version shows if it
# was changed
_SMALL: Final = 4096
_MOST_ENTRIES: Final = 1000  # of a container; a larger one holds data
_CONTAINERS: Final = frozenset({list, dict, set, deque})
_OF_TORCH: Final = frozenset(vars(torch.nn.Module()))  # attributes that every module has


class NotUndoneError(Exception):
    """A failed micro-batch that cannot be undone; the message is the reason."""


@dataclass(frozen=True, slots=True)
class _Attributes:
    """The attributes of an object, and the entries of its small containers."""

    owner: dict[str, Any]
    values: dict[str, Any]
    contents: list[tuple[Any, Any]]  # a container, and its copy

    @classmethod
    def of(cls, owner: dict[str, Any]) -> _Attributes:
        contents = [
            (value, value.copy())
            for name, value in owner.items()
            if type(value) in _CONTAINERS and name not in _OF_TORCH and len(value) <= _MOST_ENTRIES
        ]
        return cls(owner, dict(owner), contents)

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
        self._copies: list[torch.Tensor] = []

    def keep(self, batch: Any) -> Kept:
        """Keep the state before an attempt at a batch."""
        attributes = [_Attributes.of(owner) for owner in (*self._objects, *self._buffers)]
        tensors = list(_tensors_of(attributes))
        small = [each for each in tensors if self._is_copied(each)]
        large = [each for each in tensors if not self._is_copied(each)]
        with unobserved(), torch.no_grad():
            if [_kind(each) for each in small] != [_kind(each) for each in self._copies]:
                self._copies = [torch.empty_like(each) for each in small]
            if small:
                torch._foreach_copy_(self._copies, small)
        results = logged_results(self._trainer)
        logged = [vars(results), results, *(vars(each) for each in results.values())]
        return Kept(
            batch=map_leaves(_same, batch),
            attributes=[*attributes, *(_Attributes(each, dict(each), []) for each in logged)],
            small=small,
            copies=self._copies,
            versions=_versions((*large, *leaves(batch))),
            random=[(each, each.get_state()) for each in self._generators(attributes)],
        )

    def _is_copied(self, tensor: torch.Tensor) -> bool:
        return tensor.numel() <= _SMALL or id(tensor) in self._normalizing

    def _generators(self, attributes: Iterable[_Attributes]) -> Iterator[torch.Generator]:
        yield torch.default_generator
        if self._device.type == "cuda":
            yield torch.cuda.default_generators[self._device.index or 0]
        for each in attributes:
            for value in each.values.values():
                if isinstance(value, torch.Generator):
                    yield value


@dataclass(frozen=True, slots=True)
class Kept:
    """State before an attempt.

    Args:
        batch: The batch, in containers of its own.
        attributes: Attributes of objects.
        small: Tensors whose values are kept.
        copies: Those values, until state is kept again.
        versions: Other tensors, and their versions.
        random: Generators, and their states.
    """

    batch: Any
    attributes: list[_Attributes]
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
        for generator, state in self.random:
            generator.set_state(state)
        with unobserved(), torch.no_grad():
            if self.small:
                torch._foreach_copy_(self.small, self.copies)
        inputs = {id(leaf) for leaf in leaves(self.batch)}
        for tensor, version in self.versions:
            if tensor._version != version:
                what = "its batch" if id(tensor) in inputs else f"a {tuple(tensor.shape)} buffer"
                raise NotUndoneError(f"training_step writes into {what}")


def _same(leaf: Any) -> Any:
    return leaf


def _is_metric(part: object) -> bool:
    return any(kind.__module__.startswith("torchmetrics.") for kind in type(part).__mro__)


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _tensors_of(attributes: Iterable[_Attributes]) -> Iterator[torch.Tensor]:
    for each in attributes:
        for value in each.values.values():
            if not isinstance(value, torch.Tensor) or value.requires_grad:
                continue
            if value.layout is torch.strided and not value.is_inference():
                yield value


def _versions(values: Iterable[Any]) -> list[tuple[torch.Tensor, int]]:
    return [
        (each, each._version)
        for each in values
        if isinstance(each, torch.Tensor) and not each.is_inference()  # those have no version
    ]
