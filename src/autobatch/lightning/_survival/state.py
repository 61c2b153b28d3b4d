"""Small state that a training step changes, kept before each micro-batch to undo a failed one."""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.modules.batchnorm import _NormBase

from autobatch._memory.ledger import unobserved
from autobatch._trials.batches import leaves, map_leaves
from autobatch._trials.reachable import LARGE
from autobatch.lightning._compat import logged_results

if TYPE_CHECKING:
    from collections.abc import Iterable

    from autobatch.lightning._trainer import Trainer

# Elements of a tensor; a larger one is not copied before each micro-batch, its version shows if it
# was changed
_SMALL: Final = 4096
# Types of attributes whose contents may change; all others are replaced, or not known
_CHANGING: Final = frozenset({torch.Tensor, torch.Generator, list, dict, set, deque})
_OF_TORCH: Final = frozenset(vars(torch.nn.Module()))  # attributes that every module has


class NotUndoneError(Exception):
    """A failed micro-batch that cannot be undone; the message is the reason."""


class StepState:
    """Buffers, metrics and attributes of a module that a training step may change.

    Running statistics, which the kernels of BatchNorm change without a new version, and other small
    tensors are copied before each micro-batch.
    """

    def __init__(self, trainer: Trainer) -> None:
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
        # Lightning replaces the tensors in these, and never writes into one
        self._logged = logged_results(trainer)
        self._buffers: list[torch.Tensor | None] = []  # sorted into those that follow
        self._small: list[list[torch.Tensor]] = []
        self._large: list[torch.Tensor] = []

    def keep(self, batch: Any) -> Kept:
        """Keep the state before an attempt at a batch."""
        buffers = [*itertools.chain.from_iterable(map(dict.values, self._owners))]
        if len(buffers) != len(self._buffers) or not all(map(operator.is_, buffers, self._buffers)):
            self._buffers, self._large = buffers, []
            self._small = self._sorted([each for each in buffers if each is not None], self._large)
        noted = self._large.copy()
        generators = self._generators.copy()
        contents, tensors = [], []
        for owner in self._objects:
            for name, value in owner.items():
                if (kind := type(value)) not in _CHANGING or name in _OF_TORCH:
                    continue
                if kind is torch.Tensor:
                    tensors.append(value)
                elif kind is torch.Generator:
                    generators.append(value)
                elif len(value) <= LARGE:
                    contents.append((value, value.copy()))
        small = [*self._small, *self._sorted(tensors, noted)]

        def note(leaf: Any) -> Any:
            noted.append(leaf)
            return leaf

        results = self._logged
        owners = [*self._objects, *self._owners, vars(results), results]
        owners += map(vars, results.values())
        return Kept(
            batch=map_leaves(note, batch),
            attributes=[(owner, owner.copy()) for owner in owners],
            contents=contents,
            copies=_copies(small) if small else [],
            versions=[
                (each, each._version)
                for each in noted
                if isinstance(each, torch.Tensor) and not each.is_inference()  # has no version
            ],
            random=[(each, each.get_state()) for each in generators],
        )

    def _sorted(
        self, tensors: Iterable[torch.Tensor], large: list[torch.Tensor]
    ) -> list[list[torch.Tensor]]:
        """Return groups of small tensors that are copied together, and add the others to `large`."""
        groups: dict[Any, list[torch.Tensor]] = defaultdict(list)
        for each in tensors:
            if self._is_copied(each):
                groups[each.dtype, each.device, min(each.ndim, 2)].append(each)
            else:
                large.append(each)
        return list(groups.values())

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
        attributes: Dictionaries of attributes, buffers and logged values, and their entries.
        contents: Small containers among the attributes, and copies of them.
        copies: Tensors, and their values one after the other.
        versions: Other tensors, and their versions.
        random: Generators, and their states.
    """

    batch: Any
    attributes: list[tuple[dict[str, Any], dict[str, Any]]]
    contents: list[tuple[Any, Any]]
    copies: list[tuple[list[torch.Tensor], torch.Tensor]]
    versions: list[tuple[torch.Tensor, int]]
    random: list[tuple[torch.Generator, torch.Tensor]]

    def restore(self) -> None:
        """Restore the state.

        Raises:
            NotUndoneError: The step has written into a tensor of which there is no copy.
        """
        for owner, entries in self.attributes:
            owner.update(entries)
            for name in owner.keys() - entries.keys():
                del owner[name]
        for container, values in self.contents:
            container.clear()
            (container.extend if hasattr(container, "extend") else container.update)(values)
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


def is_metric(part: object) -> bool:
    """Return True for a metric of torchmetrics, without importing it."""
    return any(kind.__module__.startswith("torchmetrics.") for kind in type(part).__mro__)


def _copies(groups: list[list[torch.Tensor]]) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
    with unobserved(), torch.no_grad():
        return [(alike, _flat(alike)) for alike in groups]


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the values of tensors that have the same dtype and, up to two, dimensions.

    A copy of each takes two to four times as long.
    """
    if tensors[0].ndim == 0:
        return torch.stack(tensors)
    return torch.cat(tensors if tensors[0].ndim == 1 else [each.flatten() for each in tensors])
