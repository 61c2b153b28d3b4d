"""Small Trainers of transformers: tuned ones, and the same with the two numbers written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import autobatch
from autobatch._distributed.sharding import local_part
from autobatch.testing import SimulatedAccelerator
from sameness import same

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

OWN = 5  # does not divide the target: another size has to be taken
TIMES = ("_runtime", "_per_second")


class Sequences(torch.utils.data.Dataset):
    """Sequences of 4 to 12 tokens, and a long one at the end."""

    def __init__(self, length=70):
        generator = torch.Generator().manual_seed(7)
        sizes = torch.randint(4, 13, (length,), generator=generator).tolist()
        sizes[-1] = 24
        self.data = [torch.randint(1, 60, (size,), generator=generator) for size in sizes]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, at):
        return {"input_ids": self.data[at]}


def padded(samples):
    ids = torch.nn.utils.rnn.pad_sequence([each["input_ids"] for each in samples], True)
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": ids.masked_fill(ids == 0, -100),
    }


def language_model():
    config = transformers.GPT2Config(
        vocab_size=64,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def arguments(folder, **options):
    quiet = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(**{**quiet, **options})


class Recorded(transformers.Trainer):
    """Records the shape of every micro-batch."""

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.shapes = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.shapes.append(tuple(inputs["input_ids"].shape))
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs, *args):
        if (
            "loss" in logs
            or "eval_loss" in logs
            or "train_loss" in logs
            or "autobatch/batch_size" in logs
        ):
            super().log(logs, *args)


def trainer_of(folder, model=language_model, kind=Recorded, data=None, keywords=None, **options):
    transformers.set_seed(3)
    made = kind(
        model=model(),
        args=arguments(folder, **options),
        train_dataset=Sequences() if data is None else data(),
        data_collator=padded,
        callbacks=[],
        **(keywords or {}),
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def tuned(trainer, **options):
    return autobatch.transformers.tune(
        trainer,
        **{
            "target_batch_size": 24,
            "max_micro_batch_size": 12,
            "device": SimulatedAccelerator("64MiB"),
            "steps_per_trial": 2,
            "verbose": False,
            **options,
        },
    )


def history(trainer):
    """Return what training logged, without times and without the report."""
    entries = [each for each in trainer.state.log_history if "autobatch/batch_size" not in each]
    return [
        {name: value for name, value in each.items() if not name.endswith(TIMES)}
        for each in entries
    ]


def weights(trainer):
    """Return the weights; of a sharded model what this rank holds."""
    return {name: local_part(each) for name, each in trainer.model.state_dict().items()}


@dataclass(frozen=True)
class Compared:
    """Both Trainers after training, and the report of the one that was tuned."""

    tuned: Any
    by_hand: Any
    report: autobatch.TuningReport

    def check(self):
        """Assert that both received the same data and came out the same to the bit."""
        plan = self.report.plan
        assert history(self.tuned) == history(self.by_hand)
        assert len(history(self.tuned)) > 3
        assert getattr(self.tuned, "shapes", 0) == getattr(self.by_hand, "shapes", 0)
        assert self.tuned.state.global_step == self.by_hand.state.global_step
        assert same(weights(self.tuned), weights(self.by_hand))
        assert (plan.micro_batch_size, plan.effective_batch_size) != (OWN, OWN)


def compared(folder, make_trainer=trainer_of, tune=None, train=None, **options):
    """Train with the plan that `tune` finds from an own batch size, and again with its numbers."""
    numbers = {"per_device_train_batch_size": OWN, "gradient_accumulation_steps": 1}
    first = make_trainer(folder / "tuned", **{**options, **numbers})
    report = tuned(first, **(tune or {}))
    first.train()
    plan = report.plan
    numbers = {
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulate_grad_batches,
    }
    second = make_trainer(folder / "by_hand", **{**options, **numbers})
    second.train()
    return Compared(first, second, report)
