"""Small state that a training step changes, kept before each micro-batch to undo a failed one."""

from __future__ import annotations

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
    from autobatch.lightning._trainer import Trainer

# Elements of a tensor; a larger one is not copied before each micro-batch, its version shows if it
# was changed
_SMALL: Final = 4096
# Types of attributes whose contents may change; all others are replaced, or not known
_CHANGING: Final = frozenset({torch.Tensor, torch.Generator, list, dict, set, deque})
# Attributes that every module has, and results of a metric, which it replaces
_UNCHANGED: Final = frozenset({*vars(torch.nn.Module()), "_forward_cache", "_computed"})


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
        norms = [part for part in parts if isinstance(part, _NormBase)]
        self._norms = [(vars(part)["_buffers"], vars(part)["_buffers"].copy()) for part in norms]
        self._statistics = _flat_views(
            [each for part in norms for each in part.buffers(recurse=False)]
        )
        # Without torchmetrics being imported: its classes and those derived from them
        self._objects = [vars(module), *(vars(part) for part in parts if is_metric(part))]
        self._objects += [
            vars(part)["_buffers"]
            for part in parts
            if vars(part)["_buffers"] and not isinstance(part, _NormBase)
        ]
        # Lightning replaces the tensors in these, and never writes into one
        self._logged = logged_results(trainer)

    def keep(self, batch: Any) -> Kept:
        """Keep the state before an attempt at a batch."""
        noted: list[torch.Tensor] = []
        generators, contents = self._generators.copy(), []
        small: dict[Any, list[torch.Tensor]] = defaultdict(list)  # that are copied together
        changing = [
            value
            for owner in self._objects
            for name, value in owner.items()
            if type(value) in _CHANGING and name not in _UNCHANGED
        ]
        for value in changing:
            if isinstance(value, torch.Tensor):
                if _is_copied(value):
                    small[value.dtype, value.device, min(value.ndim, 2)].append(value)
                else:
                    noted.append(value)
            elif isinstance(value, torch.Generator):
                generators.append(value)
            elif len(value) <= LARGE:
                contents.append((value, value.copy()))

        def note(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                noted.append(leaf)
            return leaf

        results = self._logged
        owners = [*self._objects, vars(results), results, *map(vars, results.values())]
        return Kept(
            batch=map_leaves(note, batch),
            attributes=[(owner, owner.copy()) for owner in owners],
            norms=self._norms,
            contents=contents,
            copies=_copies([*self._statistics, *small.values()]),
            versions=[(each, each._version) for each in noted if not each.is_inference()],
            random=[(each, each.get_state()) for each in generators],
        )


@dataclass(frozen=True, slots=True)
class Kept:
    """State before an attempt.

    Args:
        batch: The batch, in containers of its own.
        attributes: Dictionaries of attributes, buffers and logged values, and their entries.
        norms: Dictionaries of the buffers of BatchNorm, and their entries when training began.
        contents: Small containers among the attributes, and copies of them.
        copies: Tensors, and their values one after the other.
        versions: Other tensors, and their versions.
        random: Generators, and their states.
    """

    batch: Any
    attributes: list[tuple[dict[str, Any], dict[str, Any]]]
    norms: list[tuple[dict[str, Any], dict[str, Any]]]
    contents: list[tuple[Any, Any]]
    copies: list[tuple[list[torch.Tensor], torch.Tensor]]
    versions: list[tuple[torch.Tensor, int]]
    random: list[tuple[torch.Generator, torch.Tensor]]

    def restore(self) -> None:
        """Restore the state.

        Raises:
            NotUndoneError: The step has written into a tensor of which there is no copy.
        """
        for owner, entries in self.norms:
            if any(owner.get(name) is not entries[name] for name in entries):
                raise NotUndoneError("buffers of a BatchNorm were replaced since training began")
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


def _is_copied(tensor: torch.Tensor) -> bool:
    # Copies go into the same tensor again, which leaves and, in training, inference tensors refuse
    return (
        tensor.numel() <= _SMALL
        and not tensor.requires_grad
        and tensor.layout is torch.strided
        and (not tensor.is_inference() or torch.is_inference_mode_enabled())
    )


def _flat_views(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Return views of tensors with one dimension, in groups that are copied together."""
    found: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for each in tensors:
        found[each.dtype, each.device].append(each.detach().view(-1))
    return list(found.values())


def _copies(groups: list[list[torch.Tensor]]) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
    """Return groups of tensors that have the same dtype and, up to two, dimensions, with copies.

    A copy of each tensor takes two to four times as long.
    """
    if not groups:
        return []
    with unobserved():
        return [(alike, _flat(alike)) for alike in groups]


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    if tensors[0].ndim == 0:
        return torch.stack(tensors)
    return torch.cat(tensors if tensors[0].ndim == 1 else [each.flatten() for each in tensors])
