"""Memory of the device that callbacks hold beside the steps of training."""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import torch

from autobatch._distributed import current_ranks
from autobatch._memory import format_bytes
from autobatch._memory.storages import sizes_in
from autobatch.lightning._hooks import users_callbacks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from autobatch._report import TuningReport
    from autobatch.lightning._trainer import Trainer

_DEPTH: Final = 4  # nested containers and objects of a callback that are searched for tensors
_LARGE: Final = 1000  # entries; a larger container holds data


def excess_of_callbacks(trainer: Trainer, held: int, report: TuningReport) -> str | None:
    """Return a sentence on memory of callbacks that makes training exceed the budget, if any.

    `held` is the bytes that they held in the trials of the report. Every rank calls it.
    """
    plan, budget = report.plan, report.budget
    peaks = [each.peak for each in report.trials if each.batch_size == plan.micro_batch_size]
    if not peaks or peaks[-1] is None:
        return None
    peak = peaks[-1]
    tensors = tensors_of_callbacks(trainer)
    now = {name: sum(sizes_in(each).values()) for name, each in tensors.items()}
    with current_ranks() as ranks:
        grown, holders = max(ranks.gather((sum(now.values()) - held, _listed(now))))
    if peak + grown <= budget:
        return None
    return (
        f"Callbacks hold {format_bytes(grown)} on the device that they did not hold in trials "
        f"({holders}), which together with the peak of {format_bytes(peak)} is over the budget of "
        f"{format_bytes(budget)}."
    )


def tensors_of_callbacks(trainer: Trainer) -> dict[str, list[torch.Tensor]]:
    """Return the tensors on the device that each callback holds, by the name of its class.

    Without those of the module and its optimizers, to which a callback may refer.
    """
    module = trainer.lightning_module
    known = {id(each) for each in (trainer, module, *trainer.optimizers)}
    theirs = set(sizes_in(list(_of_training(trainer))))  # by the address of their memory
    found: dict[str, list[torch.Tensor]] = {}
    for callback in users_callbacks(trainer):
        seen = set(known)
        for tensor in _tensors_in(vars(callback), _DEPTH, seen):
            addresses = set(sizes_in(tensor))
            if _is_on(tensor, module.device) and not addresses <= theirs:
                theirs |= addresses
                found.setdefault(type(callback).__name__, []).append(tensor)
    return found


def bytes_of_callbacks(trainer: Trainer) -> int:
    """Return the bytes on the device that callbacks hold."""
    held = chain.from_iterable(tensors_of_callbacks(trainer).values())
    return sum(sizes_in(list(held)).values())


def _listed(held: Mapping[str, int]) -> str:
    largest = sorted(held.items(), key=lambda pair: -pair[1])[:3]
    return ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in largest)


def _of_training(trainer: Trainer) -> Iterator[torch.Tensor]:
    for tensor in chain(trainer.lightning_module.parameters(), trainer.lightning_module.buffers()):
        yield tensor
        if tensor.is_leaf and tensor.grad is not None:
            yield tensor.grad
    for optimizer in trainer.optimizers:
        yield from _tensors_in(dict(getattr(optimizer, "state", {})), _DEPTH, set())


def _tensors_in(thing: Any, depth: int, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yield the tensors of containers, modules and objects; each object once."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, torch.nn.Module):
        yield from chain(thing.parameters(), thing.buffers())
    elif depth:
        for part in _parts_of(thing):
            yield from _tensors_in(part, depth - 1, seen)


def _parts_of(thing: Any) -> Iterable[Any]:
    if isinstance(thing, (dict, list, tuple, set, deque)):
        parts = thing.values() if isinstance(thing, dict) else thing
        return list(parts) if len(thing) <= _LARGE else ()
    if isinstance(thing, (type, torch.utils.data.Dataset, torch.utils.data.DataLoader)):
        return ()
    attributes = getattr(thing, "__dict__", None)
    return list(attributes.values()) if isinstance(attributes, dict) else ()


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    here = tensor.device
    return (here.type, here.index or 0) == (device.type, device.index or 0)
