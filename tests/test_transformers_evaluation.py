"""The batch size of a Trainer's evaluation, found beside the state of training."""

from __future__ import annotations

import pytest
import torch

import autobatch
from autobatch.errors import FixedBatchSizeError
from autobatch.testing import SimulatedAccelerator
from hugging_face import TIMES, Recorded, Sequences, history, padded, trainer_of, tuned
from sameness import same

LENGTH = 20  # of the evaluation data
LONGEST = 24


def accuracy(predictions, compute_result=True):
    """Return a metric of all logits, or of those of a batch."""
    found = predictions.predictions.argmax(-1)[:, :-1]
    return {"accuracy": float((found == predictions.label_ids[:, 1:]).mean())}


def evaluating(folder, compute_metrics=accuracy, data=None, **options):
    keywords = {
        "eval_dataset": Sequences(LENGTH) if data is None else data,
        "compute_metrics": compute_metrics,
    }
    return trainer_of(folder, keywords=keywords, eval_strategy="epoch", **options)


def tuned_evaluation(trainer, **options):
    return autobatch.transformers.tune_evaluation(
        trainer,
        **{
            "device": SimulatedAccelerator("64MiB"),
            "prefer": "largest",
            "timing_seconds": 0,
            "steps_per_trial": 2,
            "verbose": False,
            **options,
        },
    )


def state_of(trainer):
    state = {**vars(trainer.args), **vars(trainer), **vars(trainer.accelerator.gradient_state)}
    return {name: value for name, value in state.items() if name != "accelerator"}


def metrics_of(trainer):
    return {n: value for n, value in trainer.evaluate().items() if not n.endswith(TIMES)}


def modes(trainer):
    return [module.training for module in trainer.model.modules()]


@pytest.mark.parametrize(
    "options",
    [
        {"eval_accumulation_steps": 1},
        {"bf16": True, "batch_eval_metrics": False, "include_for_metrics": ["inputs", "loss"]},
        {"data": {"first": Sequences(LENGTH), "second": Sequences(9)}},
    ],
    ids=["moved to the host", "bf16, more for metrics", "two data sets"],
)
def test_training_and_metrics_are_those_of_the_numbers_written_by_hand(options, tmp_path):
    first = evaluating(tmp_path / "tuned", **options)
    plan = tuned(first, timing_seconds=0).plan
    size = tuned_evaluation(first, max_micro_batch_size=13).plan.micro_batch_size
    first.train()

    second = evaluating(
        tmp_path / "by_hand",
        per_device_train_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.accumulate_grad_batches,
        per_device_eval_batch_size=13,
        **options,
    )
    second.train()

    assert size == first.args.per_device_eval_batch_size == 13
    metrics = metrics_of(first)
    assert any("accuracy" in name for name in metrics)
    assert metrics == metrics_of(second)
    assert history(first) == history(second)
    assert first.shapes == second.shapes
    assert same(first.model.state_dict(), second.model.state_dict())


def test_nothing_but_the_report_stays_where_it_is_not_applied(tmp_path):
    trainer = evaluating(tmp_path)
    trainer.model.eval()
    trainer.model.lm_head.train()
    before, modes_before, random = state_of(trainer), modes(trainer), torch.get_rng_state()
    weights = {name: each.clone() for name, each in trainer.model.state_dict().items()}

    report = tuned_evaluation(trainer, apply=False)

    assert (report.task, report.can_accumulate) == ("validate", False)
    assert report.plan.micro_batch_size == report.dataset_size == LENGTH
    assert state_of(trainer) == before
    assert modes(trainer) == modes_before
    assert same(trainer.model.state_dict(), weights)
    assert torch.equal(torch.get_rng_state(), random)
    assert list(tmp_path.iterdir()) == []


def test_trials_hold_predictions_as_long_as_evaluation_keeps_them(tmp_path):
    def peak(compute_metrics=accuracy, **options):
        trainer = evaluating(tmp_path, compute_metrics, data=Sequences(LENGTH * 4), **options)
        report = tuned_evaluation(trainer, max_micro_batch_size=1)
        return report.trials[-1].peak

    logits = LONGEST * 64 * 4  # bytes of one sequence
    none, all_kept = peak(None), peak()
    few = peak(eval_accumulation_steps=10)

    assert none < few < all_kept
    assert all_kept - few >= 2 * 70 * logits  # twice, while a batch is joined to the others
    assert few - none >= 9 * logits
    assert peak(prediction_loss_only=True) == none
    assert peak(batch_eval_metrics=True) < few


def test_trials_run_beside_the_state_of_the_optimizer(tmp_path):
    trainer = evaluating(tmp_path)
    weights = sum(each.nbytes for each in trainer.model.parameters())

    report = tuned_evaluation(trainer, max_micro_batch_size=1)

    assert report.trials[0].resident >= 3 * weights


class RunsOut(Recorded):
    """Has memory to evaluate 7 sequences."""

    def prediction_step(self, model, inputs, *arguments, **keywords):
        assert not model.training
        if len(inputs["input_ids"]) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().prediction_step(model, inputs, *arguments, **keywords)


def test_the_largest_size_that_the_prediction_step_runs_is_set(tmp_path):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = evaluating(tmp_path, kind=RunsOut, **workers)
    trainer._eval_dataloaders = {"eval": "of another size"}

    report = tuned_evaluation(trainer)

    assert report.plan.micro_batch_size == trainer.args.per_device_eval_batch_size == 7
    assert not hasattr(trainer, "_eval_dataloaders")


def test_a_trainer_without_evaluation_data_is_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    before = state_of(trainer)

    with pytest.raises(autobatch.AutobatchError, match="eval_dataset=None leaves nothing to"):
        tuned_evaluation(trainer)

    assert state_of(trainer) == before


def test_an_evaluation_loader_that_does_not_follow_the_arguments_is_refused(tmp_path):
    class Fixed(Recorded):
        def get_eval_dataloader(self, eval_dataset=None):
            return torch.utils.data.DataLoader(self.eval_dataset, 4, collate_fn=padded)

    with pytest.raises(FixedBatchSizeError, match="4 samples whatever per_device_eval_batch_size"):
        tuned_evaluation(evaluating(tmp_path, kind=Fixed))


@pytest.mark.parametrize(
    ("step", "note"),
    [
        ("prediction_step", "autobatch was trying batch_size=8"),
        ("training_step", "autobatch was training one batch, beside whose state to evaluate"),
    ],
)
def test_errors_of_the_user_in_evaluation_pass_with_a_note(step, note, tmp_path):
    def fails(*_, **__):
        raise ZeroDivisionError("mine")

    trainer = evaluating(tmp_path, kind=type("Fails", (Recorded,), {step: fails}))
    before = state_of(trainer)

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        tuned_evaluation(trainer)

    assert caught.value.__notes__ == [note]
    assert state_of(trainer) == before
