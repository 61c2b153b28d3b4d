from __future__ import annotations

import gc
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from autobatch._memory.ledger import unobserved
from autobatch.testing import SimulatedAccelerator
from networks import Perceptron

KIB, GIB = 2**10, 2**30  # bytes; 256 floats are 1 KiB


def test_a_tensor_counts_from_its_allocation_to_its_death():
    device = SimulatedAccelerator(GIB)

    with device.limited(GIB):
        a = torch.empty(256)
        b = torch.empty(512)
        held = device.read().reserved
        del a

    assert held == 3 * KIB
    assert device.read().reserved == 2 * KIB
    assert device.read().peak == 3 * KIB
    del b
    assert device.read().reserved == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.view(16, 16),
        lambda x: x.add_(1),
        lambda x: x.expand(4, 256),
        lambda x: x.detach(),
        lambda x: x[3:7],
        lambda x: torch.from_numpy(x.numpy()),
    ],
    ids=["view", "in place", "expand", "detach", "slice", "numpy"],
)
def test_tensors_that_share_a_storage_count_once(make):
    device = SimulatedAccelerator(GIB)

    with device.limited(GIB):
        x = torch.zeros(256)
        y = make(x)

    assert device.read().reserved == KIB
    del y


def test_views_of_unattached_data_are_not_charged():
    data, device = torch.zeros(1024), SimulatedAccelerator(GIB)

    with device.limited(GIB):
        batch = data[:256]

    assert device.read().reserved == 0
    del batch


def test_attached_objects_include_gradients_and_state():
    model = nn.Linear(16, 16, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    device = SimulatedAccelerator(GIB)

    device.attach(model, optimizer)
    device.attach(model)  # a second time adds nothing

    assert device.read().reserved == 3 * KIB


def test_an_allocation_beyond_the_limit_is_refused_beforehand():
    device = SimulatedAccelerator(GIB)

    with device.limited(2 * KIB):
        x = torch.zeros(256)
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            torch.zeros(10**12)

    assert device.read().failures == 1
    assert device.read().reserved == KIB
    del x


def test_memory_may_reach_the_limit_exactly():
    device = SimulatedAccelerator(GIB)

    with device.limited(2 * KIB):
        x = torch.zeros(512)

    assert device.read().peak == 2 * KIB
    del x


def test_any_one_allocation_can_be_refused():
    device = SimulatedAccelerator(GIB)
    device.ledger.refuse_at = 2
    kept = []

    with device.limited(GIB), pytest.raises(torch.OutOfMemoryError):
        kept.extend(torch.zeros(1) for _ in range(3))

    assert device.read().failures == 1
    assert device.ledger.allocations == 2


def test_a_step_leaves_nothing_but_parameters_gradients_and_state():
    model = Perceptron()
    device = SimulatedAccelerator(GIB)
    device.attach(model)
    at_rest = device.read().reserved

    with device.limited(GIB):
        model.loss(32).backward()
        model.zero_grad()

    assert device.read().reserved == at_rest


def test_gradients_that_meet_are_added_in_place():
    """Without a ledger autograd writes their sum into one of them."""
    x = torch.zeros(256, requires_grad=True)
    device = SimulatedAccelerator(GIB)

    with device.limited(GIB):
        hidden = x * 1  # 1 KiB, and each of its two gradients
        total = (hidden * 2).sum() + (hidden * 3).sum()  # 4 bytes, and its gradient
        total.backward()

    assert device.read().peak == 3 * KIB + 2 * 4
    assert device.read().reserved == 2 * KIB + 4
    assert x.grad[0] == 5


def test_a_sum_whose_terms_live_on_is_charged():
    x = torch.zeros(256, requires_grad=True)
    device, kept = SimulatedAccelerator(GIB), []

    with device.limited(GIB):
        hidden = x * 1
        pair = [hidden.view(-1), hidden.view(-1)]
        for each in pair:
            each.register_hook(kept.append)
        (pair[0] * 2 + pair[1] * 3).sum().backward()

    assert x.grad[0] == 5
    assert device.read().reserved == 4 * KIB  # hidden, its gradient and both kept ones
    assert device.read().peak > 5 * KIB  # and their sum


def test_sums_of_the_user_are_charged():
    device = SimulatedAccelerator(GIB)

    with device.limited(GIB):
        x = torch.zeros(256)
        x = x + x

    assert device.read().peak == 2 * KIB
    assert device.read().reserved == KIB


def test_a_linear_layer_adds_its_bias_in_place():
    layer = nn.Linear(16, 16)
    x = torch.zeros(4, 4, 16).transpose(0, 1)  # not contiguous: a product, then a sum
    device = SimulatedAccelerator(GIB)

    with torch.no_grad(), device.limited(GIB):
        y = layer(x)

    assert device.read().reserved == y.nbytes
    assert device.read().peak == y.nbytes + x.nbytes  # a contiguous copy of the input


def test_training_is_bit_identical_under_the_ledger():
    def train(watched):
        torch.manual_seed(0)
        model = Perceptron()
        optimizer = torch.optim.AdamW(model.parameters())
        device = SimulatedAccelerator(GIB)
        with device.limited(GIB) if watched else nullcontext():
            for _ in range(3):
                model.loss(8).backward()
                optimizer.step()
                optimizer.zero_grad()
        return [*model.state_dict().values(), torch.get_rng_state()]

    watched, plain = train(watched=True), train(watched=False)

    assert all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))


