"""Micro-batches that cannot be run in pieces: the error of the user, with a note."""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import autobatch
from autobatch._memory.ledger import Ledger
from autobatch.lightning._checks import check_survival
from autobatch.lightning._survival.halves import telling_samples
from lightning_here import QUICK, Model, data, pl, quiet_trainer
from surviving import SPLIT, Trained, quick_collections, torchmetrics, trained


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_collections():
        yield


class Failing(Trained):
    """Runs out of memory at each batch of more than `most` samples, once it has seen the batch."""

    most = 3

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if len(batch[1]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss


def notes_of(module, loader=None, **options):
    """Return the notes of the error that ends training."""
    with pytest.raises(torch.OutOfMemoryError) as caught:
        if loader is None:
            trained(module, count=3, **options)
        else:
            fit(module, loader)
    return " ".join(caught.value.__notes__)


def fit(module, loader, accumulate_grad_batches=1, **options):
    callback = autobatch.AutoBatch(**{**SPLIT, **options})
    trainer = quiet_trainer(callback, max_epochs=1, accumulate_grad_batches=accumulate_grad_batches)
    trainer.fit(module, loader)
    return callback


class Contrastive(Failing):
    def loss(self, x, y):
        self.logits = self.net(x)
        return F.cross_entropy(self.logits @ self.logits.T, torch.arange(len(x)))


class WritesIntoBatch(Failing):
    def loss(self, x, y):
        x.mul_(2)
        return super().loss(x, y)


class WritesIntoBuffer(Failing):
    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(5000))

    def loss(self, x, y):
        self.queue += 1
        return super().loss(x, y)


class WritesIntoMetric(Failing):
    """Updates a metric in place for the first time in the third micro-batch."""

    most = 99

    def __init__(self):
        super().__init__()
        self.mean = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx < 2:
            self.mean(loss.detach())
            return loss
        self.mean.update(loss.detach())
        raise torch.OutOfMemoryError("CUDA out of memory.")


class MovesTeacher(Failing):
    """Moves a frozen copy in each step, as networks with a momentum encoder do."""

    def __init__(self):
        super().__init__()
        self.teacher = torch.nn.Linear(3, 3).requires_grad_(False)

    def loss(self, x, y):
        with torch.no_grad():
            self.teacher.weight.add_(1)
        return super().loss(x, y)


class MovesTeacherAfterwards(MovesTeacher):
    """Moves it where a failed attempt has not got to."""

    def loss(self, x, y):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().loss(x, y)


class ReplacesStatistics(Failing):
    def loss(self, x, y):
        self.net[1].running_mean = self.net[1].running_mean.clone()
        return super().loss(x, y)


class OneSample(Failing):
    most = 0

    def __init__(self):
        super().__init__("deterministic")


class OneSampleWithNorm(Failing):
    most = 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Contrastive, "its loss mixes samples or does not weigh them equally"),
        (WritesIntoBatch, "training_step writes into its batch"),
        (WritesIntoBuffer, r"training_step writes into a \(5000,\) buffer"),
        (WritesIntoMetric, r"training_step writes into a \(\) buffer"),
        (MovesTeacher, r"training_step writes into a \(3, 3\) parameter"),
        (MovesTeacherAfterwards, r"training_step writes into a \(3, 3\) parameter"),
        (ReplacesStatistics, "buffers of a BatchNorm were replaced since training began"),
        (OneSample, "a single sample does not fit"),
        (OneSampleWithNorm, "3 samples do not fit, and BatchNorm needs 2"),
    ],
)
def test_error_passes_with_the_reason(kind, reason):
    notes = notes_of(kind())

    assert re.search(f"did not run the batch again in pieces: {reason}", notes)


class TwoPasses(Failing):
    """Runs out of memory between two backward passes of the third micro-batch."""

    most = 99

    def backward(self, loss):
        (0.5 * loss).backward(retain_graph=True)
        if len(self.sizes) == 3 and self.sizes[-1] == 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        (0.5 * loss).backward()


