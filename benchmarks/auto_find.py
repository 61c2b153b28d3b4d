"""Compare `auto_find_batch_size` of transformers with `autobatch.transformers.tune` on the same Trainers.

    python benchmarks/auto_find.py [--markdown PATH] [--summary PATH]

Both ask for 32 samples per forward pass and 8 passes per update, on a simulated accelerator on which 32 do not fit.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from pages import machine, renew, table

import autobatch.transformers
from autobatch.testing import SimulatedAccelerator

BATCH_SIZE, ACCUMULATE = 32, 8
TARGET = BATCH_SIZE * ACCUMULATE
TRUE = (25, 18, 11)  # the largest batch size that fits; the memory is made for it
UPDATES = 3
LONGEST = 64  # tokens


class Sentences(torch.utils.data.Dataset):
    """Random tokens, of one length or of many."""

    def __init__(self, is_ragged):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(8, LONGEST + 1, (UPDATES * TARGET,), generator=generator)
        self.samples = [
            {"input_ids": torch.randint(5, 512, (n,), generator=generator), "labels": n % 2}
            for n in (lengths.tolist() if is_ragged else [LONGEST] * len(lengths))
        ]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, at):
        return self.samples[at]


def collate(samples):
    """Pad to the longest of a batch."""
    ids = [each["input_ids"] for each in samples]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    labels = torch.tensor([each["labels"] for each in samples])
    return {"input_ids": padded, "attention_mask": (padded > 0).long(), "labels": labels}


class Counting(transformers.Trainer):
    """Counts forward and backward passes that ran, and that ran out of memory."""

    passes = failures = 0

    def training_step(self, *args, **options):
        try:
            loss = super().training_step(*args, **options)
        except torch.OutOfMemoryError:
            self.failures += 1
            raise
        self.passes += 1
        return loss


def trainer(data, batch_size=BATCH_SIZE, accumulate=ACCUMULATE, **arguments):
    transformers.set_seed(0)
    config = transformers.BertConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
    )
    options = transformers.TrainingArguments(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        **{"max_steps": UPDATES, **arguments},
    )
    model = transformers.BertForSequenceClassification(config)
    one = Counting(model, options, collate, data)
    one.remove_callback(transformers.PrinterCallback)
    return one


@dataclass(frozen=True)
class Result:
    """What came of a Trainer.

    Args:
        true: The largest batch size that fits.
        found: Batch size that training ended with.
        largest: The largest size that ran, if more were tried.
        accumulate: Passes per update that training ended with.
        failures: Passes that ran out of memory.
        lost: Passes of training that a restart repeated, with weights that they had trained.
    """

    true: int
    found: int
    largest: int
    accumulate: int
    failures: int
    lost: int

    @property
    def effective(self):
        return self.found * self.accumulate


def peak(size):
    """Bytes that training at a size takes, on samples of the greatest length."""
    accelerator = SimulatedAccelerator("1TiB")
    one = trainer(Sentences(is_ragged=False), size, max_steps=2)
    accelerator.attach(one.model)
    with accelerator.limited(2**40):
        one.train()
    return accelerator.read().peak


def theirs(data, true, memory):
    one = trainer(data, auto_find_batch_size=True)
    accelerator = SimulatedAccelerator(memory)
    accelerator.attach(one.model)
    with accelerator.limited(memory):
        one.train()
    found = one._train_batch_size  # noqa: SLF001 -- has no public name
    needed = one.state.global_step * ACCUMULATE
    return Result(true, found, found, ACCUMULATE, one.failures, one.passes - needed)


def ours(data, true, memory):
    one = trainer(data)
    accelerator = SimulatedAccelerator(memory)
    report = autobatch.transformers.tune(
        one,
        target_batch_size=TARGET,
        device=accelerator,
        memory_limit=1.0,
        timing_seconds=0,
        verbose=False,
    )
    failed, one.passes, one.failures = one.failures, 0, 0
    with accelerator.limited(memory):
        one.train()
    if one.failures or one.passes != one.state.global_step * one.args.gradient_accumulation_steps:
        raise SystemExit(f"{report.plan} ran out of memory in training.")
    largest = max(trial.batch_size for trial in report.trials if trial.fits)
    found, accumulate = one.args.per_device_train_batch_size, one.args.gradient_accumulation_steps
    return Result(true, found, largest, accumulate, failed, 0)


def _range(values, form=str):
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{form(middle)} ({form(low)}–{form(high)})" if low < high else form(low)


def row(name, data_name, results):
    return [
        name,
        data_name,
        _range([each.largest / each.true for each in results], "{:.2f}".format),
        _range([each.failures for each in results], "{:g}".format),
        _range([each.lost for each in results], "{:g}".format),
        ", ".join(f"{each.found} × {each.accumulate}" for each in results),
        _range([each.effective for each in results], "{:g}".format),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--markdown", type=Path, help="write the table into this page")
    parser.add_argument("--summary", type=Path, help="write it into this page too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    importlib.import_module("autobatch.sinks").console = lambda _: None
    memory = {true: (peak(true) + peak(true + 1)) // 2 for true in TRUE}
    rows = []
    for data_name, is_ragged in (("one length", False), ("8–64 tokens", True)):
        data = Sentences(is_ragged)
        for name, search in (("auto_find_batch_size", theirs), ("autobatch", ours)):
            results = [search(data, true, memory[true]) for true in TRUE]
            rows.append(row(name, data_name, results))
            print(rows[-1], flush=True)
    header = ["by", "samples", "found / true", "out of memory", "passes repeated"]
    text = table([*header, "size × accumulation", f"per update, of {TARGET}"], rows)
    text = f"Measured on {machine()}, transformers {transformers.__version__}. Largest sizes that fit: {', '.join(map(str, TRUE))}.\n\n{text}"
    print(f"\n{text}")
    for page in (given.markdown, given.summary):
        if page:
            renew(page, "auto_find.py", text)


if __name__ == "__main__":
    main()
