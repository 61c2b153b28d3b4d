"""Predicted peaks of training steps against those measured on an H200, as Markdown tables.

Measured with torch 2.11.0+cu130 and bf16 autocast: `estimate_peaks.json`, the third step of each
row, and the searches in `tests/recordings`. Needs timm and transformers, no GPU:
`python benchmarks/estimate.py [--page docs/estimate.md] [NETWORK ...]`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import workloads
from pages import renew, table
from torch.nn import functional as F

from autobatch._estimate.band import band_of
from autobatch._estimate.inputs import Inputs
from autobatch._memory.estimate.prediction import MemoryEstimate
from autobatch._memory.estimate.scratch import Gpu
from autobatch._memory.estimate.tracer import TrainingStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from autobatch._estimate.band import Band

MEASURED = Path(__file__).with_name("estimate_peaks.json")
RECORDED = Path(__file__).parents[1] / "tests" / "recordings" / "h200.json"


@dataclass(frozen=True)
class Network:
    kind: str
    make: Callable[[], torch.nn.Module]
    batch: Callable[[int], object]
    loss: Callable[[torch.nn.Module, object], torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """Bytes of one network at one batch size, and relative errors of the prediction."""

    network: str
    kind: str
    batch_size: int
    allocated: int
    reserved: int
    allocated_error: float
    reserved_error: float
    band: float

    @property
    def is_within(self) -> bool:
        """Whether the measured peak lies in the band of the predicted one."""
        return 1 - self.band <= 1 / (1 + self.reserved_error) <= 1 + self.band


def images(name: str, kind: str = "convolutional") -> Network:
    def make() -> torch.nn.Module:
        import timm

        return timm.create_model(name, num_classes=1000)

    def batch(size: int) -> object:
        return torch.randn(size, 3, 224, 224), torch.randint(0, 1000, (size,))

    return Network(kind, make, batch, lambda model, b: F.cross_entropy(model(b[0]), b[1]))


def text(length: int, make: Callable[[], torch.nn.Module], *, is_causal: bool = True) -> Network:
    def batch(size: int) -> object:
        tokens = torch.randint(0, 30_000, (size, length))
        return tokens, tokens if is_causal else torch.randint(0, 2, (size,))

    return Network(
        "transformer", make, batch, lambda model, b: model(input_ids=b[0], labels=b[1]).loss
    )


def gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(use_cache=False))


def checkpointed_gpt2() -> torch.nn.Module:
    model = gpt2()
    model.gradient_checkpointing_enable()
    return model


def bert() -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(num_labels=2))


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            vocab_size=32_000,
            use_cache=False,
        )
    )


def clip() -> Network:
    def make() -> torch.nn.Module:
        from transformers import CLIPConfig, CLIPModel

        return CLIPModel(CLIPConfig())

    def batch(size: int) -> object:
        return torch.randint(0, 49_408, (size, 77)), torch.randn(size, 3, 224, 224)

    def loss(model: torch.nn.Module, batch: object) -> torch.Tensor:
        return model(input_ids=batch[0], pixel_values=batch[1], return_loss=True).loss

    return Network("transformer", make, batch, loss)


class Lstm(torch.nn.Module):
    """Language model of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(10_000, 256)
        self.lstm = torch.nn.LSTM(256, 512, 2, batch_first=True, dropout=0.2)
        self.head = torch.nn.Linear(512, 10_000)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.words(tokens))[0])


def lstm() -> Network:
    def batch(size: int) -> object:
        tokens = torch.randint(0, 10_000, (size, 64))
        return tokens, tokens

    def loss(model: torch.nn.Module, batch: object) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    return Network("LSTM", Lstm, batch, loss)


NETWORKS = {
    "timm resnet50": images("resnet50"),
    "timm convnext_tiny": images("convnext_tiny"),
    "timm efficientnet_b0": images("efficientnet_b0"),
    "timm vit_base_patch16_224": images("vit_base_patch16_224", "transformer"),
    "timm swin_tiny_patch4_window7_224": images("swin_tiny_patch4_window7_224", "transformer"),
    "gpt2 T256": text(256, gpt2),
    "gpt2 T256 checkpointing": text(256, checkpointed_gpt2),
    "bert T128": text(128, bert, is_causal=False),
    "llama 12x768 T256": text(256, llama),
    "clip": clip(),
    "lstm T64": lstm(),
}


def recorded(name: str, kind: str) -> Network:
    """Return a network of the recorded searches, which makes its batch on the device."""
    return Network(
        kind, workloads.NETWORKS[name], lambda size: size, lambda model, n: model.loss(n, "cpu")
    )


# In the order in which one process ran them
SEARCHES = {
    "ResNet-50": recorded("ResNet-50", "convolutional"),
    "GPT-2": recorded("GPT-2", "transformer"),
    "U-Net": recorded("U-Net", "convolutional"),
}


