"""Small networks: traces equal the bytes of real tensors, and fits equal traces."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autobatch._memory.estimate.prediction import MemoryEstimate
from autobatch._memory.estimate.scratch import Gpu
from test_estimate import Attention, convolutional, images, measured, step_of, tokens


class Residual(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x + self.layer(x)


class Checkpointed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


class Shared(nn.Module):
    """An embedding whose weight is also that of the output."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(32, 24)
        self.norm = nn.LayerNorm(24)

    def forward(self, tokens):
        return F.linear(self.norm(self.tokens(tokens).mean(1)), self.tokens.weight)


class Skip(nn.Module):
    """A network with one skip connection, as a U-Net."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 6, 2, 2)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        high = F.relu(self.down(x))
        low = F.relu(self.inner(F.max_pool2d(high, 2)))
        return self.head(torch.cat([self.up(low), high], 1)).mean((2, 3))


def vectors(size):
    return torch.randn(size, 24), torch.randint(0, 4, (size,))


def words(size):
    return torch.randint(0, 32, (size, 12)), torch.randint(0, 4, (size,))


def sequences(size):
    return torch.randn(size, 6, 24), torch.randint(0, 4, (size,))


def mean_of_rows(outputs):
    return outputs.flatten(1, -2).mean(1) if outputs.ndim > 2 else outputs


def loss(model, batch):
    return F.cross_entropy(mean_of_rows(model(batch[0])), batch[1])


def norm_and_wide():
    return nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))


NETWORKS = {
    "convolutional": (convolutional, images),
    "attention": (Attention, tokens),
    "linear": (lambda: nn.Linear(24, 4), vectors),
    "deep": (
        lambda: nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(24, 24), nn.Tanh()))),
        vectors,
    ),
    "residual": (lambda: nn.Sequential(*(Residual(norm_and_wide()) for _ in range(3))), vectors),
    "checkpointed": (
        lambda: nn.Sequential(
            nn.Linear(24, 24), *(Checkpointed(norm_and_wide()) for _ in range(3))
        ),
        vectors,
    ),
    "mixed norms": (
        lambda: nn.Sequential(
            nn.Linear(24, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.GroupNorm(4, 32), nn.Linear(32, 4)
        ),
        vectors,
    ),
    "strided convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, 2),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 4, 3),
            nn.Flatten(),
        ),
        images,
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 1),
            nn.Conv2d(12, 12, 3, groups=12),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ),
        images,
    ),
    "skip connection": (Skip, images),
    "shared weights": (Shared, words),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(24, 4, 48, 0.0, batch_first=True),
        sequences,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_trace_equals_the_live_bytes_of_real_tensors(name):
    make, batch = NETWORKS[name]
    step = step_of(make().train(), batch, loss=loss)

    estimate = MemoryEstimate.of(step, None)

    assert estimate.peaks(23).requested == measured(step, 23)


@pytest.mark.parametrize(
    "name",
    [
        "convolutional",
        "attention",
        *(pytest.param(name, marks=pytest.mark.slow) for name in list(NETWORKS)[2:]),
    ],
)
def test_fitted_events_of_a_gpu_equal_those_of_a_trace(name):
    make, batch = NETWORKS[name]
    step = step_of(make().train(), batch, loss=loss, autocast=torch.bfloat16)

    fitted = MemoryEstimate.of(step, Gpu()).events

    assert list(fitted.at(23)) == MemoryEstimate.traced(step, 23, Gpu())
