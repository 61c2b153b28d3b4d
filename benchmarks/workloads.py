"""Networks and devices of the GPU benchmarks: three networks, a device with a cap, and a simulated one.

Inputs are made on the device by each step, so reading data is not measured.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import os
import platform
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import pynvml
import torch
from torch import nn
from torch.nn import functional as F

import autobatch
from autobatch._memory import parse_bytes
from autobatch._memory.cuda import CudaProbe
from autobatch._memory.ledger import Ledger
from autobatch.testing import SimulatedAccelerator

# Networks


class Bottleneck(nn.Module):
    def __init__(self, inside, width, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )
        self.short = nn.Identity()
        if stride > 1 or inside != 4 * width:
            self.short = nn.Sequential(
                nn.Conv2d(inside, 4 * width, 1, stride, bias=False),
                nn.BatchNorm2d(4 * width),
            )

    def forward(self, x):
        return F.relu(self.body(x) + self.short(x), inplace=True)


class ResNet(nn.Module):
    """Bottleneck blocks in four stages; ResNet-50 with 3, 4, 6, 3 of them from 64 channels on."""

    def __init__(self, side=224, blocks=(3, 4, 6, 3), width=64):
        super().__init__()
        self.side = side
        layers = [
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        ]
        inside = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                layers.append(Bottleneck(inside, width << stage, stride))
                inside = 4 * (width << stage)
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inside, 1000)

    def loss(self, count, device):
        images = torch.randn(count, 3, self.side, self.side, device=device)
        labels = torch.randint(0, 1000, (count,), device=device)
        return F.cross_entropy(self.head(self.body(images).mean((2, 3))), labels)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x):
        parts = self.attention(self.norms[0](x)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mixed(seen.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))


class Gpt(nn.Module):
    """A causal transformer; of the size of GPT-2's smallest with 12 layers of width 768.

    Its samples are short, so that one sample is a small share of the memory, and rounding to whole samples does not decide.
    """

    def __init__(self, layers=12, width=768, heads=12, vocabulary=50_257, length=128):
        super().__init__()
        self.length, self.vocabulary = length, vocabulary
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.zeros(length, width))
        self.body = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def loss(self, count, device):
        tokens = torch.randint(0, self.vocabulary, (count, self.length + 1), device=device)
        hidden = self.norm(self.body(self.tokens(tokens[:, :-1]) + self.places))
        logits = F.linear(hidden, self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def convolved_twice(inside, outside):
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, 1, 1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(inplace=True),
        nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """A U-Net: four times down and up again, with skip connections."""

    def __init__(self, side=256, width=32, depth=4):
        super().__init__()
        self.side = side
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            convolved_twice(inside, outside) for inside, outside in itertools.pairwise([3, *widths])
        )
        self.rise = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 2, 2) for narrow, wide in itertools.pairwise(widths)
        )
        self.up = nn.ModuleList(convolved_twice(2 * narrow, narrow) for narrow in widths[:-1])
        self.head = nn.Conv2d(width, 2, 1)

    def loss(self, count, device):
        x = torch.randn(count, 3, self.side, self.side, device=device)
        labels = torch.randint(0, 2, (count, self.side, self.side), device=device)
        seen = []
        for level in self.down[:-1]:
            x = level(x)
            seen.append(x)
            x = F.max_pool2d(x, 2)
        x = self.down[-1](x)
        for rise, up, beside in reversed(list(zip(self.rise, self.up, seen, strict=True))):
            x = up(torch.cat([rise(x), beside], 1))
        return F.cross_entropy(self.head(x), labels)


NETWORKS = {"ResNet-50": ResNet, "GPT-2": Gpt, "U-Net": UNet}


class Images(nn.Module):
    """A classifier of another package, on random images."""

    def __init__(self, model, side=224):
        super().__init__()
        self.model, self.side = model, side

    def loss(self, count, device):
        images = torch.randn(count, 3, self.side, self.side, device=device)
        return F.cross_entropy(self.model(images), torch.randint(0, 1000, (count,), device=device))


class Text(nn.Module):
    """A language model of transformers, on random tokens."""

    def __init__(self, model, length):
        super().__init__()
        self.model, self.length = model, length

    def loss(self, count, device):
        vocabulary = self.model.config.vocab_size
        tokens = torch.randint(2, vocabulary, (count, self.length), device=device)
        return self.model(input_ids=tokens, labels=tokens).loss


def of_timm(name):
    return Images(importlib.import_module("timm").create_model(name, num_classes=1000))


def of_torchvision(name):
    return Images(getattr(importlib.import_module("torchvision").models, name)())


def of_transformers(name, length, **config):
    """Return a model with random weights, of the default size of its configuration."""
    package = importlib.import_module("transformers")
    made = getattr(package, f"{name}Config")(**config)
    made.use_cache = False
    kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return Text(getattr(package, f"{name}{kind}")(made), length)


def installed(networks):
    """Return the networks whose package is installed."""
    return {
        name: build
        for name, build in networks.items()
        if importlib.util.find_spec(name.partition(" ")[0]) is not None
    }


OF_OTHERS = {
    "timm vit_base_patch16_224": partial(of_timm, "vit_base_patch16_224"),
    "transformers GPT2": partial(of_transformers, "GPT2", 512),
    "torchvision resnet50": partial(of_torchvision, "resnet50"),
}
# Those that no prediction has been compared with
UNSEEN = {
    "timm deit_small_patch16_224": partial(of_timm, "deit_small_patch16_224"),
    "timm regnety_016": partial(of_timm, "regnety_016"),
    "torchvision resnet101": partial(of_torchvision, "resnet101"),
    "torchvision vgg16_bn": partial(of_torchvision, "vgg16_bn"),
    "transformers OPT": partial(of_transformers, "OPT", 256),
    "transformers Roberta": partial(of_transformers, "Roberta", 256, is_decoder=True),
}
# The same in little, to see that a benchmark runs
BRIEF = {
    "ResNet-50": lambda: ResNet(32, (1, 1, 1, 1), 4),
    "GPT-2": lambda: Gpt(2, 32, 4, 250, 32),
    "U-Net": lambda: UNet(32, 4, 2),
}


# Where

FULL = 0.9  # of a device


class _SpokenLikeCuda(Ledger):
    """A ledger whose refusals other packages take for CUDA's: they know them by their words alone."""

    def _refusal(self, wanted):
        return torch.OutOfMemoryError(f"CUDA out of memory. {super()._refusal(wanted)}")


