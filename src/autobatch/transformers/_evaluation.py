"""Prediction steps of a Trainer as a workload."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil, inf
from typing import TYPE_CHECKING, Any

import torch

from autobatch._loaders.epochs import samples_of
from autobatch._trials.batches import leaves, map_leaves
from autobatch.transformers._compat import model_to_evaluate, shown_to_evaluation
from autobatch.transformers._training import on_device

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from autobatch._loaders.samples import Samples
    from autobatch.transformers._data import TrainerLoaders


@dataclass(frozen=True, slots=True)
class EvaluationSteps:
    """Prediction steps at any batch size, as `evaluation_loop` runs them (transformers 5.24).

    That loop keeps predictions on the device, and joins those of each batch to them. Steps run
    beside as many as are there before the last batch.
    """

    trainer: Any  # the Trainer, with everything prepared
    loaders: TrainerLoaders  # its evaluation data
    samples: Samples

    def __call__(self, batch_size: int, accumulate: int) -> Generator[None]:  # noqa: ARG002
        """Yield after a batch of each data set; only the most predictions of one are kept."""
        at_once = self.samples.batches_at_once
        kept, kept_of = _Kept((), 0), 0
        with shown_to_evaluation(self.trainer, batch_size):
            model = model_to_evaluate(self.trainer)
            batches = on_device(self.trainer, self.samples.batches(batch_size))
            for at in range(at_once):
                predictions = self._step(model, next(batches), batch_size)
                others = _Kept(predictions, self._batches_kept(at, batch_size) - 1)
                if others.nbytes > kept.nbytes:
                    kept, kept_of = others, at
            held = kept.made()
            del predictions, others, kept
            yield
            while True:
                for at in range(at_once):
                    predictions = self._step(model, next(batches), batch_size)
                    if held and at == kept_of:
                        self._join(held, predictions)
                yield

    def _step(self, model: Any, inputs: Any, batch_size: int) -> Sequence[Any]:
        """Return what the loop keeps of a batch: losses, inputs, logits and labels."""
        trainer, args = self.trainer, self.trainer.args
        only_loss = trainer.compute_metrics is None or args.prediction_loss_only
        loss, logits, labels = trainer.prediction_step(model, inputs, only_loss)
        pad = partial(trainer.accelerator.pad_across_processes, dim=1, pad_index=-100)
        gather, shown = trainer.gather_function, None
        if "inputs" in args.include_for_metrics:
            name = getattr(trainer.model, "main_input_name", "input_ids")
            shown = gather(pad(inputs[name]))
        if labels is not None:
            labels = pad(labels)
        if logits is not None:
            logits = pad(logits)
            if trainer.preprocess_logits_for_metrics is not None:
                logits = trainer.preprocess_logits_for_metrics(logits, labels)
            logits = gather(logits)
        if labels is not None:
            labels = gather(labels)
        losses = None if loss is None else gather(loss.repeat(batch_size))
        found = (losses,) if args.batch_eval_metrics else (losses, shown, logits, labels)
        return [each for each in found if each is not None]

    def _batches_kept(self, at: int, batch_size: int) -> int:
        """Return the batches whose predictions are on the device at once; 1 for a stream."""
        args = self.trainer.args
        samples = samples_of(self.loaders.each[at], 1)
        batches = inf if samples is None else ceil(samples / (batch_size * args.world_size))
        moved = None if args.batch_eval_metrics else args.eval_accumulation_steps
        kept = min(batches, moved or inf)
        return 1 if kept == inf else int(kept)

    def _join(self, held: Sequence[Any], predictions: Sequence[Any]) -> None:
        from transformers.trainer_pt_utils import EvalLoopContainer

        for before, now in zip(held, predictions, strict=True):
            container = EvalLoopContainer(self.trainer.args.eval_do_concat_batches, -100)
            container.add(before)
            container.add(now)


@dataclass(frozen=True, slots=True)
class _Kept:
    """The predictions of a batch, to be kept for several of them."""

    predictions: Sequence[Any]
    batches: int

    @property
    def nbytes(self) -> int:
        tensors = (leaf for leaf in leaves(self.predictions) if isinstance(leaf, torch.Tensor))
        return self.batches * sum(tensor.nbytes for tensor in tensors)

    def made(self) -> Sequence[Any]:
        return [map_leaves(self._repeated, each) for each in self.predictions]

    def _repeated(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.repeat(self.batches, *(1,) * (leaf.ndim - 1))
