"""Memory over one training step: what holds it at every moment, and at the peak."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from autobatch._memory.estimate.events import SCRATCH, Kind, Origin, Phase
from autobatch._memory.estimate.scratch import sum_scratch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from autobatch._memory.estimate.events import Event
    from autobatch._memory.estimate.scratch import Gpu


class Held(StrEnum):
    """Kind of memory, by its use."""

    PARAMETERS = "parameters and buffers"
    OPTIMIZER_STATE = "optimizer state"
    GRADIENTS = "gradients"
    BATCH = "batch"
    ACTIVATIONS = "activations"
    TEMPORARY = "temporary tensors"
    SCRATCH = "scratch memory"


_ORIGINS: Final[dict[str, Held]] = {
    Origin.PARAMETERS: Held.PARAMETERS,
    Origin.OPTIMIZER_STATE: Held.OPTIMIZER_STATE,
    Origin.BATCH: Held.BATCH,
}
# Blocks that outlive their phase, by the phase that begins: the phase that ends, and their kind
_LASTING: Final[dict[str, tuple[Phase, Held]]] = {
    Phase.OPTIMIZER: (Phase.BACKWARD, Held.GRADIENTS),
    Phase.END: (Phase.OPTIMIZER, Held.OPTIMIZER_STATE),
}


@dataclass(frozen=True, slots=True)
class Moment:
    """Memory after one event of a step."""

    phase: str  # part of the step
    held: dict[Held, int]  # bytes by kind of memory

    @property
    def total(self) -> int:
        return sum(self.held.values())


@dataclass(frozen=True, slots=True)
class Peak:
    """The moment of a step at which most bytes are held."""

    phase: str  # part of the step: forward, backward or optimizer
    operator: str  # operator that allocates
    module: str  # module that it belongs to; empty if none is known
    held: dict[Held, int]  # bytes by kind of memory
    # Bytes of activations by module; repeated blocks are one, "layers.*"
    activations: dict[str, int]


def moments(events: Sequence[Event], gpu: Gpu) -> list[Moment]:
    """Return the memory after every event of the last step."""
    held = _held(events)
    ends = _ends(events)
    now: Counter[Held] = Counter({Held.SCRATCH: sum(gpu.workspaces)})
    sizes: dict[int, int] = {}
    phase = str(Phase.BUILD)
    found = []
    for at, event in enumerate(events):
        if event.kind is Kind.PHASE:
            phase = event.name
        elif event.kind is Kind.ALLOCATE:
            sizes[event.block] = event.numbers[0]
            now[held[event.block]] += event.numbers[0]
        elif event.kind is Kind.FREE:
            now[held[event.block]] -= sizes.pop(event.block)
        scratch = sum(sum_scratch(event.numbers, gpu)) if event.kind is Kind.SUM else 0
        if ends[-2] < at < ends[-1]:
            found.append(Moment(phase, {**now, Held.SCRATCH: now[Held.SCRATCH] + scratch}))
    return found


def peak(events: Sequence[Event], gpu: Gpu, model: nn.Module) -> Peak:
    """Return the peak of the last step."""
    all_moments = moments(events, gpu)
    highest = max(range(len(all_moments)), key=lambda at: all_moments[at].total)
    at = _ends(events)[-2] + 1 + highest
    held = _held(events)
    live: dict[int, Event] = {}
    for event in events[: at + 1]:
        if event.kind is Kind.ALLOCATE:
            live[event.block] = event
        elif event.kind is Kind.FREE:
            del live[event.block]
    blocks = dict(_repeated("", "", model))
    activations: dict[str, int] = defaultdict(int)
    for block, event in live.items():
        if held[block] is Held.ACTIVATIONS:
            activations[blocks.get(event.module, event.module)] += event.numbers[0]
    return Peak(
        phase=all_moments[highest].phase,
        operator=events[at].name.removeprefix("aten.").replace(".default", ""),
        module=events[at].module,
        held=all_moments[highest].held,
        activations=dict(sorted(activations.items(), key=lambda pair: -pair[1])),
    )


def _repeated(name: str, shown: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the name of each module within one, and the name of the repeated blocks it is in."""
    yield name, shown
    children = dict(module.named_children())
    are_blocks = len({type(child) for child in children.values()}) == 1 < len(children)
    for key, child in children.items():
        place = "*" if are_blocks and key.isdigit() else key
        yield from _repeated(f"{name}.{key}".strip("."), f"{shown}.{place}".strip("."), child)


def _held(events: Sequence[Event]) -> dict[int, Held]:
    """Return the kind of memory of each block, by the phases in which it lives."""
    held: dict[int, Held] = {}
    born: dict[int, str] = {}  # phases of live blocks
    phase = str(Phase.BUILD)
    for event in events:
        if event.kind is Kind.PHASE:
            if event.name in _LASTING:
                ended, kind = _LASTING[event.name]
                held |= {block: kind for block, at in born.items() if at == ended}
            phase = event.name
        elif event.kind is Kind.ALLOCATE:
            born[event.block] = phase
            held[event.block] = _held_by(event, phase)
        elif event.kind is Kind.FREE:
            del born[event.block]
    return held


def _held_by(event: Event, phase: str) -> Held:
    if event.name.endswith(SCRATCH):
        return Held.SCRATCH
    if phase == Phase.BUILD:  # before the first step
        return _ORIGINS.get(event.name, Held.BATCH)
    return Held.ACTIVATIONS if phase == Phase.FORWARD else Held.TEMPORARY


def _ends(events: Sequence[Event]) -> list[int]:
    """Return the places at which steps end."""
    end = (Kind.PHASE, Phase.END)
    return [at for at, event in enumerate(events) if (event.kind, event.name) == end]
