from __future__ import annotations

import functools

import pytest
from torch import nn

import autobatch
from autobatch.testing import PaperDevice, SimulatedAccelerator


def test_a_plain_function_that_runs_one_step_is_accepted():
    steps = []
    report = autobatch.find(steps.append, device=PaperDevice(10), max_micro_batch_size=16)

    assert report.plan.micro_batch_size == 16
    assert set(steps) >= {8, 16}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: f,
        functools.partial,
        lambda f: type("Loop", (), {"__call__": lambda self, batch_size: f(batch_size)})(),
        lambda f: type("Loop", (), {"train": lambda self, batch_size: f(batch_size)})().train,
    ],
    ids=["function", "partial", "callable object", "method"],
)
def test_a_workload_may_be_any_callable(wrap):
    def train(batch_size):
        while True:
            yield

    report = autobatch.find(wrap(train), device=PaperDevice(10), max_micro_batch_size=16)

    assert report.plan.micro_batch_size == 16


def test_a_workload_may_be_defined_before_what_it_uses():
    def outer():
        def train(batch_size):
            while True:
                if batch_size < 0:
                    late()
                yield

        report = autobatch.find(train, device=PaperDevice(10), max_micro_batch_size=16)

        def late():
            pass

        return report

    assert outer().plan.micro_batch_size == 16


def test_a_workload_that_cannot_fill_a_size_bounds_the_search():
    def train(batch_size):
        while True:
            yield min(batch_size, 100)

    report = autobatch.find(train, device=PaperDevice(10))

    assert report.plan.micro_batch_size == 100
    assert any("100" in note or "never ran more" in note for note in report.notes)


def test_trials_accumulate_if_the_plan_will():
    asked = []

    def train(batch_size, accumulate):
        asked.append((batch_size, accumulate))
        while True:
            yield

    autobatch.find(train, device=PaperDevice(10), target_batch_size=32)

    assert dict(asked) == {8: 2, 32: 1}


def test_the_log_holds_a_line_per_trial_and_the_report(caplog):
    device = PaperDevice(1000, fixed=100, per_sample=8)

    with caplog.at_level("DEBUG", logger="autobatch"):
        report = autobatch.find(device.workload, device=device)

    *lines, last = [record.getMessage() for record in caplog.records if record.name == "autobatch"]
    assert len(lines) == len(report.trials)
    assert all(line.startswith("batch_size=") for line in lines)
    assert str(report) in last


def test_a_compiled_model_is_captured_eager_and_timed_compiled():
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters())
    before = [parameter.clone() for parameter in model.parameters()]

    def train(batch_size):
        while True:
            compiled(torch.randn(batch_size, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    report = autobatch.find(train, device=SimulatedAccelerator("1MiB"), max_micro_batch_size=32)

    assert report.plan.micro_batch_size == 32
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_loop_that_cannot_accumulate_gets_no_accumulation_rows():
    report = autobatch.find(
        lambda batch_size: None, device=PaperDevice(10), max_micro_batch_size=16
    )

    assert {row.accumulate_grad_batches for row in report.effective} == {1}
    assert autobatch.TuningReport.from_json(report.to_json()) == report
