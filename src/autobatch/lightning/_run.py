"""State of one run of a Trainer: the changes to it, and what is measured while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autobatch.lightning._apply import BeforeOptimizers
from autobatch.lightning._compat import patched
from autobatch.lightning._loading import DataLoaderTimer

if TYPE_CHECKING:
    from collections.abc import Callable

    from autobatch._report import TuningReport
    from autobatch.lightning._accumulation import LastWindowCorrection
    from autobatch.lightning._attribute import FormerBatchSize
    from autobatch.lightning._dataloaders import Rebatched
    from autobatch.lightning._resume import Checkpoint
    from autobatch.lightning._trainer import Trainer


@dataclass
class Run:
    """State of one run of a Trainer, from `setup` to `teardown`.

    Args:
        checkpoint: The checkpoint that the run resumes from.
        first_report: The report of the tuning run before the first epoch.
        loaders: Loaders with another batch size, by what they serve: "train", "validation", or a
            stage.
        window: Corrects the last window of each epoch, if the user wants that.
        timer: Measures the waiting time for the training loader.
        before_optimizers: State from before the optimizers were created.
        patches: Methods of the loops that are replaced; `replace` adds to them.
        attribute: The former batch size of the module, while an evaluation runs with another.
    """

    checkpoint: Checkpoint | None = None
    first_report: TuningReport | None = None
    loaders: dict[str, Rebatched] = field(default_factory=dict)
    window: LastWindowCorrection | None = None
    timer: DataLoaderTimer = field(default_factory=DataLoaderTimer)
    before_optimizers: BeforeOptimizers = field(default_factory=BeforeOptimizers)
    patches: list[patched] = field(default_factory=list)
    attribute: FormerBatchSize | None = None

    @property
    def is_tuned(self) -> bool:
        """True while the Trainer trains with a plan."""
        return "train" in self.loaders

    def start_epoch(self) -> None:
        """Count samples from here; waiting for the first batch of an epoch does not count."""
        self.timer.interrupt()
        if self.window is not None:
            self.window.start_epoch()

    def start_batch(self, trainer: Trainer, batch: Any, index: int) -> None:
        """Count the time and the samples of a batch."""
        self.timer.start_batch(trainer)
        if self.window is not None:
            self.window.start_batch(trainer, batch, index)

    def replace(self, patch: patched) -> None:
        """Replace a method of a loop until `undo`."""
        self.patches.append(patch)
        patch.apply()

    def undo(self) -> None:
        """Stop measuring, and restore the user's loaders and the methods of the loops.

        A second call completes the first if that was interrupted.
        """
        self.before_optimizers.forget()
        self.timer.stop()
        self.window = None
        while self.patches:
            self.patches[-1].restore()
            self.patches.pop()
        while self.loaders:
            next(reversed(self.loaders.values())).undo()
            self.loaders.popitem()
        if self.attribute is not None:
            self.attribute.restore()
            self.attribute = None


def before_epochs(trainer: Trainer, epochs: frozenset[int], act: Callable[[], None]) -> patched:
    """Return a patch to call `act` before the first batch of these epochs, unless a checkpoint resumes within one.

    A callback would be too early: the module's own `on_train_epoch_start` comes after those of all
    callbacks.
    """
    loop = trainer.fit_loop
    advance = loop.advance

    def act_and_advance() -> None:
        is_resumed = loop.restarted_mid_epoch or loop.restarted_on_epoch_end
        if trainer.current_epoch in epochs and not is_resumed:
            act()
        advance()

    return patched(loop, advance=act_and_advance)
