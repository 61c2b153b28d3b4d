"""Real networks and training loops for tests, with random weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Transformer(nn.Module):
    """A transformer over 256 tokens, of 4.6 M parameters, most of them in its embedding."""

    def __init__(self, vocabulary=32_768, width=128, layers=2, length=256):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 16)

    def forward(self, tokens):
        hidden = self.tokens(tokens) + self.positions
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden.mean(1))

    def loss(self, batch_size):
        tokens = torch.randint(0, 32_768, (batch_size, 256))
        return F.cross_entropy(self(tokens), tokens[:, 0] % 16)


class Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)])
        self.short = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x):
        hidden = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(hidden)) + self.short(x))


class ResNet(nn.Module):
    """A residual network of about 2.8 M parameters, for images of 32 x 32."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 128, 256)
        strides = (1, 2, 2, 2)
        self.stem = nn.Sequential(
            *(
                block
                for inside, outside, stride in zip(widths, widths[1:], strides, strict=False)
                for block in (
                    Residual(inside, outside, stride),
                    Residual(outside, outside, 1),
                )
            )
        )
        self.head = nn.Linear(256, 10)

    def forward(self, images):
        return self.head(self.stem(images).mean((2, 3)))

    def loss(self, batch_size):
        images, labels = (
            torch.randn(batch_size, 3, 32, 32),
            torch.randint(0, 10, (batch_size,)),
        )
        return F.cross_entropy(self(images), labels)


class Perceptron(nn.Module):
    """Small and quick, with everything a snapshot must see: BatchNorm, dropout, a buffer, a generator, a list."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(width, 4),
        )
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.noise = torch.Generator().manual_seed(3)
        self.sizes = []

    def forward(self, x):
        self.seen = self.seen + len(x)  # bound anew, as buffers often are
        self.sizes.append(len(x))
        return self.layers(x + 0.1 * torch.rand(x.shape, generator=self.noise))

    def loss(self, batch_size):
        x = torch.randn(batch_size, 16)
        return F.cross_entropy(self(x), torch.randint(0, 4, (batch_size,)))


def training(model, optimizer):
    """A training loop over data made on the spot: yields after each optimizer step."""

    def train(batch_size, accumulate):
        while True:
            for _ in range(accumulate):
                (model.loss(batch_size) / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    return train
