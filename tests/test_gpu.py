"""The main path on a real CUDA device: run with `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autobatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

MIB = 2**20


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(1024, 4096),
        nn.BatchNorm1d(4096),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(4096, 10),
    )


def training(model, optimizer):
    def train(batch_size, accumulate):
        while True:
            for _ in range(accumulate):
                x = torch.randn(batch_size, 1024, device="cuda")
                (model(x).square().mean() / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    return train


def test_the_largest_that_fits_a_small_allowance_is_found_and_everything_is_given_back():
    model = network().cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    numbers, cap = (
        torch.cuda.get_rng_state(),
        torch.cuda.get_per_process_memory_fraction(0),
    )

    report = autobatch.find(training(model, optimizer), memory_limit="2GiB")

    fits = [trial for trial in report.trials if trial.fits]
    assert report.plan.micro_batch_size == max(trial.batch_size for trial in fits)
    assert all(trial.peak <= report.budget for trial in fits)
    assert all(
        torch.equal(before[name], value) for name, value in model.state_dict().items()
    )
    assert not optimizer.state
    assert torch.equal(numbers, torch.cuda.get_rng_state())
    assert torch.cuda.get_per_process_memory_fraction(0) == cap


def test_a_real_out_of_memory_leaves_nothing_on_the_device():
    model = network().cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()

    autobatch.find(
        training(model, optimizer),
        memory_limit="1GiB",
        search=autobatch.Bisection(),
        steps_per_trial=2,
    )

    assert torch.cuda.memory_allocated() - held <= MIB


def test_a_trainer_on_the_gpu_trains_with_what_was_found():
    pl = pytest.importorskip("pytorch_lightning")
    from torch.utils.data import DataLoader, TensorDataset

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.sizes = []

        def training_step(self, batch, _):
            self.sizes.append(len(batch[0]))
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    model = Model()
    callback = autobatch.AutoBatch(target_batch_size=4096, memory_limit="1GiB")
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[callback],
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        model, DataLoader(TensorDataset(torch.randn(8192, 1024)), batch_size=16)
    )

    assert callback.report.plan.effective_batch_size == 4096
    assert set(model.sizes) == {callback.report.plan.micro_batch_size}
