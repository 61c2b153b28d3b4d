"""estimate(): what fits on a GPU that is not here."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from functools import cache
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import autobatch
from autobatch._estimate.breakdown import peak
from autobatch._estimate.changes import changed
from autobatch._estimate.device import target_gpu
from autobatch._estimate.inputs import Inputs
from autobatch._memory.cuda import CudaProbe
from autobatch._memory.estimate.events import UntraceableError
from autobatch._memory.estimate.gpus import GPUS
from autobatch._memory.estimate.prediction import MemoryEstimate
from autobatch._memory.estimate.scratch import Gpu
from autobatch.errors import AutobatchError
from autobatch.report import Outcome, Trial
from report_examples import example
from sameness import same
from test_estimate import Attention, convolutional, images, loss, step_of, tokens

MIB, GIB = 2**20, 2**30


@cache
def of_attention(**changes):
    torch.manual_seed(0)
    arguments = {"precision": "bf16-mixed", "device": "H200", "memory_limit": "2GiB"} | changes
    return autobatch.estimate(Attention(), loss, tokens(4), **arguments)


@cache
def of_convolutions(**changes):
    arguments = {"device": "T4", "memory_limit": "256MiB", "optimizer": torch.optim.SGD} | changes
    return autobatch.estimate(convolutional(), loss, images(4), **arguments)


def square(model, batch):
    return model(batch).square().mean()


ESTIMATES = pytest.mark.parametrize("make", [of_attention, of_convolutions])


@ESTIMATES
def test_the_largest_batch_fits_the_budget_and_lies_in_its_band(make):
    estimate = make()

    assert estimate.largest.low < estimate.largest < estimate.largest.high
    assert estimate.at(estimate.largest).reserved <= estimate.budget
    assert estimate.at(estimate.largest + estimate.largest // 100).reserved > estimate.budget
    assert estimate.at(estimate.largest.low).reserved.high <= estimate.budget * 1.01
    assert estimate.at(estimate.largest.high).reserved.low >= estimate.budget * 0.97


@ESTIMATES
def test_what_holds_the_peak_adds_up_to_the_reserved_bytes(make):
    estimate = make()

    for size in (4, 64, 1000):
        peak = estimate.at(size)
        assert sum(peak.held.values()) == pytest.approx(peak.reserved, rel=1e-3)
        assert sum(peak.activations.values()) == peak.held["activations"]
        assert peak.reserved.low < peak.reserved < peak.reserved.high


@pytest.fixture(scope="module")
def traced_once():
    return of_attention()


@settings(max_examples=15)
@given(sizes=st.lists(st.integers(2, 5000), min_size=2, max_size=8, unique=True))
def test_allocated_memory_grows_with_the_batch(traced_once, sizes):
    peaks = [traced_once.at(size).allocated for size in sorted(sizes)]

    assert all(smaller <= larger for smaller, larger in pairwise(peaks))


def test_state_gradients_and_parameters_have_the_size_of_the_model():
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256))
    nbytes = sum(parameter.nbytes for parameter in model.parameters())

    peak = autobatch.estimate(model, square, torch.randn(2, 256), device="H100").at(2)

    # The peak of so small a batch is in the optimizer, whose temporary tensors are as large
    assert peak.phase == "optimizer"
    assert peak.held["parameters and buffers"] == nbytes
    assert peak.held["gradients"] == nbytes
    assert peak.held["optimizer state"] == 2 * nbytes
    assert peak.held["scratch memory"] == 65 * MIB  # workspaces of cuBLAS


def test_activations_are_those_of_their_module():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.wide = nn.Linear(8, 4096)

        def forward(self, x):
            for block in self.blocks:
                x = block(x).square()
            return self.wide(x).square()

    def mean(model, batch):
        return model(batch).mean()

    peak = autobatch.estimate(Wide(), mean, torch.randn(2, 8), device="H100").at(512)

    assert peak.phase == "backward"
    assert peak.activations["wide"] == 4 * 512 * 4096
    assert peak.activations["blocks.*"] == 3 * 4 * 512 * 8


def test_bands_are_narrow_only_for_what_was_compared_with_a_gpu():
    assert of_attention().untested == ()
    assert of_attention().band_share == pytest.approx(0.04)  # below 3 GiB
    assert of_attention(memory_limit="8GiB").band_share == pytest.approx(0.015)
    assert of_convolutions().untested == (
        "precision 32-true",
        "optimizer SGD",
        "GPUs other than an H200",
    )
    assert of_convolutions().band_share > 0.04


def test_a_context_that_is_taken_from_an_h200_is_named_where_the_limit_depends_on_it():
    limits = {"256MiB": (), 0.9: ("a CUDA context as large as on an H200",)}

    for limit, named in limits.items():
        estimate = of_convolutions(memory_limit=limit)
        assert estimate.untested[3:] == named
    assert estimate.band_share == pytest.approx(0.09 + 300 * MIB / target_gpu("T4").reading.total)


def test_attention_is_found_where_it_is_written_out():
    def attend(model, batch):
        rows = model(batch).unflatten(1, (2, 8))
        return (torch.softmax(rows @ rows.mT, -1) @ rows).square().mean()

    arguments = {"precision": "bf16-mixed", "device": "H200", "memory_limit": "8GiB"}
    plain, attending = (
        autobatch.estimate(nn.Linear(16, 16), step, torch.randn(2, 16), **arguments)
        for step in (square, attend)
    )

    assert plain.untested == ("networks without attention or convolutions",)
    assert (attending.untested, attending.band_share) == ((), pytest.approx(0.015))


def test_gpus_that_emulate_bf16_are_named():
    model, batch = torch.nn.Linear(8, 8), torch.randn(2, 8)

    def emulates(device, precision):
        options = {"device": device, "precision": precision}
        return "emulates it slowly" in str(autobatch.estimate(model, square, batch, **options))

    assert emulates("T4", "bf16-mixed")
    assert not emulates("T4", "16-mixed")
    assert not emulates("A10", "bf16-mixed")


def test_every_gpu_has_a_source_and_is_found_by_its_name():
    for name, gpu in GPUS.items():
        assert gpu.source
        assert target_gpu(name) == target_gpu(name.lower().replace(" ", "-"))
        assert (target_gpu(name).name, target_gpu(name).gpu) == (name, gpu.gpu)
        assert bool(target_gpu(name).guesses) == (name != "H200")
    assert target_gpu("24GiB").reading.total == target_gpu(24 * GIB).reading.total == 24 * GIB
    assert target_gpu("24GiB").guesses


def test_the_text_is_a_page_of_at_most_86_columns():
    text = str(of_convolutions())

    assert max(map(len, text.splitlines())) <= 86
    assert "samples fit: estimated" in text
    for part in ("parameters and buffers", "activations of ", "fragments", "Context", "Peak"):
        assert part in text
    assert "Never compared with a GPU" in text
    assert "<pre" in of_convolutions()._repr_html_()


def test_a_small_row_of_the_table_has_a_unit_that_shows_it():
    text = str(of_convolutions())

    assert "     96 MiB  " in text
    assert "    5.5 KiB           0.01 %  parameters and buffers\n" in text


def test_the_figure_shows_kinds_phases_and_budget(tmp_path):
    pytest.importorskip("matplotlib")
    estimate = of_attention()

    figure = estimate.plot(tmp_path / "step.svg", batch_size=64)

    (axes,) = figure.axes
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert {"parameters and buffers", "activations", "gradients", "budget, 2 GiB"} <= labels
    assert [text.get_text().strip() for text in axes.texts] == ["forward", "backward", "optimizer"]
    highest = max(collection.get_datalim(axes.transData).y1 for collection in axes.collections)
    peak = estimate.at(64)
    allocated = peak.allocated - peak.held["rounding"]
    assert highest == pytest.approx(allocated / 2**30, rel=1e-3)
    colors = [collection.get_facecolor()[0][:3] for collection in axes.collections]
    assert min(math.dist(*pair) for pair in combinations(colors, 2)) > 0.25  # of black to white √3
    assert (tmp_path / "step.svg").read_text(encoding="utf-8").startswith("<?xml")
    with pytest.raises(ValueError, match="no suffix of a known format"):
        estimate.plot("step.txt", batch_size=64)


def report_of(peaks, source="NVML", gpu="NVIDIA H200", **changes):
    report = example(**changes)
    trials = tuple(
        Trial(size, Outcome.FIT, peak=round(peak), accumulate=1) for size, peak in peaks.items()
    )
    device = report.device.model_copy(update={"name": f"{gpu} (cuda:0)", "source": source})
    return report.model_copy(update={"trials": trials, "device": device})


def test_measured_peaks_correct_an_estimate_and_narrow_its_band(tmp_path):
    sgd, path = {"optimizer": torch.optim.SGD, "memory_limit": "1GiB"}, tmp_path / "autobatch.json"
    guessed = of_attention(**sgd)
    # All bytes are 3 % more than predicted, but for the smallest size
    measured = {size: 1.03 * guessed.at(size).reserved for size in (4096, 8192, 16384)}
    path.write_text(report_of({8: 2**25} | measured).to_json(), encoding="utf-8")

    estimate = of_attention(**sgd, calibrate=path)

    assert estimate.at(8192).reserved == pytest.approx(measured[8192], rel=0.001)
    assert estimate.band_share == pytest.approx(0.01, abs=0.001)
    assert estimate.band_share < guessed.band_share
    assert (guessed.untested, estimate.untested) == (("optimizer SGD",), ())
    assert guessed.largest.low < estimate.largest < guessed.largest
    with pytest.raises(ValueError, match=r"was measured on NVIDIA H200 .*scratch memory of L4"):
        of_attention(**sgd, calibrate=path, device="L4")


def test_a_report_calibrates_its_own_gpu_and_not_its_context(tmp_path):
    path = tmp_path / "autobatch.json"
    of_a100 = {"device": "A100-40GB", "memory_limit": 0.5}
    peaks = {size: of_attention(**of_a100).at(size).reserved for size in (4096, 8192)}
    path.write_text(report_of(peaks, gpu="NVIDIA A100-SXM4-40GB").to_json(), encoding="utf-8")

    estimate = of_attention(**of_a100, calibrate=path)

    assert estimate.untested == ("a CUDA context as large as on an H200",)
    context = 300 * MIB / target_gpu("A100-40GB").reading.total
    assert estimate.band_share == pytest.approx(0.01 + context, abs=0.001)
    for other in ("A10", "A100-80GB"):
        with pytest.raises(ValueError, match=f"scratch memory of {other} is another"):
            of_attention(device=other, calibrate=path)


def test_reports_of_another_step_calibrate_nothing(tmp_path):
    path = tmp_path / "autobatch.json"
    for report, error in (
        (report_of({8: 2**28}, source="simulated"), "no peak of this step that was measured"),
        (report_of({64: 2**34}), "peaks that are .* off the predicted"),
    ):
        path.write_text(report.to_json(), encoding="utf-8")
        with pytest.raises(ValueError, match=error):
            autobatch.estimate(Attention(), loss, tokens(4), device="H200", calibrate=path)


def test_json_has_units_bands_and_its_kind():
    estimate = of_convolutions()

    stored = json.loads(estimate.to_json())

    assert stored["kind"] == "estimated"
    assert stored["largest"] == {
        "value": estimate.largest,
        "low": estimate.largest.low,
        "high": estimate.largest.high,
    }
    assert stored["at_largest"]["reserved_bytes"]["value"] <= stored["budget_bytes"]


class Switchable(nn.Module):
    """Layers with a switch for checkpointing, as those of timm have it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
        self.grad_checkpointing = False

    def set_grad_checkpointing(self):
        self.grad_checkpointing = True

    def forward(self, x):
        if self.grad_checkpointing:
            return checkpoint(self.layers, x, use_reentrant=False)
        return self.layers(x)


