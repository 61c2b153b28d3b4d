"""Tests of CUDA: on a real device with `pytest -m gpu`, and on paper to check the tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import autobatch
from autobatch._memory import memory_budget
from autobatch._memory.cuda import CudaProbe
from autobatch.testing import Recorder, ReplayedDevice
from forked import run_forked
from gpu_cases import trained_on, training
from networks import ResNet

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CASES = Path(__file__).parent / "gpu_cases.py"
KINDS = [
    pytest.param("paper", marks=pytest.mark.slow),
    pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA]),
]
SMALL, BAD, NEXT = 8, 64, 16  # sizes of a search whose second trial runs out of memory


def fits(report):
    return [trial for trial in report.trials if trial.fits]


def details_of(report):
    """Return outcome and peak in MiB of each size, for the output of a failed test."""
    return "\n".join(
        f"  {trial.batch_size}: {trial.outcome}, {(trial.peak or 0) / 2**20:.1f}"
        for trial in report.trials
    )


# The probe


def test_another_process_lowers_the_budget_by_its_memory_and_context(place):
    before = place.probe.read()

    with place.neighbour(place.bytes(2)) as context:
        during = place.probe.read()

    slack = place.bytes(1 / 32)
    assert context > 0
    assert abs(during.foreign - before.foreign - place.bytes(2) - context) <= slack
    lost = memory_budget(before, 0.9) - memory_budget(during, 0.9)
    assert lost == during.foreign - before.foreign


def test_memory_taken_by_another_process_is_kept_out_of_the_search(place):
    model = place.network()
    train = training(place, model, torch.optim.AdamW(model.parameters()))
    options = {"device": place.probe, "max_micro_batch_size": SMALL}

    alone = autobatch.find(train, **options).budget
    with place.neighbour(place.bytes(2)) as context:
        beside = autobatch.find(train, **options).budget

    assert alone - beside == pytest.approx(place.bytes(2) + context, abs=place.bytes(1 / 16))


def test_the_cap_holds_while_the_device_has_room(place):
    held = place.probe.read().reserved

    with (
        place.probe.limited(held + place.bytes(0.25)),
        pytest.raises(torch.OutOfMemoryError),
    ):
        reading = place.probe.read()
        assert reading.total - reading.used > place.bytes(0.5)
        place.tensor(place.bytes(0.5))

    assert place.tensor(place.bytes(0.5)).numel() == place.bytes(0.5)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_users_cap_holds_in_a_search_and_is_restored(place, share):
    torch.cuda.set_per_process_memory_fraction(share, 0)
    model = place.network()
    caps = []
    plain = training(place, model, torch.optim.AdamW(model.parameters()))

    def train(batch_size, accumulate):
        for _ in plain(batch_size, accumulate):
            caps.append(torch.cuda.get_per_process_memory_fraction(0))
            yield

    try:
        autobatch.find(train, device=place.probe, max_micro_batch_size=SMALL)
        after = torch.cuda.get_per_process_memory_fraction(0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)

    assert after == pytest.approx(share, rel=1e-6)
    assert max(caps) <= min(share, 0.95) + 1e-6


# Out of memory


@dataclass(frozen=True)
class Sizes:
    """Search that tries these sizes."""

    sizes: tuple[int, ...]

    def propose(self, trials, *, start, high, budget):
        return self.sizes[len(trials)] if len(trials) < len(self.sizes) else None


class Grows(torch.autograd.Function):
    """Identity whose backward pass allocates a number of bytes."""

    @staticmethod
    def forward(ctx, x, nbytes):
        ctx.nbytes = nbytes
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        scratch = torch.empty(ctx.nbytes, dtype=torch.uint8, device=gradient.device)
        return gradient * (1 + 0 * len(scratch)), None


def all_but(place, nbytes):
    """Return tensors that fill the device except for a number of bytes."""
    room = place.tensor(nbytes)
    size, taken = place.bytes(1), []
    while size >= nbytes // 8:
        try:
            taken.append(place.tensor(size))
        except torch.OutOfMemoryError:
            size //= 2
    del room
    return taken


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_everything_is_restored_after_a_real_out_of_memory(place, where):
    model = place.network()
    optimizer = torch.optim.AdamW(model.parameters())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    at_start, state = [], []

    def train(batch_size):
        at_start.append(place.held())
        while True:
            rows = batch_size
            if batch_size == BAD and where == "forward":
                # The samples fit, but not the output of the first layer
                rows = place.bytes(1) // (2 * place.width)
            loss = model(place.samples(rows)).square().mean()
            if batch_size == BAD and where == "backward":
                loss = Grows.apply(loss, place.bytes(2))
            loss.backward()
            ballast = None
            if batch_size == BAD and where == "optimizer":
                # Room for half of the first optimizer state only
                ballast = all_but(place, largest * 3 // 2)
            try:
                optimizer.step()
            except torch.OutOfMemoryError:
                state.append(len(optimizer.state))
                raise
            del ballast
            optimizer.zero_grad()
            yield

    place.probe.release()
    report = autobatch.find(
        train,
        device=place.probe,
        memory_limit=place.probe.read().reserved + place.bytes(1),
        search=Sizes((SMALL, BAD, NEXT)),
    )

    outcomes = [str(trial.outcome) for trial in report.trials]
    assert outcomes == ["fit", "out_of_memory", "fit"]
    before, after = at_start[-2:]
    assert abs(after - before) <= place.bytes(1 / 1024)
    assert bool(state) == (where == "optimizer")
    assert not optimizer.state
    assert all(torch.equal(weights[n], value) for n, value in model.state_dict().items())


def test_a_search_that_reaches_the_limit_leaves_the_device_empty(place):
    model = place.network()
    train = training(place, model, torch.optim.AdamW(model.parameters()))
    next(train(SMALL, 1))  # allocations that libraries keep
    model.zero_grad()
    held = place.held()

    report = autobatch.find(
        train,
        device=place.probe,
        memory_limit=place.probe.read().reserved + place.bytes(0.5),
        search=autobatch.Bisection(),
        steps_per_trial=2,
    )

    assert any(not trial.fits for trial in report.trials)
    assert place.held() - held <= place.bytes(1 / 512)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_that_ends_the_context_reaches_the_user(kind):
    ran = alone("assertion", kind)

    assert ran.returncode != 0
    assert "autobatch was trying batch_size=8" in ran.stderr
    if kind == "cuda":
        assert "device-side assert" in ran.stderr
        assert "autobatch could not restore everything" in ran.stderr
    else:
        assert "IndexError" in ran.stderr


# Search


def largest_by_scan(place, train, budget):
    """Return the largest fit by bisection, which reads no memory."""
    search = autobatch.Bisection(resolution=0.01 if place.is_real else 0.02)
    report = autobatch.find(train, device=place.probe, memory_limit=budget, search=search)
    print(f"scan of {budget / 2**20:.1f} MiB\n{details_of(report)}")
    return max(trial.batch_size for trial in fits(report))


@pytest.mark.parametrize("gib", [2, 8, 24])
def test_the_size_found_is_within_3_percent_of_a_scan(place, gib):
    if place.is_real:
        free = torch.cuda.mem_get_info(0)[0]
        if free < place.bytes(gib):
            pytest.skip(f"less than {gib} GiB are free on this device")
    budget = place.bytes(gib)
    model = place.network()
    train = training(place, model, torch.optim.AdamW(model.parameters()))

    report = autobatch.find(train, device=place.probe, memory_limit=budget)

    assert report.budget <= budget
    assert all(trial.peak <= report.budget for trial in fits(report))
    print(details_of(report))
    # The same model at the same addresses: the use of a cache depends on its fragmentation
    truth = largest_by_scan(place, train, budget)
    print(f"{gib} GiB: found {report.plan.micro_batch_size}, scan {truth}")
    assert report.plan.micro_batch_size >= 0.97 * truth


def test_a_recorded_search_is_replayed_without_the_device(place, tmp_path):
    model = place.network()
    train = training(place, model, torch.optim.AdamW(model.parameters()))
    recorder = Recorder(place.probe, allocator=lambda: {"kept": place.held()})
    limit = place.probe.read().reserved + place.bytes(1)
    watched = recorder.watching(train)
    found = autobatch.find(watched, device=recorder, memory_limit=limit)
    path = tmp_path / "search.json"
    recorder.recording("perceptron", memory_limit=limit).write(path)

    device = ReplayedDevice(path)
    again = autobatch.find(device.workload, device=device, memory_limit=limit)

    assert again.budget == pytest.approx(found.budget, rel=0.01)
    assert again.plan.micro_batch_size == pytest.approx(found.plan.micro_batch_size, rel=0.02)
    assert [run.batch_size for run in device.recording.runs] == [
        trial.batch_size for trial in found.trials
    ]


def in_float32(place, model, optimizer):
    return training(place, model, optimizer), []


def in_bf16(place, model, optimizer):
    def train(batch_size, accumulate):
        while True:
            for _ in range(accumulate):
                with torch.autocast(place.device.partition(":")[0], torch.bfloat16):
                    loss = model(place.samples(batch_size)).square().mean()
                (loss / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    return train, []


def in_fp16(place, model, optimizer):
    scaler = torch.amp.GradScaler("cuda")

    def train(batch_size, accumulate):
        while True:
            for _ in range(accumulate):
                with torch.autocast("cuda", torch.float16):
                    loss = model(place.samples(batch_size)).square().mean()
                scaler.scale(loss / accumulate).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            yield

    return train, [scaler]


def compiled(place, model, optimizer):
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        pytest.skip("torch.compile needs a C compiler")
    return training(place, torch.compile(model), optimizer), [model]


def convolutions(place, model, optimizer):
    """Train with cuDNN's benchmark, which tries algorithms with different workspaces."""
    # Two blocks only: the benchmark repeats for every convolution and size
    network = ResNet().stem[:2].to(place.device)
    stepped = torch.optim.AdamW(network.parameters())

    def train(batch_size, accumulate):
        while True:
            for _ in range(accumulate):
                images = torch.randn(batch_size, 3, 32, 32, device=place.device)
                (network(images).square().mean() / accumulate).backward()
            stepped.step()
            stepped.zero_grad()
            yield

    return train, []


