"""The demo: handwritten digits on a simulated accelerator."""

from __future__ import annotations

import logging
import time
import warnings
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl  # noqa: F401 -- found missing before the training, not after it
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from autobatch import sinks
from autobatch.errors import AutobatchError
from autobatch.lightning import AutoBatch, NoiseScale
from autobatch.testing import SimulatedAccelerator

if TYPE_CHECKING:
    from pathlib import Path

_DEMO_MEMORY: Final = "8MiB"  # small enough to be filled by images of 8 × 8 pixels
_DEMO_STEPS: Final = 10  # per trial; they take milliseconds, and more steps give steadier times
_DEMO_TIMING: Final = 10.0  # seconds: enough for all sizes, in a training of half a minute
# Each digit is trained with these shifts in pixels and with noise, or the network memorises it
_DEMO_SHIFTS: Final = ((0, 0), (0, 1), (1, 0), (0, -1))


def demo(directory: Path) -> None:
    """Tune and train a network on a simulated accelerator; print and write the report.

    torch is left with one thread: more do not speed up so small a network.

    Raises:
        AutobatchError: The directory cannot be created.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AutobatchError(
            f"--directory={directory} cannot be created: {error.strerror}."
        ) from None
    began = time.perf_counter()
    _silence_lightning()
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train, held_out = random_split(data, [0.8, 0.2])

    model = DigitsNet()
    tuner = AutoBatch(
        target_batch_size=256,
        repair_last_window=True,
        steps_per_trial=_DEMO_STEPS,
        timing_seconds=_DEMO_TIMING,
        device=SimulatedAccelerator(_DEMO_MEMORY),
    )
    trainer = pl.Trainer(
        max_epochs=10,
        callbacks=[tuner, NoiseScale(every=2)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    augmented = TensorDataset(*_augmented(*train[:]))
    trainer.fit(model, DataLoader(augmented, batch_size=8, shuffle=True))  # prints the report

    if tuner.report is None:
        raise RuntimeError("fit ended without a report")
    report_path = directory / "autobatch.json"
    figure_path = directory / "tradeoff.png"
    sinks.json_file(report_path)(tuner.report)
    sinks.figure_file(figure_path)(tuner.report)
    inputs, labels = held_out[:]
    with torch.no_grad():
        accuracy = (model.eval()(inputs).argmax(1) == labels).float().mean().item()
    print(
        f"\nAfter {trainer.global_step} updates the network recognises {100 * accuracy:.1f} % of "
        f"the held-out digits; {time.perf_counter() - began:.0f} s in all.\n"
        f"Report: {report_path}, figure: {figure_path}"
    )


def _augmented(images: Any, labels: Any) -> tuple[Any, Any]:
    """Return shifted and noisy copies of the images, with their labels."""
    shifted = [torch.roll(images, shift, dims=(2, 3)) for shift in _DEMO_SHIFTS]
    noisy = [copy + 0.3 * torch.randn_like(copy) for copy in shifted]
    return torch.cat(noisy), labels.repeat(len(_DEMO_SHIFTS))


def _silence_lightning() -> None:
    """Hide Lightning's device lines and its advice on workers, which would bury the report."""
    for name in [name for name in logging.root.manager.loggerDict if "lightning" in name]:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # raised inside torch


class DigitsNet(pl.LightningModule):
    """Two convolutions with BatchNorm, and a linear layer."""

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
