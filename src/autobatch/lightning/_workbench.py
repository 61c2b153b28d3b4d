"""What the trials of one run in a Trainer share: what they are undone with, the device, the ranks."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from autobatch import sinks
from autobatch._doors import known_plan
from autobatch._optimizers import OptimizerWatch
from autobatch._probes import detect
from autobatch._ranks import ranks_here
from autobatch._snapshot import Snapshot
from autobatch._tune import tune
from autobatch.errors import AutobatchError, DoesNotFitError
from autobatch.lightning._apart import apart
from autobatch.lightning._host import room_for_copy
from autobatch.lightning._known import Here, Known
from autobatch.lightning._scratch import scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from autobatch._job import Job
    from autobatch._memory import MemoryProbe
    from autobatch._plan import BatchPlan
    from autobatch._ranks import Ranks
    from autobatch._report import TuningReport
    from autobatch._search import Search
    from autobatch._settings import Settings
    from autobatch.lightning._loader import SetBatchSize


__all__ = ["Asked", "Workbench", "verified_or_searched", "workbench"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a callback was asked for.

    Args:
        settings: As checked at the door.
        search: Which size to try next.
        device: Where memory is read; None: where the model is.
        worst_case: Makes the largest batch of a size, where the user knows it.
        repairs: Whether the last window of an epoch is repaired.
        batch_arg_name: What the module or its datamodule calls the batch size.
        set_batch_size: Gives a loader another batch size, where the user has a way of their own.
    """

    settings: Settings
    search: Search
    device: str | MemoryProbe | None
    worst_case: Callable[[int], Any] | None
    repairs: bool
    batch_arg_name: str
    set_batch_size: SetBatchSize | None


@dataclass(frozen=True, slots=True)
class Workbench:
    """What trials of one run share.

    Args:
        snapshot: Gives back what they change.
        optimizers: Counts and times optimizer steps.
        probe: The device.
        ranks: Who tries together.
        search: Which size to try next.
        shown: Where progress is shown.
        copied: Bytes of the copy that is kept on the host.
    """

    snapshot: Snapshot
    optimizers: OptimizerWatch
    probe: MemoryProbe
    ranks: Ranks
    search: Search
    shown: sinks.Progress
    copied: int

    def run(
        self, job: Job, settings: Settings, *, known: BatchPlan | None
    ) -> TuningReport:
        """Tune one job here."""
        return tune(
            job,
            settings,
            known=known,
            probe=self.probe,
            search=self.search,
            snapshot=self.snapshot,
            optimizers=self.optimizers,
            first_touch=nullcontext,  # the module and its optimizers are known
            shown=self.shown,
            ranks=self.ranks,
        )

    def here(self, trainer: Any) -> Here:
        """Where this runs, in the words of rank 0: all of them have to decide alike."""
        total = self.probe.read().total
        here = Here.of(self.probe.name, total, trainer.world_size)
        return self.ranks.everywhere(lambda: here)[0]


@contextmanager
def workbench(trainer: Any, module: Any, asked: Asked) -> Iterator[Workbench]:
    """Capture what trials may change, and keep all else away from them; at the end everything is given back."""
    probe = detect(asked.device, module.device)
    with (
        ranks_here() as ranks,
        apart(trainer),
        Snapshot() as snapshot,
        OptimizerWatch(probe.clock) as optimizers,
        sinks.progress() as shown,
        scratch(trainer),
    ):
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scalers = [] if scaler is None else [scaler]
        captured = (module, *trainer.optimizers, *schedulers, *scalers)
        room = partial(room_for_copy, captured, trainer.num_devices)
        copied_here, *_ = ranks.everywhere(room)
        snapshot.capture(*captured)
        # Hooks that make the loaders may change the module and the datamodule
        snapshot.capture_light(trainer.datamodule)
        yield Workbench(
            snapshot, optimizers, probe, ranks, asked.search, shown, copied_here
        )


def verified_or_searched(
    known: Known, job: Job, settings: Settings, bench: Workbench
) -> TuningReport:
    """The report about a plan that is known, where one trial verifies it; else about one that a search found."""
    note = known.note
    if note is None:  # the user's own
        known_plan(known.plan, settings, world_size=bench.ranks.world_size)
    if known.plan is not None:
        try:
            return bench.run(_noted(job, note), settings, known=known.plan)
        except DoesNotFitError as error:
            if known.refusal is not None:
                raise AutobatchError(known.refusal) from error
            if note is None:
                raise
            note = f"Searched anew, since a micro-batch of {known.plan.micro_batch_size:,} does not fit any more."
    if known.target is not None:
        settings = settings.model_copy(update={"target_batch_size": known.target})
    return bench.run(_noted(job, note), settings, known=None)


def _noted(job: Job, note: str | None) -> Job:
    remarks = job.remarks
    if note is None or remarks is None:
        return job
    return replace(job, remarks=lambda *given: (note, *remarks(*given)))