class _RunsOut(torch.autograd.Function):
    """Runs out of memory in the backward pass of the third micro-batch."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if len(ctx.module.sizes) == 3 and ctx.module.sizes[-1] == 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return gradient, None


class SharedByCheckpoints(Failing):
    """Has a layer in two reentrant checkpoints; memory runs out between them."""

    most = 99

    def __init__(self):
        super().__init__("deterministic")
        self.shared = torch.nn.Linear(16, 16)

    def loss(self, x, y):
        x = _RunsOut.apply(checkpoint(self.shared, x.requires_grad_(), use_reentrant=True), self)
        return super().loss(checkpoint(self.shared, x, use_reentrant=True), y)


@pytest.mark.parametrize("kind", [TwoPasses, SharedByCheckpoints])
def test_gradient_that_may_be_accumulated_in_part_passes_the_error(kind):
    loader = DataLoader(data(24), 6)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(kind(), loader, accumulate_grad_batches=4)

    assert "may add to an accumulated gradient in parts" in caught.value.__notes__[-1]


def test_accumulated_gradient_that_a_hook_has_scaled_passes_the_error():
    class Scales(Failing):
        most = 99

        def on_after_backward(self):
            for each in self.parameters():
                each.grad.mul_(0.5)
            if len(self.sizes) == 3 and self.sizes[-1] == 6:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(Scales(), DataLoader(data(24), 6), accumulate_grad_batches=4)

    note = caught.value.__notes__[-1]
    assert "gradients of earlier micro-batches were changed more than once" in note


@pytest.mark.parametrize("kind", [TwoPasses, SharedByCheckpoints])
def test_gradient_of_one_micro_batch_is_removed_again(kind):
    callback = fit(module := kind(), DataLoader(data(24), 6))

    assert module.sizes == [6, 6, 3, 3, 3, 3]
    assert len(callback.survived) == 1


@pytest.mark.parametrize("ignored", [-100, 255])
@pytest.mark.parametrize("at", [[20], [20, 21], [*range(8, 31)]])
def test_loss_that_ignores_a_few_labels_is_not_taken_for_a_mean(ignored, at):
    """The samples that are compared differ most in their labels."""

    class Ignoring(Failing):
        def training_step(self, batch, batch_idx):
            x, y, _ = batch
            if len(y) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return F.cross_entropy(self.net(x), y, ignore_index=ignored)

    y = torch.arange(32) % 4
    y[at] = ignored
    batch = (torch.randn(32, 16), y, [f"sample {row}" for row in range(32)])
    module = Ignoring()
    module.most = 8

    notes = notes_of(module, DataLoader([batch], batch_size=None))

    assert "its loss mixes samples or does not weigh them equally: halves of a batch of 8" in notes


class Masked(Failing):
    """Has a loss over valid positions, by a mask of 0 and 1, or of infinity and 0."""

    most = 8

    def training_step(self, batch, batch_idx):
        x, mask = batch
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        valid = mask.exp() if mask.min() < 0 else mask
        return (self.net(x).square().mean(1, keepdim=True) * valid).sum() / valid.sum()


@pytest.mark.parametrize("make", [torch.Tensor.clone, torch.log], ids=["factor", "summand"])
def test_loss_over_a_mask_of_floats_is_not_taken_for_a_mean(make):
    mask = torch.ones(32, 6)
    mask[24:, 2:] = 0
    batch = (torch.randn(32, 16), make(mask))

    notes = notes_of(Masked("deterministic"), DataLoader([batch], batch_size=None))

    assert "its loss mixes samples or does not weigh them equally: halves of a batch of 8" in notes


def test_samples_are_compared_without_a_copy_of_all_rows():
    labels = torch.zeros(64, 2**15, dtype=torch.uint8)
    labels[40] = 1
    ledger = Ledger()

    with ledger.watching(None, 0):
        (samples,) = telling_samples([labels], 2)

    assert sorted(samples[:, 0].tolist()) == [0, 1]
    assert ledger.peak < labels.nbytes / 2


def test_fewer_samples_are_compared_where_eight_do_not_fit():
    notes = notes_of(Contrastive(), DataLoader(data(32), 16))

    assert "its loss mixes samples or does not weigh them equally: halves of a batch of 2" in notes


class Opaque:
    def __init__(self, x):
        self.x = x


class TakesAny(Model):
    """Runs out of memory at each batch."""

    def training_step(self, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def opaque(samples):
    return [Opaque(x) for x, _ in samples]


def sparse(samples):
    return torch.stack([x for x, _ in samples]).to_sparse()


def compressed(samples):
    return torch.stack([x for x, _ in samples]).to_sparse_csr()


def nested(samples):
    return torch.nested.nested_tensor(
        [x[: 3 + row] for row, (x, _) in enumerate(samples)], layout=torch.jagged
    )


def time_first(samples):
    return torch.stack([x for x, _ in samples], 1)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize(
    ("collate", "size", "reason"),
    [
        (opaque, 4, "its batches are not of tensors in plain containers"),
        (sparse, 4, "its batches have sparse or nested tensors"),
        (compressed, 4, "its batches have sparse or nested tensors"),
        (nested, 4, "its batches have sparse or nested tensors"),
        (time_first, 4, "its tensors have 16 rows, and a batch has 4 samples"),
        (None, 1, "its batches are of one sample"),
    ],
)
def test_batch_that_cannot_be_divided_passes_the_error(collate, size, reason):
    notes = notes_of(TakesAny(), DataLoader(data(8), batch_size=size, collate_fn=collate))

    assert f"did not run the batch again in pieces: {reason}." in notes


class SumOfLosses(Failing):
    def loss(self, x, y):
        self.logits = self.net(x)
        return F.cross_entropy(self.logits, y, reduction="sum")


def test_loss_that_is_a_sum_is_not_weighted():
    make = lambda kind: kind("deterministic", torch.optim.SGD).double()  # noqa: E731
    whole = type("Whole", (SumOfLosses,), {"most": 99})
    options = {"precision": "64-true", "dtype": torch.float64, "count": 3}
    never = trained(make(whole), **options)

    run = trained(make(SumOfLosses), **options)

    assert [(each.pieces, each.step) for each in run.survived] == [(2, 0)]
    for name, value in run.module.state_dict().items():
        assert torch.allclose(value, never.module.state_dict()[name], rtol=0, atol=1e-12)
    assert run.refusing.rows[0]["output"] == pytest.approx(never.refusing.rows[0]["output"])


class FixedSize(Failing):
    def loss(self, x, y):
        return super().loss(x.view(6, 16), y)


def test_error_of_a_piece_passes_with_a_note():
    with pytest.raises(RuntimeError, match="shape") as caught:
        trained(FixedSize(), count=1)

    assert "autobatch was running a batch in pieces" in caught.value.__notes__[-1]


class RefusesLaterPieces(Failing):
    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and len(batch[1]) == self.most:
            raise ValueError("a whole batch is needed")
        return super().training_step(batch, batch_idx)


def test_error_of_a_later_batch_in_pieces_passes_with_a_note():
    with pytest.raises(ValueError, match="whole batch") as caught:
        trained(RefusesLaterPieces(), count=2)

    assert "autobatch was running a batch in pieces" in caught.value.__notes__[-1]


class StepsInBackward(Failing):
    def __init__(self):
        super().__init__()
        for each in self.parameters():
            each.register_post_accumulate_grad_hook(self.stepped)

    def stepped(self, parameter):
        parameter.grad = None

    def on_after_backward(self):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_gradients_that_are_used_in_the_backward_pass_are_not_repeated():
    assert "its gradients are used in the backward pass" in notes_of(
        type("", (StepsInBackward,), {"most": 99})()
    )


class OutOfMemoryInStep(torch.optim.SGD):
    def step(self, closure=None):
        closure()
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_error_of_the_optimizer_says_that_weights_may_be_half_updated(tmp_path):
    notes = notes_of(Trained(optimizer=OutOfMemoryInStep))

    assert "Within that step weights and optimizer state may be half updated" in notes
    assert "No checkpoint was written before." in notes


class Manual(Model):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class WithLBFGS(Model):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class FromIterator(Model):
    def training_step(self, dataloader_iter):
        pass


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize(
    ("module", "problem"),
    [
        (Manual, "manual optimization"),
        (WithLBFGS, "LBFGS evaluates a batch several times"),
        (FromIterator, "training_step takes the iterator of the loader"),
    ],
)
def test_module_is_refused_before_training(module, problem):
    with pytest.raises(autobatch.AutobatchError, match=problem) as caught:
        fit(module(), DataLoader(data(8), batch_size=4))

    assert 'on_out_of_memory="split"' in str(caught.value)


def test_sharding_strategy_is_refused_before_training(monkeypatch):
    # Made without __init__, which needs a GPU, and shown in place of the real one
    trainer = quiet_trainer()
    strategy = object.__new__(pl.strategies.FSDPStrategy)
    monkeypatch.setattr(pl.Trainer, "strategy", property(lambda _: strategy))

    with pytest.raises(autobatch.AutobatchError, match="FSDPStrategy makes ranks wait"):
        check_survival(trainer, Model())


class OverridesBackward(Model):
    def backward(self, loss):
        loss.backward()


class WithSyncNorm(Model):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.SyncBatchNorm(4)


@pytest.mark.parametrize(
    ("module", "wrapper", "problem"),
    [
        (Model, {}, None),
        (OverridesBackward, {}, "overrides backward"),
        (WithSyncNorm, {}, "SyncBatchNorm makes ranks wait"),
        (Model, {"static_graph": True}, "has static_graph or mixed_precision"),
    ],
)
def test_ddp_is_refused_where_ranks_could_hang(monkeypatch, module, wrapper, problem):
    trainer = quiet_trainer()
    strategy = object.__new__(pl.strategies.DDPStrategy)
    strategy._model, strategy._optimizers = SimpleNamespace(**wrapper), []
    monkeypatch.setattr(pl.Trainer, "strategy", property(lambda _: strategy))
    refused = pytest.raises(autobatch.AutobatchError, match=problem)

    with refused if problem else contextlib.nullcontext():
        check_survival(trainer, module())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_out_of_memory": "skip"}, "on_out_of_memory='skip' is unknown; give"),
        ({"plan": "keep"}, "plan='keep' tunes nothing, and on_out_of_memory='raise'"),
        (SPLIT | {"target_batch_size": 8}, "target_batch_size=8 changes them; give one"),
        (SPLIT | {"repair_last_window": True}, "repair_last_window=True changes them"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        autobatch.AutoBatch(**arguments)


def test_nothing_of_the_trainer_is_changed_by_default():
    seen = []

    class Looks(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append("_make_closure" in vars(trainer.fit_loop.epoch_loop.automatic_optimization))

    for arguments in (SPLIT, {"max_micro_batch_size": 4, "device": "simulated:1GiB", **QUICK}):
        quiet_trainer(autobatch.AutoBatch(**arguments), Looks(), max_steps=1).fit(
            Model(), DataLoader(data(8), batch_size=4)
        )

    assert seen == [True, False]


class MeanOfBatches(Failing):
    """Has one metric that counts samples, and one that counts batches."""

    def __init__(self):
        super().__init__()
        self.mean = torchmetrics.MeanMetric()

    def loss(self, x, y):
        loss = super().loss(x, y)
        self.mean.update(loss.detach())
        return loss


def test_metric_of_batches_is_named_since_pieces_count_in_it(caplog):
    run = trained(MeanOfBatches(), count=1)

    assert [each.pieces for each in run.survived] == [2]
    assert "mean: updated once per batch, in which each piece counts" in caplog.text
    assert "accuracy: updated" not in caplog.text
    assert run.module.mean.weight == 2