@pytest.mark.parametrize(
    ("how", "accumulate"),
    [
        (in_float32, 1),
        (in_float32, 4),
        (in_bf16, 4),
        (in_fp16, 1),
        (in_fp16, 4),
        (compiled, 1),
        (convolutions, 1),
    ],
)
def test_training_with_the_plan_never_runs_out_of_memory(place, monkeypatch, how, accumulate):
    if not place.is_real and how in (in_fp16, compiled, convolutions):
        pytest.skip("not the same on the CPU")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", how is convolutions)
    model = place.network()
    optimizer = torch.optim.AdamW(model.parameters())
    train, restore = how(place, model, optimizer)
    place.probe.release()
    limit = place.probe.read().reserved + place.bytes(1)
    options = {"device": place.probe, "memory_limit": limit, "restore": restore}
    report = autobatch.find(train, **options)
    if accumulate > 1:
        target = accumulate * report.plan.micro_batch_size
        report = autobatch.find(train, **options, target_batch_size=target)

    ooms = trained_on(place, train, report)

    print(f"{how.__name__}: {report.plan}\n{details_of(report)}")
    if how is compiled:
        torch.compiler.reset()
    assert report.plan.accumulate_grad_batches >= accumulate
    assert ooms == 0


def test_a_fragmented_cache_is_counted_and_trains(place):
    mib = place.bytes(1 / 1024)
    # Several of these allocations share a segment, which stays while one of them lives
    blocks = [place.tensor((3 + k % 7) * mib) for k in range(256)]
    del blocks[::2]
    place.probe.release()
    reading, held = place.probe.read(), place.held()
    model = place.network()
    train = training(place, model, torch.optim.AdamW(model.parameters()))

    report = autobatch.find(
        train, device=place.probe, memory_limit=reading.reserved + place.bytes(1)
    )

    print(f"{reading.reserved - held} bytes between {held}")
    assert reading.reserved >= sum(block.numel() for block in blocks)
    # Memory between them stays reserved: far more than one segment
    assert reading.reserved - held >= 20 * mib
    assert trained_on(place, train, report) == 0


