"""Training loops with accelerate, for tests."""

from __future__ import annotations

import itertools

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

SAMPLES = 500  # no multiple of a usual batch: epochs end within an update


def reset():
    """Forget what accelerate keeps for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Loop:
    """A loop as accelerate's documentation writes it, which records losses and learning rates."""

    def __init__(self, precision="no", clips=False, accelerator=None):
        self.accelerator = accelerator or Accelerator(cpu=True, mixed_precision=precision)
        set_seed(3)
        model = torch.nn.Sequential(
            torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 16)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(
            model, optimizer, scheduler
        )
        generator = torch.Generator().manual_seed(1)
        self.data = TensorDataset(
            torch.randn(SAMPLES, 32, generator=generator),
            torch.randint(0, 16, (SAMPLES,), generator=generator),
        )
        self.clips = clips
        self.record = []

    def train(self, batch_size, accumulate):
        accelerator = self.accelerator
        accelerator.gradient_accumulation_steps = accumulate
        loader = accelerator.prepare(DataLoader(self.data, batch_size, shuffle=True))
        for inputs, labels in itertools.chain.from_iterable(itertools.repeat(loader)):
            with accelerator.accumulate(self.model):
                loss = F.cross_entropy(self.model(inputs), labels)
                accelerator.backward(loss)
                if self.clips and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                self.record.append((loss.item(), *self.scheduler.get_last_lr()))
            if accelerator.sync_gradients:
                yield

    def result(self, plan, updates):
        """Train with a plan; return losses, rates and weights."""
        self.record = []
        steps = self.train(plan.micro_batch_size, plan.accumulate_grad_batches)
        for _ in itertools.islice(steps, updates):
            pass
        return self.record, list(self.model.state_dict().values())
