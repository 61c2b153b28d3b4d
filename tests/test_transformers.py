from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import autobatch
from autobatch._memory import detect
from autobatch.errors import FixedBatchSizeError
from autobatch.testing import SimulatedAccelerator
from autobatch.transformers import _checks
from hugging_face import (
    Recorded,
    Sequences,
    compared,
    language_model,
    padded,
    trainer_of,
    transformers,
    tuned,
)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        data = Sequences()
        return (data[at] for at in range(len(data)))


class Classifier(torch.nn.Module):
    """Returns a mean loss, whatever the number of items in an update."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(64, 16)
        self.out = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(16, 64))

    def forward(self, input_ids, attention_mask, labels):
        hidden = (self.embed(input_ids) * attention_mask[..., None]).mean(1)
        return {"loss": F.cross_entropy(self.out(hidden), labels[:, 0])}


def with_user_optimizer(*args, **options):
    trainer = trainer_of(*args, **options)
    trainer.optimizer = torch.optim.Adam(trainer.model.parameters(), lr=0.01, amsgrad=True)
    trainer.lr_scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 2, 0.5)
    return trainer


def made_by_init(*args, **options):
    transformers.set_seed(3)
    return trainer_of(*args, model=lambda: None, keywords={"model_init": language_model}, **options)


CONFIGURATIONS = {
    "plain": {},
    "no target": {"tune": {"target_batch_size": None, "prefer": "largest"}},
    "activation checkpointing": {"activation_checkpointing": True},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "bf16": {"bf16": True},
    "no clipping, SGD": {"optim": "sgd", "max_grad_norm": 0.0},
    "label smoothing, max_steps": {"label_smoothing_factor": 0.1, "max_steps": 5},
    "warm-up, cosine": {"warmup_steps": 3, "lr_scheduler_type": "cosine"},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "sequential, drop_last": {
        "train_sampling_strategy": "sequential",
        "dataloader_drop_last": True,
    },
    "a worker": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "stream": {"data": Stream, "max_steps": 5},
    "mean loss": {"model": Classifier},
    "user's optimizer": {"make_trainer": with_user_optimizer},
    "evaluation": {
        "keywords": {"eval_dataset": Sequences(20)},
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
    "model_init": {"make_trainer": made_by_init},
    "torch.compile": pytest.param(
        {"torch_compile": True, "torch_compile_backend": "eager"},
        marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore:The .grad attribute")],
    ),
}


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_training_is_that_with_both_numbers_written_by_hand(options, tmp_path):
    pair = compared(tmp_path, **options)

    pair.check()
    if pair.report.settings.target_batch_size is not None:
        assert pair.report.plan.effective_batch_size == 24


def test_the_page_of_the_docs_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs/transformers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.setitem(detect._PROBES, "cpu", lambda _: SimulatedAccelerator("64MiB"))
    trainer = trainer_of(tmp_path, data=lambda: Sequences(256))

    exec(code, {"trainer": trainer})

    plan = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    assert math.prod(plan) == 256


def test_auto_find_batch_size_is_refused_in_a_sentence(tmp_path):
    trainer = trainer_of(tmp_path, auto_find_batch_size=True)

    with pytest.raises(autobatch.AutobatchError, match="auto_find_batch_size=True looks for the"):
        tuned(trainer)


def test_samples_made_for_several_steps_at_once_are_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.args.steps_per_generation = 1

    with pytest.raises(autobatch.AutobatchError, match="steps_per_generation, the number of steps"):
        tuned(trainer)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("DEEPSPEED", "DeepSpeed sets batch size and accumulation itself"),
        ("XLA", "XLA compiles the step again for each batch size"),
        ("FSDP", "accelerate's FSDP divides the model when training begins"),
        ("MULTI_XPU", r"autobatch does not know its distributed_type \(MULTI_XPU\)"),
    ],
)
def test_strategies_that_cannot_be_tuned_are_refused(kind, problem, tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    kinds = type(trainer.accelerator.distributed_type)
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", kinds[kind])

    with pytest.raises(autobatch.AutobatchError, match=f"This Trainer cannot be tuned: {problem}"):
        tuned(trainer)


def test_a_model_sharded_by_others_is_refused(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    monkeypatch.setattr(_checks, "is_sharded", lambda model: model is trainer.model)

    with pytest.raises(autobatch.AutobatchError, match="its model was sharded before the Trainer"):
        tuned(trainer)


def test_ranks_that_share_one_model_are_refused(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    monkeypatch.setattr(trainer, "get_tp_size", lambda: 2)

    with pytest.raises(autobatch.AutobatchError, match="2 ranks share one model by tensor paral"):
        tuned(trainer)

    monkeypatch.undo()
    monkeypatch.setattr(
        trainer.model.config, "distributed_config", SimpleNamespace(ep_size=2), raising=False
    )
    with pytest.raises(autobatch.AutobatchError, match="2 ranks share one model by expert paral"):
        tuned(trainer)


def test_a_loader_that_does_not_follow_the_arguments_is_refused(tmp_path):
    class Fixed(Recorded):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, 4, collate_fn=padded)

    with pytest.raises(FixedBatchSizeError, match="has batches of 4 samples whatever"):
        tuned(trainer_of(tmp_path, kind=Fixed))


def test_a_trial_holds_all_micro_batches_of_an_update_as_training_does(tmp_path):
    trainer = trainer_of(tmp_path)
    reports = [
        tuned(trainer, plan=autobatch.BatchPlan(3, n), target_batch_size=None, apply=False)
        for n in (2, 16)
    ]

    few, many = (report.trials[0].peak for report in reports)

    long = padded([Sequences()[69]] * 3).values()
    assert many - few >= 14 * sum(each.nbytes for each in long)


def test_only_one_module_knows_private_names_of_transformers():
    names = set()
    for path in sorted(Path(autobatch.transformers.__file__).parent.glob("*.py")):
        if path.name != "_compat.py":
            names |= set(re.findall(r"(?<!self)\.(_[a-z]\w*)", path.read_text(encoding="utf-8")))

    modules = {path.stem for path in Path(autobatch.__file__).parent.rglob("_*")}
    assert names <= modules


def test_data_parallel_is_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.args._n_gpu = 2

    with pytest.raises(autobatch.AutobatchError, match=r"nn.DataParallel .* its 2 GPUs"):
        tuned(trainer)


def test_anything_but_a_trainer_is_refused():
    with pytest.raises(ValueError, match=r"trainer=3 is not a transformers.Trainer"):
        autobatch.transformers.tune(3)
