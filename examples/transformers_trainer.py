"""Tune a Hugging Face Trainer: a small language model, from random weights, of images of digits."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import autobatch
from autobatch.testing import SimulatedAccelerator

# Each image is a text of 64 tokens: its pixels, in 17 shades
pixels = torch.tensor(load_digits().data).long()
data = [{"input_ids": image, "labels": image} for image in pixels[:512]]
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=17,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
)
trainer = Trainer(
    model=model,
    args=TrainingArguments("transformers_trainer", max_steps=4, use_cpu=True, report_to="none"),
    train_dataset=data,
)

report = autobatch.transformers.tune(
    trainer,
    target_batch_size=64,
    device=SimulatedAccelerator("12MiB"),  # leave this out on a GPU
)
assert trainer.args.per_device_train_batch_size == report.plan.micro_batch_size
assert trainer.args.gradient_accumulation_steps == report.plan.accumulate_grad_batches

trainer.train()
