"""Files written by 0.1.0 before the package was moved into folders: report, checkpoint, LightningCLI YAML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch.testing import SimulatedAccelerator
from lightning_here import HERE, pl, quiet_trainer

WRITTEN = Path(__file__).parent / "written_by_0_1_0"


class Model(pl.LightningModule):
    """The module that the checkpoint and the YAML file were written with."""

    def __init__(self, batch_size: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(8, 1)

    def training_step(self, batch, _):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(3)
        data = TensorDataset(torch.randn(640, 8, generator=generator))
        return DataLoader(data, self.hparams.batch_size)


def assert_kept(earlier, now):
    """Compare what both have: later versions add keys."""
    if isinstance(earlier, dict):
        for name, value in earlier.items():
            assert_kept(value, now[name])
    elif isinstance(earlier, list):
        for each, other in zip(earlier, now, strict=True):
            assert_kept(each, other)
    else:
        assert now == earlier


def test_report_file_reads_and_is_written_the_same():
    text = (WRITTEN / "autobatch.json").read_text(encoding="utf-8")

    report = autobatch.TuningReport.read(WRITTEN / "autobatch.json")

    assert report.plan == autobatch.BatchPlan(64, 1)
    assert_kept(json.loads(text), json.loads(report.to_json()))
    assert "Micro-batch 64 × accumulate 1 = 64 per update" in str(report)


def test_report_file_serves_as_plan():
    sizes = []

    def train(batch_size, accumulate):
        net = torch.nn.Linear(8, 1)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        while True:
            sizes.append(batch_size)
            net(torch.randn(batch_size, 8)).square().mean().backward()
            optimizer.step()
            yield batch_size

    report = autobatch.find(
        train, plan=WRITTEN / "autobatch.json", device=SimulatedAccelerator("1GiB")
    )

    assert report.plan == autobatch.BatchPlan(64, 1)
    assert set(sizes) == {64}


@pytest.mark.filterwarnings("ignore:.*weights_only")
def test_checkpoint_resumes_with_its_plan_and_noise_scale():
    tune = autobatch.AutoBatch(target_batch_size=64, device=SimulatedAccelerator("20KiB"))
    noise = autobatch.NoiseScale()
    fitted = quiet_trainer(tune, noise, max_epochs=3)

    fitted.fit(Model(), ckpt_path=WRITTEN / "last.ckpt")

    assert fitted.current_epoch == 3
    assert fitted.global_step == 30  # 20 updates in the checkpoint, 10 now
    assert tune.report.plan == autobatch.BatchPlan(64, 1)
    assert len(tune.report.trials) == 1  # the plan was verified, not searched again
    saved = {}
    noise.on_save_checkpoint(fitted, fitted.lightning_module, saved)
    assert saved["autobatch.NoiseScale"]["updates"] == 30


@pytest.mark.filterwarnings("ignore")  # of jsonargparse and Lightning, about the file
def test_cli_file_builds_the_callbacks(monkeypatch):
    pytest.importorskip("jsonargparse")
    cli = pytest.importorskip(f"{HERE[0]}.cli")

    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(WRITTEN / "config.yaml")])
    built = cli.LightningCLI(Model, run=False, save_config_callback=None)

    tune, noise = built.trainer.callbacks[:2]
    assert isinstance(tune, autobatch.AutoBatch)
    assert isinstance(noise, autobatch.NoiseScale)
