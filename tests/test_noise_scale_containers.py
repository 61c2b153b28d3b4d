"""NoiseScale changes no parameters and state that modules keep in containers and other objects."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autobatch
from lightning_here import pl, quiet_trainer
from sameness import same
from test_noise_scale_lightning import loader


class Recurrent(nn.Module):
    """Reads 16 numbers as 4 steps of 4."""

    def __init__(self, kind):
        super().__init__()
        self.cells = kind(4, 8, num_layers=2, batch_first=True)
        self.cells.flatten_parameters()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.cells(x.reshape(-1, 4, 4))[0][:, -1])


class Tied(nn.Module):
    """The embedding of the input is the output layer too."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(4, 4)
        self.first = nn.Linear(16, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        return self.head(self.first(x) + self.tokens((x[:, 0] > 0).long()))


class Bank:
    """A plain object with all kinds of state."""

    def __init__(self):
        self.scale = nn.Parameter(torch.ones(4))
        self.values = torch.zeros(4)
        self.norm = nn.BatchNorm1d(4)
        self.noise = torch.Generator().manual_seed(2)
        self.calls = 0


class Hidden(nn.Module):
    """Parameters, buffers, modules and counters that no module has registered."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 4)
        self.hidden = [nn.Parameter(torch.ones(4)), nn.BatchNorm1d(4)]
        self.named = {"shift": nn.Parameter(torch.zeros(4)), "mean": torch.zeros(4)}
        self.listed = nn.ParameterList([torch.ones(4)])
        self.pair = (torch.zeros(4), [Bank()])
        self.bank = Bank()
        self.names = {"first"}

    def extra_parameters(self):
        banks = (self.bank, self.pair[1][0])
        return [self.hidden[0], self.named["shift"], *(bank.scale for bank in banks)]

    def forward(self, x):
        y = self.hidden[1](self.first(x)) * self.hidden[0] + self.named["shift"] * self.listed[0]
        self.named["mean"] += y.detach().mean(0)
        self.pair[0].add_(y.detach().mean(0))
        for bank in (self.bank, self.pair[1][0]):
            y = bank.norm(y) * bank.scale + torch.rand(4, generator=bank.noise)
            bank.values = bank.values + y.detach().sum(0)
            bank.calls += 1
        self.names.add(f"{len(x)} samples")
        return y

    def state(self):
        banks = (self.bank, self.pair[1][0])
        return [
            self.extra_parameters(),
            self.hidden[1].state_dict(),
            self.named,
            self.pair[0],
            [(b.values, b.norm.state_dict(), b.noise.get_state(), b.calls) for b in banks],
            sorted(self.names),
        ]


def normed(norm):
    return nn.Sequential(norm(nn.Linear(16, 8)), nn.ReLU(), nn.Linear(8, 4))


NETWORKS = {
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "RNN": lambda: Recurrent(nn.RNN),
    "weight_norm": lambda: normed(nn.utils.parametrizations.weight_norm),
    "spectral_norm": lambda: normed(nn.utils.parametrizations.spectral_norm),
    "spectral_norm by a hook": lambda: normed(nn.utils.spectral_norm),
    "tied weights": Tied,
    "hidden": Hidden,
}


class Model(pl.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.net = network

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        extra = self.net.extra_parameters() if isinstance(self.net, Hidden) else []
        return torch.optim.AdamW([*self.parameters(), *extra], 0.01)


def trained(make, callbacks, accumulate):
    pl.seed_everything(1, verbose=False)
    model = Model(make())
    trainer = quiet_trainer(*callbacks, max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(model, loader())
    (optimizer,) = trainer.optimizers
    return [
        model.state_dict(),
        optimizer.state_dict(),
        model.net.state() if isinstance(model.net, Hidden) else None,
        torch.get_rng_state(),
    ]


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_bit_identical(make, accumulate):
    noise = autobatch.NoiseScale(every=2, split_every=3)

    watched = trained(make, [noise], accumulate)
    plain = trained(make, [], accumulate)

    steps = {int(state["step"]) for state in plain[1]["state"].values()}
    assert steps == {30 // accumulate}
    assert same(watched, plain)
    assert noise.reading.windows


def test_step_that_changes_hidden_parameters_is_not_measured():
    class Teacher(Model):
        """Updates an average of the weights in its step, in a module that is not registered."""

        def __init__(self):
            super().__init__(nn.Linear(16, 4))
            self.teacher = [nn.Linear(16, 4)]

        def training_step(self, batch, batch_idx):
            (mean, _), (new, _) = self.teacher[0].parameters(), self.net.parameters()
            with torch.no_grad():
                mean.lerp_(new, 0.1)
            return super().training_step(batch, batch_idx)

    def run(*callbacks):
        pl.seed_everything(1, verbose=False)
        model = Teacher()
        quiet_trainer(*callbacks, max_epochs=1).fit(model, loader())
        return model.teacher[0].state_dict()

    noise = autobatch.NoiseScale(split_every=3)

    assert same(run(noise), run())
    assert "changes parameters itself" in noise.reading.reason