def test_changes_are_estimates_of_changed_steps():
    model = Switchable()

    arguments = {"device": "L4", "memory_limit": "512MiB"}
    estimate = autobatch.estimate(model, square, torch.randn(2, 64), **arguments)
    changes = estimate.changes()
    assert not model.grad_checkpointing
    model.set_grad_checkpointing()
    checkpointed = autobatch.estimate(model, square, torch.randn(2, 64), **arguments)

    found = {change.change: change.largest for change in changes}
    assert list(found) == [
        "precision bf16-mixed",
        "gradient checkpointing",
        "SGD with momentum",
        "8-bit optimizer state",
        "2 micro-batches per update",
        "expandable segments",
    ]
    assert found["gradient checkpointing"] == checkpointed.largest != estimate.largest
    assert found["2 micro-batches per update"] <= estimate.largest <= found["SGD with momentum"]
    assert found["SGD with momentum"] <= found["8-bit optimizer state"]
    # Next to no fragments here; pages of 20 MiB instead of segments of 2 MiB
    assert found["expandable segments"] == pytest.approx(estimate.largest, rel=0.01)
    untested = {each for change in changes for each in change.untested} - {*estimate.untested}
    assert untested == {"optimizer SGD", "optimizer AdamW8bit", "expandable segments"}
    assert "2 micro-batches per update" in estimate.text(changes=changes)


