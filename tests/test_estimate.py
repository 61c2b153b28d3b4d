"""Memory of a training step, predicted without running it."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autobatch._memory.estimate.events import UntraceableError
from autobatch._memory.estimate.prediction import MemoryEstimate
from autobatch._memory.estimate.scratch import Gpu, sum_scratch
from autobatch._memory.estimate.tracer import TrainingStep, trace
from autobatch._memory.ledger import Ledger
from sameness import same

MIB = 2**20


class Attention(nn.Module):
    """Attention and dropout, and a residual connection, at which gradients meet."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(64, 32)
        self.project = nn.Linear(32, 96)
        self.head = nn.Linear(32, 4)

    def forward(self, tokens):
        hidden = self.tokens(tokens)
        wide = self.project(hidden).unflatten(-1, (3, 4, 8)).transpose(1, 3)
        mixed = F.scaled_dot_product_attention(*wide.unbind(2), is_causal=True)
        hidden = hidden + mixed.transpose(1, 2).flatten(2)
        return self.head(F.dropout(hidden, 0.1).mean(1))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    )


def images(size):
    return torch.randn(size, 3, 8, 8), torch.randint(0, 4, (size,))


def tokens(size):
    return torch.randint(0, 64, (size, 16)), torch.randint(0, 4, (size,))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def step_of(model, batch, **changes):
    optimizer = changes.pop("optimizer", None) or torch.optim.AdamW(model.parameters(), 1e-3)
    return TrainingStep(model, optimizer, changes.pop("loss", loss), batch, **changes)


def measured(step, size):
    """Return the peak of live tensor bytes of two real steps."""
    model, optimizer = copy.deepcopy((step.model, step.optimizer))
    ledger = Ledger()
    ledger.attach(model)
    with ledger.watching(None, 0):
        batch = step.batch(size)
        for _ in range(2):
            for micro_batch in range(step.accumulate):
                total = step.loss(model, batch)
                if step.zeroes_after_forward and not micro_batch:
                    optimizer.zero_grad()
                (total / step.accumulate if step.accumulate > 1 else total).backward()
            optimizer.step()
            if not step.zeroes_after_forward:
                optimizer.zero_grad()
    return ledger.peak


def test_predicted_bytes_follow_the_order_of_calls_of_a_trainer():
    """Gradients live through the first forward pass if they are zeroed after it."""
    model = nn.Sequential(nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 4))
    plain = step_of(model, lambda size: (torch.randn(size, 192), images(size)[1]))
    as_trainer = replace(plain, accumulate=2, zeroes_after_forward=True)

    predicted = [MemoryEstimate.of(step, None).peaks(256).requested for step in (plain, as_trainer)]

    assert predicted == [measured(plain, 256), measured(as_trainer, 256)]


def test_a_model_on_another_device_is_traced_like_one_on_the_cpu():
    model = convolutional()

    elsewhere = trace(step_of(copy.deepcopy(model).to("meta"), images), 2, Gpu())

    assert elsewhere == trace(step_of(model, images), 2, Gpu())


def test_cuda_runs_its_own_attention_and_dropout():
    step = step_of(Attention(), tokens, autocast=torch.bfloat16)

    names = {event.name for event in trace(step, 2, Gpu())}

    assert "aten._scaled_dot_product_flash_attention.default" in names
    assert "aten._scaled_dot_product_flash_attention_backward.default" in names
    assert "aten.native_dropout.default" in names


def test_cuda_autocast_computes_losses_in_float32():
    """CPU autocast leaves `log_softmax` in bfloat16."""
    seen = []

    def soft(model, batch):
        outputs = model(batch[0])
        seen.append((outputs.dtype, torch.log_softmax(outputs, 1).dtype))
        return F.cross_entropy(outputs, batch[1])

    trace(step_of(convolutional(), images, loss=soft, autocast=torch.bfloat16), 2, Gpu())

    assert seen == [(torch.bfloat16, torch.float32)] * 2


def global_state():
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "functions": [F.dropout, torch.dropout, F.scaled_dot_product_attention],
        "hooks": dict(nn.modules.module._global_forward_pre_hooks),
        "autocast": [torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()],
        "kernels": torch._C._dispatch_dump("aten::log_softmax.int"),
    }


def test_a_trace_changes_no_state():
    model = convolutional()
    step = step_of(model, images, autocast=torch.bfloat16)
    measured(step, 2)
    loss(model, images(2)).backward()
    step.optimizer.step()
    called = []
    hook = nn.modules.module.register_module_forward_pre_hook(lambda *_: called.append(1))
    trace(step, 2, Gpu())  # torch notes that kernels were replaced, once
    before = global_state()
    state = copy.deepcopy((model.state_dict(), step.optimizer.state_dict()))
    gradients = [parameter.grad.clone() for parameter in model.parameters()]

    trace(step, 2, Gpu())

    assert same(global_state(), before)
    assert same((model.state_dict(), step.optimizer.state_dict()), state)
    assert same([parameter.grad for parameter in model.parameters()], gradients)
    assert not called
    hook.remove()


def test_trace_out_of_time_ends_before_the_first_layer():
    def rows(size):
        return torch.zeros(size, 3), None

    step = step_of(nn.Linear(3, 2), rows, loss=lambda model, batch: model(batch[0]).sum())

    with pytest.raises(UntraceableError, match="takes too long"):
        trace(step, 2, None, deadline=0.0)


@pytest.mark.parametrize("gpu", [None, Gpu()], ids=["live bytes", "GPU"])
def test_the_largest_size_fits_its_capacity_and_the_next_does_not(gpu):
    estimate = MemoryEstimate.of(step_of(convolutional(), images), gpu)
    capacity = 128 * MIB

    largest = estimate.largest(capacity, 2**20)

    assert estimate.peaks(largest).reserved <= capacity
    assert estimate.peaks(largest + largest // 500).reserved > capacity
    assert estimate.largest(1024, 2**20) == 0


def test_requested_bytes_include_the_workspaces_of_cublas():
    """CUDA counts them, and predictions are dropped where a trial requests other bytes."""
    small = MemoryEstimate.of(step_of(convolutional(), images), Gpu(cublas_workspace=MIB))
    large = replace(small, gpu=Gpu(cublas_workspace=9 * MIB))

    assert large.peaks(7).requested == small.peaks(7).requested + 2 * 8 * MIB


def test_short_sums_need_no_scratch_memory_and_long_ones_do():
    def axes(rows, columns):
        return (4, 1, rows, columns, columns, 1)  # the sum over rows of a float32 matrix

    assert sum_scratch(axes(16, 768), Gpu()) == ()
    staged, semaphores = sum_scratch(axes(65_536, 768), Gpu())
    # 768 outputs in vectors of 4; blocks of 32 × 4 threads make 128 outputs each
    assert semaphores == 4 * 768 // 128
    assert staged % (4 * 768 * 128) == 0


@pytest.mark.slow
def test_predicted_peaks_agree_with_those_of_an_h200(monkeypatch):
    """Means of 0.5 % for transformers and 2 % for convolutional networks."""
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from estimate import compared, mean_error

    rows = list(compared(["timm resnet50", "gpt2 T256"]))

    assert mean_error(rows, "transformer") <= 0.005
    assert mean_error(rows, "convolutional") <= 0.02