# No trace


def test_weights_state_and_random_numbers_are_restored(place):
    model = place.network()
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    host = torch.get_rng_state()
    device = torch.cuda.get_rng_state() if place.is_real else None

    autobatch.find(
        training(place, model, optimizer),
        device=place.probe,
        memory_limit=place.probe.read().reserved + place.bytes(1),
    )

    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
    assert not optimizer.state
    assert torch.equal(host, torch.get_rng_state())
    if place.is_real:
        assert torch.equal(device, torch.cuda.get_rng_state())


# Settings read once per process


def alone(case, kind, **environment):
    if kind == "paper":  # nothing there is read when torch is imported
        return run_forked(CASES, case, kind, env=environment)
    return subprocess.run(
        [sys.executable, CASES, case, kind],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def result_of(ran):
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.strip().splitlines()[-1])


ALLOCATORS = {
    "native": "expandable_segments:False",
    "expandable": "expandable_segments:True",
    "split": "max_split_size_mb:128",
    "async": "backend:cudaMallocAsync",
}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("paper", "", id="paper", marks=pytest.mark.slow),
        *(
            pytest.param("cuda", settings, id=name, marks=[pytest.mark.gpu, NEEDS_CUDA])
            for name, settings in ALLOCATORS.items()
        ),
    ],
)
def test_every_allocator_of_torch_works(kind, settings):
    # The first name is the newer one; each version of torch reads one of them
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = dict.fromkeys(names, settings) if settings else {}

    found = result_of(alone("allocator", kind, **environment))

    print(found)
    fitting = [size for size, outcome, _ in found["trials"] if outcome == "fit"]
    assert found["found"] == max(fitting)
    assert all(peak <= found["budget"] for _, outcome, peak in found["trials"] if outcome == "fit")
    assert found["ooms"] == 0
    assert found["share"] == 1.0
    if kind == "cuda":
        expected = "cudaMallocAsync" if "Async" in settings else "native"
        assert found["backend"] == expected
    is_requested = "segments:True" in settings
    if is_requested and not found["expandable"]:
        pytest.skip("torch has no expandable segments on this platform")
    assert found["expandable"] == is_requested