def test_8_bit_state_has_a_byte_per_value_and_a_scale_per_block():
    model = nn.Linear(1000, 1000)

    step = step_of(model, lambda size: torch.randn(size, 1000), loss=lambda m, x: m(x).sum())
    (changed_step,) = (
        inputs.step for words, inputs in changed(Inputs(step, "bf16-mixed")) if "8-bit" in words
    )
    events = list(MemoryEstimate.of(changed_step, Gpu()).events.at(2))

    values = 1000 * 1000
    scales = 4 * math.ceil(values / 256)
    biases = 4 * 1000  # too few values
    assert peak(events, Gpu(), model).held["optimizer state"] == 2 * (values + scales + biases)


def test_a_model_that_cannot_fit_says_so():
    estimate = of_convolutions(memory_limit="1MiB")

    assert estimate.largest == 0
    assert "Not even one sample fits" in str(estimate)


def test_nothing_of_the_user_changes():
    model = convolutional()
    optimizer, batch = torch.optim.AdamW(model.parameters()), images(4)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))

    autobatch.estimate(model, loss, batch, optimizer=optimizer, device="L4").at(8)

    assert same((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()), before)


# Refusals


def refused(match, model=None, step=loss, batch=None, kind=AutobatchError, **changes):
    with pytest.raises(kind, match=match) as error:
        autobatch.estimate(
            convolutional() if model is None else model,
            step,
            images(4) if batch is None else batch,
            **{"device": "H100"} | changes,
        )
    assert "\n" not in str(error.value)