def test_the_profile_covers_the_last_step():
    device = SimulatedAccelerator(GIB)

    with device.limited(GIB) as watch:
        for length in (256, 512):
            watch.mark()
            torch.zeros(length)
            torch.zeros(2 * length)
        watch.mark()

    assert watch.profile == (2 * KIB, 4 * KIB)


def test_a_tensor_of_another_thread_is_credited_at_its_death():
    device, made = SimulatedAccelerator(GIB), []

    def work():
        with device.limited(GIB):
            made.append(torch.zeros(256))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert device.read().reserved == KIB
    made.clear()
    gc.collect()
    assert device.read().reserved == 0


def test_sparse_tensors_count_their_indices_and_values():
    device = SimulatedAccelerator(GIB)

    with device.limited(GIB):
        x = torch.sparse_coo_tensor(
            torch.zeros(1, 4, dtype=torch.int64),
            torch.zeros(4),
            (8,),
            check_invariants=True,
        )

    assert device.read().reserved >= 4 * 8 + 4 * 4
    del x
    assert device.read().reserved == 0


def test_nothing_is_charged_while_unobserved():
    device = SimulatedAccelerator(GIB)

    with device.limited(GIB), unobserved():
        x = torch.zeros(256)

    assert device.read().reserved == 0
    del x


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand_like(torch.tensor(1.0)),
        lambda: torch.normal(torch.tensor(0.0), torch.tensor(1.0)),
        lambda: torch.bernoulli(torch.tensor(0.5)),
    ],
)
def test_random_numbers_are_drawn_once(draw):
    torch.manual_seed(0)
    draw()
    plain = torch.get_rng_state()
    torch.manual_seed(0)

    with SimulatedAccelerator(GIB).limited(GIB):
        draw()

    assert torch.equal(plain, torch.get_rng_state())


def test_the_type_of_a_number_decides_the_size_of_a_result():
    x, device = torch.ones(256, dtype=torch.int8), SimulatedAccelerator(GIB)

    with device.limited(300):
        with pytest.raises(torch.OutOfMemoryError):
            x * 2.0  # float32: 1,024 bytes
        y = x * 2  # int8: 256 bytes

    assert device.read().reserved == 256
    del y


def test_a_lazy_parameter_counts_nothing():
    device = SimulatedAccelerator(GIB)

    device.attach(nn.LazyLinear(4, bias=False))

    assert device.read().reserved == 0


class Attention(nn.Module):
    """Self-attention by a layer of torch, on inputs that a linear layer made under autocast."""

    def __init__(self, kind, *, masked):
        super().__init__()
        self.before, self.masked = nn.Linear(16, 16), masked
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        if kind == "layer":
            self.body = layer
        elif kind in {"encoder", "nested encoder"}:
            nested = kind == "nested encoder"  # without the padding that the mask hides
            self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        elif kind == "attention":
            self.body = nn.MultiheadAttention(16, 2, batch_first=True)
        else:
            self.body = nn.functional.scaled_dot_product_attention

    def forward(self, x):
        x = self.before(x) if self.masked else x
        hidden = torch.zeros(len(x), x.shape[1], dtype=torch.bool)
        hidden[1:, -1:] = True
        if isinstance(self.body, nn.MultiheadAttention):
            mask = hidden if self.masked else None
            return self.body(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        if isinstance(self.body, nn.Module):
            return self.body(x, src_key_padding_mask=hidden if self.masked else None)
        return self.body(x, x, x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["layer", "encoder", "nested encoder", "attention", "function"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_attention_takes_the_same_kernels_under_the_ledger(kind, masked, autocast, grad):
    torch.manual_seed(0)
    model, x = Attention(kind, masked=masked).eval(), torch.randn(3, 5, 16)

    def run():
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return outcome(model, x)

    plain = run()
    with SimulatedAccelerator(GIB).limited(GIB):
        watched = run()

    assert type(watched) is type(plain)
    assert torch.equal(watched, plain) if isinstance(plain, torch.Tensor) else watched == plain


def outcome(model, x):
    """Return the output of a model, or the message of its error."""
    try:
        return model(x)
    except RuntimeError as error:
        return str(error)
