"""Small state that a training step changes, kept before each micro-batch to undo a failed one."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from torch.nn.modules.batchnorm import _NormBase

from autobatch._memory.ledger import unobserved
from autobatch._trials.batches import leaves, map_leaves
from autobatch._trials.reachable import LARGE
from autobatch.lightning._compat import logged_in_step, logged_results, logger_connector
from autobatch.lightning._package import package

if TYPE_CHECKING:
    from collections.abc import Collection

    from autobatch.lightning._trainer import Trainer

# Elements of a tensor; a larger one is not copied before each micro-batch, its version shows if it
# was changed
_SMALL: Final = 4096
_CONTAINERS: Final = (list, dict, set, deque)  # and classes derived from them
# Types of attributes whose contents may change; all others are replaced, or not known
_CHANGING: Final = (torch.Tensor, torch.Generator, np.ndarray, *_CONTAINERS)
_FEW: Final = 32  # entries; in a container of more, containers and tensors are not looked for
_LEVELS: Final = 3  # of containers in containers
# Attributes of a metric: results, which it replaces, and what it is made of
_UNCHANGED: Final = frozenset(
    {"_forward_cache", "_computed", "_defaults", "_persistent", "_reductions"}
)


class NotUndoneError(Exception):
    """A failed micro-batch that cannot be undone; the message is the reason."""


class StepState:
    """Buffers, metrics and attributes of a module that a training step may change.

    Running statistics, which the kernels of BatchNorm change without a new version, and other small
    tensors are copied before each micro-batch, but for states of metrics that a step replaces.
    """

    def __init__(self, trainer: Trainer) -> None:
        module = trainer.lightning_module
        parts = list(module.modules())
        self._generators = [torch.default_generator]
        if module.device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[module.device.index or 0])
        norms = [part for part in parts if isinstance(part, _NormBase)]
        self._norms = [(vars(part)["_buffers"], vars(part)["_buffers"].copy()) for part in norms]
        self._statistics = _with_one_dimension(
            [each for part in norms for each in part.buffers(recurse=False)]
        )
        optimized = {
            id(each)
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for each in group["params"]
            if each.requires_grad
        }
        # Such as those of a teacher, which a step moves after the student's
        self._fixed = [each for each in module.parameters() if id(each) not in optimized]
        # Without torchmetrics being imported: its classes and those derived from them
        unchanged = _UNCHANGED | vars(package(trainer).LightningModule()).keys()
        buffers = [vars(part)["_buffers"] for part in parts if not isinstance(part, _NormBase)]
        metrics = [vars(part) for part in parts if is_metric(part)]
        self._owners = [
            *[_Attributes(each, unchanged) for each in (vars(module), *filter(None, buffers))],
            *[_OfMetric(each, unchanged) for each in metrics],
        ]
        # Lightning replaces the tensors in these, and never writes into one
        self._logged = logged_results(trainer)
        self._connector = vars(logger_connector(trainer))

    def keep(self, batch: Any) -> Kept:
        """Keep the state before an attempt at a batch."""
        attributes, generators = [], self._generators.copy()
        contents = _Contents()
        copied: list[torch.Tensor] = []
        noted = self._fixed.copy()
        for owner in self._owners:
            entries = owner.copy()
            attributes.append((owner.entries, entries))
            tensors = []
            for name in owner.changing:
                value = entries[name]
                if isinstance(value, torch.Tensor):
                    tensors.append(value)
                elif isinstance(value, torch.Generator):
                    generators.append(value)
                else:
                    contents.note(value, _LEVELS if owner.nests else 1)
            tensors += contents.tensors
            contents.tensors = []
            if tensors:
                (copied if owner.may_write_into(tensors) else noted).extend(tensors)
        logged = logged_in_step(self._logged)
        of_logging = (self._connector, vars(self._logged), *map(vars, logged.values()))
        attributes += [(each, each.copy()) for each in of_logging]
        groups = self._statistics
        if copied:
            groups = [*groups, *_groups(copied, noted)]
        with unobserved():
            copies = [(alike, _flat(alike)) for alike in groups]
        return Kept(
            batch=_with_tensors(batch, noted),
            attributes=attributes,
            norms=self._norms,
            contents=contents.copies,
            lengths=contents.lengths,
            logged=(self._logged, logged.keys()),
            copies=copies,
            versions=[(each, each._version) for each in noted if not each.is_inference()],
            random=[(each, each.get_state()) for each in generators],
        )


class _Attributes:
    """Attributes of an object, by their names.

    Names whose contents may change are found anew when names or types change; contents of those
    in `unchanged` do not.
    """

    nests = True  # containers may hold others, and tensors that are written into

    def __init__(self, entries: dict[str, Any], unchanged: Collection[str]) -> None:
        self.entries = entries
        self._unchanged = unchanged
        self.changing: list[str] = []
        self._form: list[Any] = []

    def copy(self) -> dict[str, Any]:
        """Return the attributes of now, and renew the names of those that may change."""
        entries = self.entries.copy()
        form = [*entries, *map(type, entries.values())]
        if form != self._form:
            self._form = form
            self.changing = [
                name
                for name, value in entries.items()
                if isinstance(value, _CHANGING) and name not in self._unchanged
            ]
        return entries

    def may_write_into(self, tensors: list[torch.Tensor]) -> bool:
        """Return False if the last attempt replaced all tensors, and none has written into one."""
        return True


class _OfMetric(_Attributes):
    """Attributes of a metric: its `forward` replaces the states, its `update` may write into them."""

    nests = False

    def __init__(self, entries: dict[str, Any], unchanged: Collection[str]) -> None:
        super().__init__(entries, unchanged)
        self._has_written = False
        self._last: list[tuple[torch.Tensor, int]] = []  # with versions, before the last attempt

    def may_write_into(self, tensors: list[torch.Tensor]) -> bool:
        if self._has_written or any(map(torch.is_inference, tensors)):  # these have no versions
            return True
        last, self._last = self._last, [(each, each._version) for each in tensors]
        self._has_written = any(each._version != version for each, version in last)
        is_replaced = not {each for each, _ in last}.intersection(tensors)
        return self._has_written or not last or not is_replaced


class _Contents:
    """Contents of containers and arrays before an attempt."""

    def __init__(self) -> None:
        self.copies: list[tuple[Any, Any]] = []
        self.lengths: list[tuple[Any, int]] = []  # of containers too large to copy
        self.tensors: list[torch.Tensor] = []  # in containers

    def note(self, value: Any, levels: int) -> None:
        """Note a container or an array, and as many levels of containers in it."""
        if isinstance(value, np.ndarray):
            if value.size <= _SMALL:
                self.copies.append((value, value.copy()))
            return
        if len(value) > LARGE:
            self.lengths.append((value, len(value)))
            return
        self.copies.append((value, value.copy()))
        if levels > 1 and len(value) <= _FEW:
            for each in value.values() if isinstance(value, dict) else value:
                if isinstance(each, torch.Tensor):
                    self.tensors.append(each)
                elif isinstance(each, (np.ndarray, *_CONTAINERS)):
                    self.note(each, levels - 1)


class Kept(NamedTuple):
    """State before an attempt.

    Args:
        batch: The batch, in containers of its own.
        attributes: Dictionaries of attributes, buffers and logged values, and their entries.
        norms: Dictionaries of the buffers of BatchNorm, and their entries when training began.
        contents: Small containers and arrays among the attributes, and copies of them.
        lengths: Large containers, and their lengths.
        logged: Logged values, and the names of those of the step. Those of the hooks that run once
            after it, before the backward pass, stay.
        copies: Tensors, and their values one after the other.
        versions: Other tensors, such as parameters without an optimizer, and their versions.
        random: Generators, and their states.
    """

    batch: Any
    attributes: list[tuple[dict[str, Any], dict[str, Any]]]
    norms: list[tuple[dict[str, Any], dict[str, Any]]]
    contents: list[tuple[Any, Any]]
    lengths: list[tuple[Any, int]]
    logged: tuple[dict[str, Any], Collection[str]]
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
        results, names = self.logged
        for name in logged_in_step(results).keys() - names:
            del results[name]
        for container, values in self.contents:
            if isinstance(container, np.ndarray):
                container[...] = values
                continue
            container.clear()
            (container.extend if hasattr(container, "extend") else container.update)(values)
        for container, length in self.lengths:
            if isinstance(container, list):
                del container[length:]
            if len(container) != length:
                raise NotUndoneError(
                    f"training_step changes a {type(container).__name__} of more than {LARGE:,} entries"
                )
        for generator, state in self.random:
            generator.set_state(state)
        with unobserved(), torch.no_grad():
            for tensors, values in self.copies:
                of_each = values.flatten().split([tensor.numel() for tensor in tensors])
                for tensor, value in zip(tensors, of_each, strict=True):
                    tensor.copy_(value.view(tensor.shape))
        self.check_unwritten()

    def check_unwritten(self) -> None:
        """Raise `NotUndoneError` if a tensor was written into of which there is no copy."""
        inputs = {id(leaf) for leaf in leaves(self.batch)}
        for tensor, version in self.versions:
            if tensor._version != version:
                kind = "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"
                what = "its batch" if id(tensor) in inputs else f"a {tuple(tensor.shape)} {kind}"
                raise NotUndoneError(f"training_step writes into {what}")


def is_metric(part: object) -> bool:
    """Return True for a metric of torchmetrics, without importing it."""
    return any(kind.__module__.startswith("torchmetrics.") for kind in type(part).__mro__)


def _with_one_dimension(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Return tensors, or else views of them, in groups that are copied together."""
    found: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for each in tensors:
        # No view where none is needed: less memory to read before each micro-batch
        found[each.dtype, each.device].append(each if each.ndim == 1 else each.detach().view(-1))
    return list(found.values())


def _groups(tensors: list[torch.Tensor], large: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Return small tensors in groups that are copied together, and add the others to a list."""
    small: dict[Any, list[torch.Tensor]] = defaultdict(list)
    is_inference = torch.is_inference_mode_enabled()
    for each in tensors:
        # Copies go into the same tensor again, which leaves and, in training, inference tensors
        # refuse
        if (
            each.numel() <= _SMALL
            and not each.requires_grad
            and each.layout is torch.strided
            and (is_inference or not each.is_inference())
        ):
            small[each.dtype, each.device, min(each.ndim, 2)].append(each)
        else:
            large.append(each)
    return list(small.values())


def _with_tensors(batch: Any, tensors: list[torch.Tensor]) -> Any:
    """Return a batch in containers of its own, and add its tensors to a list."""

    def note(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
        return leaf

    if type(batch) in (tuple, list) and {*map(type, batch)} == {torch.Tensor}:
        tensors += batch  # at once: most batches are so
        return type(batch)(batch)
    return map_leaves(note, batch)


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    if tensors[0].ndim == 0:
        return torch.stack(tensors)
    return torch.cat(tensors if tensors[0].ndim == 1 else [each.flatten() for each in tensors])
