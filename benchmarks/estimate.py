"""Predicted peaks of training steps against those measured on an H200; prints a Markdown table.

Measured with torch 2.11.0+cu130 and bf16 autocast: `estimate_peaks.json`, the third step of each
row. Needs timm and transformers, no GPU: `python benchmarks/estimate.py [NETWORK ...]`.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from autobatch._memory.estimate.prediction import MemoryEstimate
from autobatch._memory.estimate.scratch import Gpu
from autobatch._memory.estimate.tracer import TrainingStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

MEASURED = Path(__file__).with_name("estimate_peaks.json")


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
}


def compared(names: Iterable[str]) -> Iterator[Comparison]:
    """Yield a comparison for each measured batch size of these networks."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    for name in names:
        network = NETWORKS[name]
        model = network.make().train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        step = TrainingStep(model, optimizer, network.loss, network.batch, torch.bfloat16)
        estimate = MemoryEstimate.of(step, Gpu())
        for row in rows:
            if row["model"] == name:
                steady = estimate.steps(row["batch"], None)[-1]
                # Measured above what was there before the model, the workspaces of cuBLAS
                allocated = steady.allocated - sum(Gpu().workspaces)
                yield Comparison(
                    name,
                    network.kind,
                    row["batch"],
                    row["allocated"][-1],
                    row["reserved"][-1],
                    allocated / row["allocated"][-1] - 1,
                    steady.reserved / row["reserved"][-1] - 1,
                )


def mean_error(rows: Iterable[Comparison], kind: str) -> float:
    """Return the mean absolute error of the reserved peak of one kind of network."""
    return statistics.mean(abs(row.reserved_error) for row in rows if row.kind == kind)


def main(names: list[str]) -> None:
    print("| network | batch | allocated, MiB | error | reserved, MiB | error |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    for row in compared(names or NETWORKS):
        rows.append(row)
        allocated, reserved = (f"{n / 2**20:,.0f}" for n in (row.allocated, row.reserved))
        print(
            f"| {row.network} | {row.batch_size} | {allocated} | {row.allocated_error:+.2%} "
            f"| {reserved} | {row.reserved_error:+.2%} |",
            flush=True,
        )
    print()
    for kind in sorted({row.kind for row in rows}):
        worst = max((row.reserved_error for row in rows if row.kind == kind), key=abs)
        mean = mean_error(rows, kind)
        print(f"{kind}: reserved {mean:.2%} off in the mean, {worst:+.2%} at worst")


if __name__ == "__main__":
    main(sys.argv[1:])