@dataclass(frozen=True)
class Place:
    """A CUDA device, or one that is simulated on the CPU.

    Args:
        kind: "cuda" or "cpu".
        memory: Bytes that every method may hold.
    """

    kind: str
    memory: int

    @classmethod
    def named(cls, device, memory):
        if device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("--device cuda: there is no CUDA device; see --device cpu.")
        if memory == "full":
            return cls(device, int(FULL * torch.cuda.get_device_properties(0).total_memory))
        return cls(device, parse_bytes("--memory", memory))

    @property
    def is_cuda(self):
        return self.kind == "cuda"

    def probe(self):
        return CudaProbe(0) if self.is_cuda else SimulatedAccelerator(self.memory)

    def clock(self):
        """Seconds, once all queued work is done."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def capped(self):
        """Apply the same limit to a method without a budget; return its memory use."""
        usage = CudaUsage(self.memory) if self.is_cuda else PaperUsage(self.memory)
        with usage.watched():
            yield usage


class CudaUsage:
    """Counters of torch's allocator."""

    def __init__(self, memory):
        self.memory = memory
        self._ooms = self._stat("num_ooms")

    @contextlib.contextmanager
    def watched(self):
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(min(1.0, self.memory / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def attach(self, model):
        """Do nothing: the allocator knows all tensors of the device."""

    @property
    def ooms(self):
        return self._stat("num_ooms") - self._ooms

    @property
    def peak(self):
        return torch.cuda.max_memory_reserved()

    @staticmethod
    def _stat(name):
        return torch.cuda.memory_stats().get(name, 0)


class PaperUsage:
    """Counters of a ledger."""

    def __init__(self, memory):
        self.memory = memory
        self._ledger = _SpokenLikeCuda()

    def watched(self):
        return self._ledger.watching(self.memory, offset=0)

    def attach(self, model):
        self._ledger.attach(model)

    @property
    def ooms(self):
        return self._ledger.failures

    @property
    def peak(self):
        return self._ledger.peak


# Training


def in_bf16(place, model, optimizer):
    """The training loop in bf16, as `autobatch.find` takes it."""

    def train(batch_size, accumulate):
        while True:
            for _ in range(accumulate):
                with torch.autocast(place.kind, torch.bfloat16):
                    loss = model.loss(batch_size, place.kind)
                (loss / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    return train


def fresh(place, build):
    """A network and its training loop."""
    torch.manual_seed(0)
    model = build().to(place.kind)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    return model, in_bf16(place, model, optimizer)


def surroundings(place):
    """Versions and devices, for whoever reads the numbers."""
    told = {
        "device": place.probe().name,
        "autobatch": autobatch.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    for package in ("pytorch-lightning", "lightning", "accelerate"):
        with contextlib.suppress(PackageNotFoundError):
            told[package] = version(package)
    if place.is_cuda:
        pynvml.nvmlInit()
        told["cuda"] = str(torch.version.cuda)
        told["cudnn"] = str(torch.backends.cudnn.version())
        told["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
        # The first is the newer name
        names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
        settings = (os.environ.get(name) for name in names)
        told["allocator"] = next(filter(None, settings), "default")
    return told