def named(kind, module):
    """Return a model of one layer whose class seems to be that of a library."""
    return nn.Sequential(type(kind, (nn.Linear,), {"__module__": module})(4, 4))


@torch.library.custom_op("autobatch_tests::double", mutates_args=())
def without_fake_kernel(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_models_that_are_not_modelled_are_refused_in_one_sentence():
    compiled = convolutional()
    compiled._orig_mod = nn.Identity()

    hooked = convolutional()
    hooked[0].register_forward_hook(lambda *_: None)

    refused("0 has hooks", hooked)
    refused("the model is a recurrent network", nn.GRU(4, 4))
    refused("memory is a recurrent network", nn.ModuleDict({"memory": nn.LSTM(4, 4, proj_size=2)}))
    refused(
        "0 is a Linear4bit, whose kernels are not modelled", named("Linear4bit", "bitsandbytes")
    )
    refused("several devices", nn.DataParallel(convolutional()))
    refused("0 is a FSDPModule, and models on several", named("FSDPModule", "torch.distributed"))
    refused("the model is compiled", compiled)
    refused("sparse gradients", nn.Embedding(4, 4, sparse=True))
    refused("in eval mode", convolutional().eval())
    refused("needs parameters of torch.bfloat16", precision="bf16-true")


def test_a_hook_of_transformers_for_checkpoints_is_no_matter():
    def hook(*_):
        """Keep nothing."""

    hook.__module__ = "transformers.modeling_utils"
    model = convolutional()
    model[0].register_forward_hook(hook)

    assert autobatch.estimate(model, loss, images(4), device="H100").largest


def reads(model, batch):
    return loss(model, batch) * model(batch[0]).sum().item()


def branches(model, batch):
    outputs = model(batch[0])
    return outputs.sum() if (outputs > 0).all() else outputs.mean()


def selects(model, batch):
    return model(batch[0])[batch[1] > 0].sum()


def loops(model, batch):
    return sum(model(row[None]).sum() for row in batch[0])


def test_steps_that_are_not_modelled_are_refused_in_one_sentence():
    refused("does not run on fake tensors", step=lambda model, batch: model(batch[0][:, :1]).sum())
    for step in (reads, branches, selects):
        refused(r"the step depends on values of tensors \(aten\.\w+\.default\)", step=step)
    refused("other operators at other batch sizes", step=loops)
    refused(
        "no fake impl registered for .*autobatch_tests::double",
        step=lambda model, batch: without_fake_kernel(model(batch[0])).sum(),
    )


def test_steps_that_return_no_loss_or_take_other_arguments_are_refused():
    refused("the step returned NoneType instead of a loss", step=lambda *_: None)
    refused(r"returned a tensor of shape \(2, 4\) instead", step=lambda model, b: model(b[0]))
    refused(r"not callable as step\(model, batch\)", kind=ValueError, step=lambda model: model)


@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 8)])
def test_a_batch_of_another_dtype_than_the_model_is_refused(shape):
    half, batch = nn.Linear(8, 8).bfloat16(), torch.randn(shape)
    of_half = {"model": half, "step": square, "precision": "bf16-true"}

    refused(r"tensors of torch\.bfloat16 and torch\.float32, which", batch=batch, **of_half)

    assert autobatch.estimate(half, square, batch.bfloat16(), precision="bf16-true", device="T4")