@pytest.mark.parametrize("kind", KINDS)
def test_training_after_tuning_is_bit_identical(kind):
    needs_lightning()

    # Without this cuBLAS is not deterministic, and torch refuses it
    found = result_of(alone("identity", kind, CUBLAS_WORKSPACE_CONFIG=":4096:8"))

    assert found["differs"] == []
    assert found["effective"] == found["target"] == 120
    assert found["updates"] == 8


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_of_ddp_is_tuned_and_trains(kind):
    needs_lightning()

    # One process needs no network, and the machine may have none
    found = result_of(alone("ddp", kind, GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo"))

    assert found["backend"] == ("nccl" if kind == "cuda" else "gloo")
    assert found["wrapped"] == "DistributedDataParallel"
    assert (found["effective"], found["ranks"]) == (120, 1)
    assert found["steps"] > 0


def needs_lightning():
    import importlib.util

    if not any(map(importlib.util.find_spec, ("lightning", "pytorch_lightning"))):
        pytest.skip("needs Lightning")


# Several devices and MIG instances; on paper they are tested in test_cuda_probe.py


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_each_of_several_devices_is_read():
    probes = [CudaProbe(0), CudaProbe(1)]
    before = [probe.read() for probe in probes]
    tensor = torch.empty(2**30, dtype=torch.uint8, device="cuda:1")

    after = [probe.read() for probe in probes]

    assert after[1].reserved - before[1].reserved >= tensor.numel()
    assert after[0].reserved == before[0].reserved
    assert after[1].used - before[1].used >= tensor.numel()
    assert abs(after[0].used - before[0].used) < tensor.numel() // 2


@pytest.mark.gpu
@pytest.mark.skipif(
    not os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-"),
    reason="needs CUDA_VISIBLE_DEVICES to name a MIG instance",
)
def test_a_real_mig_instance_is_read():
    probe = CudaProbe(0)

    assert probe.source == "NVML"
    total = torch.cuda.get_device_properties(0).total_memory
    assert probe.read().total == pytest.approx(total, rel=0.05)
