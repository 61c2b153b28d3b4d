"""Batches, configurations and loaders of other packages; `nox -s cases` installs them all."""

from __future__ import annotations

import io
import random
import tarfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from autobatch.errors import AutobatchError
from autobatch.testing import SimulatedAccelerator
from by_hand import PAIRS, Recorded, X, Y, compared
from lightning_here import quiet_trainer
from test_situations import tuner

# What other packages warn of is not known here
pytestmark = [pytest.mark.cases, pytest.mark.filterwarnings("default")]


def shuffled(batch_size, **options):
    return DataLoader(PAIRS, batch_size, shuffle=True, **options)


# PyTorch Geometric


class OfGraphs(Recorded):
    """Writes its features back into the batch, as layers of graph networks do."""

    def __init__(self):
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.first, self.head = GCNConv(16, 32), nn.Linear(32, 4)

    def training_step(self, batch, batch_idx):
        from torch_geometric.nn import global_mean_pool

        self.sizes.append(batch.num_graphs)
        self.seen.append((batch.x.double().sum().item(), batch.edge_index.sum().item()))
        batch.x = self.first(batch.x, batch.edge_index).relu()
        return F.cross_entropy(self.head(global_mean_pool(batch.x, batch.batch)), batch.y)


def test_graphs_of_several_sizes_are_tuned():
    from_lists = pytest.importorskip("torch_geometric.data")
    loaders = pytest.importorskip("torch_geometric.loader")
    graphs = []
    for i in range(240):
        nodes = 2 + i % 5
        edges = torch.tensor([list(range(nodes)), [*range(1, nodes), 0]])
        x = X[i].repeat(nodes, 1) + torch.arange(nodes)[:, None]
        graphs.append(from_lists.Data(x=x, edge_index=edges, y=Y[i : i + 1]))

    both = compared(lambda size: loaders.DataLoader(graphs, size, shuffle=True), OfGraphs)

    both.check()


# OmegaConf


class OfConfig(Recorded):
    def __init__(self, config):
        super().__init__()
        self.save_hyperparameters(config)

    def train_dataloader(self):
        return shuffled(self.hparams.data.batch_size)


def test_dotted_name_reaches_into_an_omegaconf_configuration():
    omegaconf = pytest.importorskip("omegaconf")
    module = OfConfig(omegaconf.OmegaConf.create({"data": {"batch_size": 4}}))
    callback = tuner(batch_arg_name="data.batch_size")

    quiet_trainer(callback).fit(module)

    size = callback.report.plan.micro_batch_size
    assert module.hparams.data.batch_size == size
    assert set(module.sizes) == {size}


def test_read_only_configuration_is_refused_before_the_search():
    omegaconf = pytest.importorskip("omegaconf")
    module = OfConfig(omegaconf.OmegaConf.create({"data": {"batch_size": 4}}))
    omegaconf.OmegaConf.set_readonly(module.hparams, True)

    with pytest.raises(AutobatchError, match=r"data\.batch_size"):
        quiet_trainer(tuner(batch_arg_name="data.batch_size")).fit(module)

    assert module.sizes == []
    assert module.hparams.data.batch_size == 4


# MONAI


class Segments(Recorded):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch["image"].as_tensor(), batch["label"].as_tensor()
        self.sizes.append(len(x))
        self.seen.append(x.double().sum().item())
        return F.cross_entropy(self.net(x), y[:, 0].long())


@pytest.mark.parametrize("workers", [0, 1])
def test_four_crops_of_each_volume_are_those_by_hand(workers):
    """The random state of each transform lies several layers below the data set."""
    transforms = pytest.importorskip("monai.transforms")
    data = pytest.importorskip("monai.data")
    source = np.random.RandomState(0)
    volumes = [
        {
            "image": source.randn(1, 12, 12, 12).astype("float32"),
            "label": (source.rand(1, 12, 12, 12) > 0.7).astype("float32"),
        }
        for _ in range(24)
    ]
    keys = ["image", "label"]

    def make(size):
        crop = transforms.RandCropByPosNegLabeld(keys, "label", (6, 6, 6), num_samples=4)
        augment = transforms.Compose([crop, transforms.RandFlipd(keys, prob=0.5)])
        augment.set_random_state(7)
        dataset = data.Dataset(volumes, augment)
        # Its size counts volumes; a batch has four crops of each
        return data.DataLoader(dataset, batch_size=size, shuffle=True, num_workers=workers)

    both = compared(make, Segments, device=SimulatedAccelerator("3MiB"), target_batch_size=24)

    assert both.tuned.sizes == both.by_hand.sizes
    assert both.tuned.seen == both.by_hand.seen
    assert max(both.tuned.sizes) == 4 * both.report.plan.micro_batch_size