def test_the_error_of_a_step_that_does_not_run_stays_its_cause():
    with pytest.raises(AutobatchError, match="does not run on fake tensors") as error:
        autobatch.estimate(convolutional(), lambda _, b: b["x"], images(4), device="H100")

    assert isinstance(error.value.__cause__, TypeError)


def test_devices_that_are_not_modelled_are_refused_in_one_sentence(monkeypatch):
    refused("device='mps' is not a known GPU", kind=ValueError, device="mps")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    refused("PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64 changes the allocator")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(UntraceableError, match="not the native one of CUDA"):
        CudaProbe.gpu(object.__new__(CudaProbe))


def test_bad_arguments_are_refused_by_name():
    refused("device='H300' is not a known GPU", kind=ValueError, device="H300")
    refused("device=3 is a GPU of 3 B, less than CUDA", kind=ValueError, device=3)
    refused("precision='8' is not modelled", kind=ValueError, precision="8")
    refused("batch has tensors of 4, 5 rows", kind=ValueError, batch=[images(4)[0], images(5)[1]])
    refused("accumulate=0 is not a count", kind=ValueError, accumulate=0)
    refused("optimizer=3 is neither", kind=ValueError, optimizer=3)
    if not torch.cuda.is_available():
        refused("torch sees none", kind=ValueError, device=None)
    with pytest.raises(ValueError, match="batch_size=0 is not a count"):
        of_convolutions().at(0)


# A large model

LLAMA = """
import resource, time, torch, autobatch
from torch import nn
from torch.nn import functional as F

class Block(nn.Module):
    def __init__(self, width, heads, wide):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, wide, bias=False) for _ in range(2))
        self.down = nn.Linear(wide, width, bias=False)

    def forward(self, x):
        h = self.norms[0](x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

class Llama(nn.Module):
    def __init__(self, layers=32, width=4096, heads=32, wide=11008, vocabulary=32000):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, wide) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

def step(model, tokens):
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())

began = time.perf_counter()
with torch.device("meta"):
    model = Llama().to(torch.bfloat16)
batch = torch.zeros(2, 512, dtype=torch.long)
estimate = autobatch.estimate(model, step, batch, precision="bf16-true", device="H200")
parameters = sum(p.numel() for p in model.parameters())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(parameters, int(estimate.largest), peak, round(time.perf_counter() - began))
"""


@pytest.mark.slow
def test_a_model_of_seven_billion_parameters_needs_less_than_2_gib():
    run = subprocess.run([sys.executable, "-c", LLAMA], capture_output=True, text=True, check=True)
    parameters, largest, peak, seconds = map(int, run.stdout.split())
    print(f"{largest=} {peak / MIB:.0f} MiB, {seconds} s")

    assert 6.5e9 < parameters < 7.5e9
    assert peak < 2 * GIB
    # 13.5 GiB four times: parameters, gradients and two of AdamW; an H200 has 125 GiB for it all
    assert 10 < largest < 200
