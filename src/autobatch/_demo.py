"""A small convolutional network on handwritten digits, tuned and trained on any machine."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from autobatch._report import TuningReport

_MEMORY: Final = "8MiB"  # small enough for the search to meet it on images of 8 x 8
_TARGET: Final = 256
_EPOCHS: Final = 10
# Each digit is seen shifted by these pixels and with noise, so that the network does not know them all by heart
_SHIFTS: Final = ((0, 0), (0, 1), (1, 0), (0, -1))
_STEPS: Final = 10  # per trial: they take milliseconds, and more of them time steadier


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found, and how well the network then learned: a share of held-out digits, 0 to 1."""

    report: TuningReport
    accuracy: float
    updates: int


def run() -> DemoResult:
    """Tune and train; on the CPU, with a simulated accelerator of a few MiB, so that it runs anywhere.

    torch is left with one thread: a network this small gains nothing from more, and loses where others want the cores.
    """
    import pytorch_lightning as pl
    import torch
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, TensorDataset, random_split

    from autobatch.lightning import AutoBatch, NoiseScale
    from autobatch.testing import SimulatedAccelerator

    _hush()
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train, held_out = random_split(data, [0.8, 0.2])
    varied = TensorDataset(*_varied(*train[:]))

    model = _network()
    tuner = AutoBatch(
        target_batch_size=_TARGET,
        repair_last_window=True,
        steps_per_trial=_STEPS,
        device=SimulatedAccelerator(_MEMORY),
    )
    trainer = pl.Trainer(
        max_epochs=_EPOCHS,
        callbacks=[tuner, NoiseScale(every=2)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(varied, batch_size=8, shuffle=True))

    report = tuner.report
    if report is None:
        raise RuntimeError("fit ended without a report")
    inputs, labels = next(iter(DataLoader(held_out, batch_size=len(held_out))))
    with torch.no_grad():
        accuracy = (model.eval()(inputs).argmax(1) == labels).float().mean().item()
    return DemoResult(report, accuracy, trainer.global_step)


def _varied(images: Any, labels: Any) -> tuple[Any, Any]:
    """Copies of the images, shifted and with noise."""
    import torch

    moved = [torch.roll(images, shift, dims=(2, 3)) for shift in _SHIFTS]
    noisy = [copy + 0.3 * torch.randn_like(copy) for copy in moved]
    return torch.cat(noisy), labels.repeat(len(_SHIFTS))


def _hush() -> None:
    """Leave out Lightning's device lines and its advice on workers, which are not what the demo is about."""
    loggers = [name for name in logging.root.manager.loggerDict if "lightning" in name]
    for name in loggers:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch's own


def _network() -> Any:
    import pytorch_lightning as pl
    import torch
    from torch import nn

    class DigitsNet(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1),
                nn.BatchNorm2d(32),
                nn.ReLU(),
                nn.Conv2d(32, 64, 3, padding=1),
                nn.BatchNorm2d(64),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(1024, 10),
            )

        def forward(self, images: torch.Tensor) -> Any:
            return self.layers(images)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            images, labels = batch
            return nn.functional.cross_entropy(self(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=2e-3)

    return DigitsNet()
