"""Training steps of a Trainer as a workload."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autobatch.transformers._compat import clip_gradients, gradients_kept, shown, synchronize

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from autobatch._loaders.samples import Samples


@dataclass(frozen=True, slots=True)
class TrainerSteps:
    """Optimizer steps of a Trainer at any batch size, as its loop runs them (transformers 5.24).

    A Trainer reads all micro-batches of an update ahead, to count the items in them. A trial of two
    micro-batches holds those that it does not run.
    """

    trainer: Any  # the Trainer, with everything prepared
    samples: Samples
    target: int | None  # samples per update of all ranks; None without a target

    def __call__(self, batch_size: int, accumulate: int) -> Generator[None]:
        """Yield after each optimizer step."""
        trainer = self.trainer
        trained = self._trained_accumulation(batch_size, accumulate)
        batches = on_device(trainer, self.samples.batches(batch_size))
        with shown(trainer, batch_size, trained):
            while True:
                ahead, items = trainer.get_batch_samples(batches, trained, trainer.args.device)
                trainer.current_gradient_accumulation_steps = len(ahead)
                self._update([*ahead[: accumulate - 1], ahead[-1]], items)
                yield

    def _update(self, micro_batches: Sequence[Any], items: Any) -> None:
        trainer, model = self.trainer, self.trainer.model_wrapped
        for left, inputs in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
            synchronize(trainer, is_last=not left)
            with gradients_kept(trainer) if left else nullcontext():
                trainer.training_step(model, inputs, items)
        clip_gradients(trainer, model)
        trainer.optimizer.step()
        model.zero_grad()

    def _trained_accumulation(self, batch_size: int, accumulate: int) -> int:
        """Return the micro-batches per update of training, if a trial runs this many."""
        args = self.trainer.args
        if accumulate == 1:
            return 1
        trained = args.gradient_accumulation_steps
        if self.target is not None:
            trained = round(self.target / (batch_size * args.world_size))
        return max(accumulate, int(trained))


def on_device(trainer: Any, batches: Iterator[Any]) -> Iterator[Any]:
    """Move batches to the device as accelerate's loaders do (accelerate 1.14)."""
    from accelerate.utils import send_to_device

    accelerator = trainer.accelerator
    if not accelerator.device_placement:
        return batches
    return (send_to_device(batch, accelerator.device) for batch in batches)