# Tokenizers


class Tags(Recorded):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(60, 64), nn.Linear(64, 2))

    def training_step(self, batch, batch_idx):
        ids = batch["input_ids"]
        self.sizes.append(len(ids))
        self.seen.append(ids.sum().item())
        words = [[word is not None for word in batch.word_ids(row)] for row in range(len(ids))]
        return F.cross_entropy(self.net(ids)[torch.tensor(words)], ids[torch.tensor(words)] % 2)


def test_batch_of_a_tokenizer_knows_its_words():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = [f"w{i}" for i in range(50)]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]"
    )
    source = random.Random(0)
    data = [[source.choice(words) for _ in range(source.randint(3, 20))] for _ in range(240)]

    def encode(samples):
        return tokenizer(samples, is_split_into_words=True, padding=True, return_tensors="pt")

    both = compared(
        lambda size: DataLoader(data, size, shuffle=True, collate_fn=encode),
        Tags,
        device=SimulatedAccelerator("2MiB"),
    )

    both.check()


# TensorDict


class OfTensors(Recorded):
    def pair(self, batch):
        assert batch.batch_size == batch["x"].shape[:1]
        return batch["x"], batch["y"]


def test_batch_that_is_a_tensordict_keeps_its_batch_size():
    tensordict = pytest.importorskip("tensordict")
    samples = [
        tensordict.TensorDict({"x": x, "y": y}, batch_size=[]) for x, y in zip(X, Y, strict=True)
    ]

    both = compared(
        lambda size: DataLoader(samples, size, shuffle=True, collate_fn=torch.stack), OfTensors
    )

    both.check()


# Loaders of other packages


@pytest.fixture
def shard(tmp_path):
    """A file of samples as webdataset reads them."""
    path = tmp_path / "samples.tar"
    with tarfile.open(path, "w") as file:
        for i, (x, y) in enumerate(zip(X, Y, strict=True)):
            for ending, value in (("x.npy", x.numpy()), ("y.npy", y.numpy())):
                buffer = io.BytesIO()
                np.save(buffer, value)
                member = tarfile.TarInfo(f"{i:04}.{ending}")
                member.size = buffer.tell()
                buffer.seek(0)
                file.addfile(member, buffer)
    return path


def stream(shard):
    webdataset = pytest.importorskip("webdataset")
    samples = webdataset.WebDataset(str(shard), shardshuffle=False).decode()
    # Its own random numbers start from the clock otherwise
    samples = samples.shuffle(50, rng=random.Random(3))
    return samples.to_tuple("x.npy", "y.npy").map_tuple(torch.tensor, torch.tensor)


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_of_webdataset_gives_the_data_it_gives_by_hand(shard, workers):
    both = compared(lambda size: DataLoader(stream(shard), size, num_workers=workers))

    both.check()
    assert sum(both.tuned.sizes) == 480


def test_stream_that_makes_its_own_batches_is_refused(shard):
    webdataset = pytest.importorskip("webdataset")
    loader = webdataset.WebLoader(stream(shard).batched(4), batch_size=None, num_workers=0)
    module = Recorded()

    with pytest.raises(AutobatchError, match="cannot change the batch size of this loader"):
        quiet_trainer(tuner(), limit_train_batches=5).fit(module, loader)

    assert module.sizes == []


@pytest.mark.parametrize("workers", [0, 1])
def test_stateful_loader_of_torchdata_gives_the_data_it_gives_by_hand(workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    both = compared(lambda size: stateful(PAIRS, size, shuffle=True, num_workers=workers))

    both.check()