@dataclass(frozen=True)
class Predicted:
    estimate: MemoryEstimate
    band: Band


def predicted(network: Network, *, in_trainer: bool = False) -> Predicted:
    """Return predicted peaks of a loop, or of a step in a Trainer of Lightning."""
    model = network.make().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    step = TrainingStep(model, optimizer, network.loss, network.batch, torch.bfloat16)
    step = replace(step, zeroes_after_forward=in_trainer)
    estimate = MemoryEstimate.of(step, Gpu())
    band = band_of(Inputs(step, "bf16-mixed"), estimate.events.at(2), ())
    return Predicted(estimate, band)


def compared(names: Iterable[str]) -> Iterator[Comparison]:
    """Yield a comparison for each measured batch size of these networks."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    for name in names:
        if name in SEARCHES:
            yield from compared_with_search(name)
            continue
        network = NETWORKS[name]
        of = predicted(network)
        for row in rows:
            if row["model"] == name:
                steady = of.estimate.steps(row["batch"])[-1]
                # Measured above what was there before the model: the workspaces of cuBLAS, and the
                # random state of dropout in an LSTM, if an earlier row made it
                before = sum(Gpu().workspaces) + row.get("before", 0)
                allocated = steady.allocated - before
                yield Comparison(
                    name,
                    network.kind,
                    row["batch"],
                    row["allocated"][-1],
                    row["reserved"][-1],
                    allocated / row["allocated"][-1] - 1,
                    steady.reserved / row["reserved"][-1] - 1,
                    of.band.share_at(steady.reserved),
                )


def compared_with_search(name: str) -> Iterator[Comparison]:
    """Yield a comparison for each size that fitted in a recorded search."""
    searches = json.loads(RECORDED.read_text(encoding="utf-8"))["searches"]
    (search,) = (each for each in searches if each["name"] == f"{name}, bf16, AdamW")
    before = 0  # bytes of the network that ran before in the same process
    if name != next(iter(SEARCHES)):
        model = SEARCHES[list(SEARCHES)[list(SEARCHES).index(name) - 1]].make()
        before = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    network = SEARCHES[name]
    of = predicted(network)
    for size, reserved, allocated, requested, outcome in search["points"]:
        if outcome == "fits":
            peaks = of.estimate.peaks(size)
            # It was still held in some trials and not in others; requested bytes show which
            held = min((0, before), key=lambda extra: abs(peaks.requested + extra - requested))
            yield Comparison(
                f"recorded {name}",
                network.kind,
                size,
                allocated,
                reserved,
                (peaks.allocated + held) / allocated - 1,
                (peaks.reserved + held) / reserved - 1,
                of.band.share_at(peaks.reserved),
            )


def mean_error(rows: Iterable[Comparison], kind: str) -> float:
    """Return the mean absolute error of the reserved peak of one kind of network."""
    return statistics.mean(abs(row.reserved_error) for row in rows if row.kind == kind)


def summary(rows: list[Comparison]) -> str:
    """Return a table of the errors of each kind of network."""
    lines = []
    for kind in sorted({row.kind for row in rows}):
        of_kind = [row for row in rows if row.kind == kind]
        worst = max((row.reserved_error for row in of_kind), key=abs)
        share = sum(row.is_within for row in of_kind) / len(of_kind)
        allocated = statistics.mean(abs(row.allocated_error) for row in of_kind)
        lines.append(
            [
                kind,
                str(len(of_kind)),
                f"{allocated:.2%}",
                f"{mean_error(rows, kind):.2%}",
                f"{worst:+.2%}",
                f"{math.floor(1000 * share) / 10:g} %",
            ]
        )
    header = ["network", "rows", "allocated: mean", "reserved: mean", "worst", "within the band"]
    return table(header, lines)


def full(rows: list[Comparison]) -> str:
    """Return a table of all comparisons."""
    header = ["network", "batch", "allocated, MiB", "error", "reserved, MiB", "error ", "band"]
    return table(
        header,
        [
            [
                row.network,
                str(row.batch_size),
                f"{row.allocated / 2**20:,.0f}",
                f"{row.allocated_error:+.2%}",
                f"{row.reserved / 2**20:,.0f}",
                f"{row.reserved_error:+.2%}",
                f"±{row.band:.1%}" + ("" if row.is_within else ", outside"),
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("networks", nargs="*", help="all by default")
    parser.add_argument("--page", type=Path, help="also renew the tables in this page")
    options = parser.parse_args()
    rows = []
    for name in options.networks or [*NETWORKS, *SEARCHES]:
        for row in compared([name]):
            rows.append(row)
            print(row, flush=True)
    text = f"{summary(rows)}\n\n{full(rows)}"
    print(text)
    if options.page is not None:
        renew(options.page, "estimate.py", text)


if __name__ == "__main__":
    main()
