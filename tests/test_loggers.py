from __future__ import annotations

import csv
import importlib
import json
import logging
import random
import struct
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch import sinks
from autobatch.testing import SimulatedAccelerator
from lightning_here import HERE, pl
from report_examples import example

yaml = importlib.import_module("yaml")  # Lightning needs it
_loggers = importlib.import_module("autobatch.lightning._loggers")


def data():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(240, 16, generator=generator)
    return TensorDataset(x, x[:, :4].argmax(1))


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        noise = torch.rand(()) + random.random()
        loss = F.cross_entropy(self.net(x + 0.01 * noise), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


class Named(Model):
    """A module with saved hyperparameters."""

    def __init__(self, batch_size=4, width=256):
        super().__init__()
        self.save_hyperparameters()


class Data(pl.LightningDataModule):
    def __init__(self, batch_size=4, folds=3):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return DataLoader(data(), self.hparams.batch_size, shuffle=True)


class Mine(pl.loggers.logger.Logger):
    """A custom logger that records its calls."""

    name, version, log_dir = "mine", 0, None

    def __init__(self, log_dir=None):
        super().__init__()
        self.log_dir = log_dir
        self.hyperparameters = {}
        self.steps = []

    def log_hyperparams(self, params):
        self.hyperparameters.update(params)

    def log_metrics(self, metrics, step):
        self.steps.append(step)


class Draws(Mine):
    """A logger that draws the name of its run from the global random state."""

    def log_hyperparams(self, params):
        super().log_hyperparams(params)
        if "autobatch/batch_size" in params:
            random.random()
            torch.rand(3)


class Fails(Mine):
    def log_hyperparams(self, params):
        if "autobatch/batch_size" in params:
            raise ConnectionError("no route\nto the host")


def tuner(**options):
    return autobatch.AutoBatch(
        target_batch_size=60, device=SimulatedAccelerator("450KiB"), **options
    )


def trainer(*callbacks, **options):
    quiet = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fit(*loggers, model=None, datamodule=None, **options):
    """Fit with a logger, and return the report."""
    pl.seed_everything(1, verbose=False)
    callback, model = tuner(), model or Named()
    loader = None if datamodule else DataLoader(data(), batch_size=4, shuffle=True)
    fitted = trainer(callback, logger=list(loggers), **options)
    fitted.fit(model, loader, datamodule=datamodule)
    return callback.report


def values(report):
    return {
        "autobatch/batch_size": report.plan.micro_batch_size,
        "autobatch/accumulate_grad_batches": report.plan.accumulate_grad_batches,
        "autobatch/effective_batch_size": 60,
    }


def hyperparameters(directory):
    return yaml.safe_load((Path(directory) / "hparams.yaml").read_text())


def assert_files(directory, report):
    written = autobatch.TuningReport.read(Path(directory) / "autobatch.json")
    assert written == report
    told = (Path(directory) / "autobatch.md").read_text(encoding="utf-8")
    assert told == sinks.to_markdown(report)


def peaks(report):
    return {row.batch_size: row.peak for row in report.sizes}


def speeds(report):
    return {row.batch_size: row.samples_per_second for row in report.sizes}


# Every logger


def test_csv_logger_keeps_hyperparameters_of_user_and_plan(tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)

    report = fit(logger)

    size = report.plan.micro_batch_size
    assert size != 4
    assert hyperparameters(logger.log_dir) == {
        "batch_size": size,
        "width": 256,
        **values(report),
    }
    assert_files(logger.log_dir, report)


def test_the_tuned_size_is_logged_for_module_and_datamodule(tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)

    report = fit(logger, datamodule=Data())

    assert hyperparameters(logger.log_dir) == {
        "batch_size": report.plan.micro_batch_size,
        "width": 256,
        "folds": 3,
        **values(report),
    }


def test_a_custom_logger_gets_hyperparameters_and_files(tmp_path):
    logger = Mine(str(tmp_path / "here"))

    report = fit(logger)

    assert logger.hyperparameters == {
        "batch_size": report.plan.micro_batch_size,
        "width": 256,
        **values(report),
    }
    assert_files(tmp_path / "here", report)
    assert logger.steps == list(range(8))  # of training


def test_files_go_to_the_save_directory_without_a_log_directory(tmp_path):
    class Saves(Mine):
        save_dir = str(tmp_path)

    logger = Saves()

    report = fit(logger)

    assert_files(tmp_path, report)


def test_a_remote_log_directory_gets_the_files():
    fsspec = importlib.import_module("fsspec")
    logger = pl.loggers.CSVLogger("memory://logs")

    report = fit(logger)

    def text(name):
        with fsspec.open(f"{logger.log_dir}/{name}", "r", encoding="utf-8") as file:
            return file.read()

    assert logger.log_dir.startswith("memory://")
    assert autobatch.TuningReport.from_json(text("autobatch.json")) == report
    assert text("autobatch.md") == sinks.to_markdown(report)


def test_without_logged_hyperparameters_only_files_are_written(tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)

    report = fit(logger, enable_autolog_hparams=False)

    assert_files(logger.log_dir, report)
    assert not (Path(logger.log_dir) / "hparams.yaml").exists()


@pytest.mark.parametrize("kind", ["CSVLogger", Draws])
def test_logged_metrics_equal_those_of_a_run_by_hand(kind, tmp_path):
    def rows(callbacks, where, size, accumulate):
        watching = pl.loggers.CSVLogger(where)
        other = [kind()] if kind is Draws else []
        pl.seed_everything(1, verbose=False)
        model = Named(size)
        loader = DataLoader(data(), batch_size=size, shuffle=True)
        trainer(*callbacks, logger=[*other, watching], accumulate_grad_batches=accumulate).fit(
            model, loader
        )
        return (Path(watching.log_dir) / "metrics.csv").read_text()

    callback = tuner()
    tuned = rows([callback], tmp_path / "tuned", 4, 1)
    plan = callback.report.plan
    by_hand = rows([], tmp_path / "by hand", plan.micro_batch_size, plan.accumulate_grad_batches)

    assert tuned == by_hand
    header, *steps = csv.reader(tuned.splitlines())
    assert set(header) == {"epoch", "loss", "step"}
    assert len(steps) == 8


def test_a_failing_logger_warns_in_one_line_and_stops_no_other(tmp_path, caplog):
    failing, working = Fails(str(tmp_path / "failing")), Mine()

    with caplog.at_level(logging.WARNING, logger="autobatch"):
        report = fit(failing, working)

    assert [record.getMessage() for record in caplog.records] == [
        "Fails did not take all of the report: ConnectionError: no route to the host"
    ]
    assert failing.steps == list(range(8))
    assert_files(tmp_path / "failing", report)
    assert values(report).items() <= working.hyperparameters.items()


def test_files_that_cannot_be_written_warn(tmp_path, caplog):
    (tmp_path / "taken").touch()
    logger = Mine(str(tmp_path / "taken"))

    report = fit(logger)

    (line,) = (record.getMessage() for record in caplog.records if record.name == "autobatch")
    assert "Mine did not take all of the report: OSError: " in line
    assert "The report could not be written to" in line
    assert values(report).items() <= logger.hyperparameters.items()


@pytest.mark.parametrize(
    "options", [{"barebones": True, "log_every_n_steps": None}, {"logger": False}]
)
def test_nothing_is_written_without_a_logger(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = tuner()

    class Silent(Model):
        log = None  # no training may log here

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    trainer(callback, **options).fit(Silent(), DataLoader(data(), batch_size=4))

    assert callback.report is not None
    assert list(tmp_path.iterdir()) == []


def test_a_fast_dev_run_logs_nothing(tmp_path):
    callback, logger = tuner(), pl.loggers.CSVLogger(tmp_path)

    fitted = trainer(callback, logger=logger, fast_dev_run=True)
    fitted.fit(Model(), DataLoader(data(), batch_size=4))

    assert fitted.global_step == 1
    assert callback.report is None
    assert list(tmp_path.iterdir()) == []


def test_the_logger_of_a_fast_dev_run_keeps_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    fitted = trainer(logger=pl.loggers.CSVLogger(tmp_path), fast_dev_run=True)

    _loggers.log_report(example(), fitted)

    assert len(fitted.loggers) == 1
    assert "did not take" not in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_zero_logs(rank, monkeypatch):
    fitted = trainer(logger=Mine())
    zero = property(lambda _: rank == 0)
    monkeypatch.setattr(type(fitted.strategy), "is_global_zero", zero)

    _loggers.log_report(example(), fitted)

    assert bool(fitted.logger.hyperparameters) == (rank == 0)


@pytest.mark.parametrize("package", HERE)
@pytest.mark.parametrize("kind", _loggers._OF_KIND)
def test_loggers_are_recognized_by_classes_of_the_package_in_use(package, kind):
    known = getattr(importlib.import_module(f"{package}.loggers"), kind)
    fitted = importlib.import_module(package).Trainer(barebones=True)

    class Own(known):
        def __init__(self):
            """Create one without the packages of the real one."""

    assert _loggers._parts(Own(), fitted) == _loggers._OF_KIND[kind]
    assert _loggers._parts(Mine(), fitted) == _loggers._OF_OTHER_KINDS


# TensorBoard


def tensorboard(directory, **options):
    pytest.importorskip("tensorboard")
    return pl.loggers.TensorBoardLogger(directory, **options)


def events(logger):
    accumulators = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    everything = {"scalars": 0, "tensors": 0}
    read = accumulators.EventAccumulator(logger.log_dir, everything)
    return read.Reload()


def hyperparameters_shown(read):
    """Return the hyperparameters on TensorBoard's page."""
    metadata = importlib.import_module("tensorboard.plugins.hparams.metadata")
    content = read.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    shown = metadata.parse_session_start_info_plugin_data(content).hparams
    return {name: value.number_value for name, value in shown.items()}


@pytest.mark.slow
def test_tensorboard_gets_the_report_as_text_and_the_throughput(tmp_path):
    logger = tensorboard(tmp_path)

    report = fit(logger)

    read = events(logger)
    *_, text = read.Tensors("autobatch/report/text_summary")  # the last is complete
    assert text.tensor_proto.string_val[0].decode() == sinks.to_markdown(report)
    speed = {event.step: event.value for event in read.Scalars("autobatch/samples_per_second")}
    peak = {event.step: event.value for event in read.Scalars("autobatch/peak_bytes")}
    assert len(speed) > 1
    assert speed == pytest.approx(speeds(report))
    assert peak == pytest.approx(peaks(report))
    assert len(read.Scalars("loss")) == 8
    assert_files(logger.log_dir, report)


@pytest.mark.slow
def test_tensorboard_keeps_the_users_hyperparameters(tmp_path):
    logger = tensorboard(tmp_path)

    report = fit(logger)

    read, own = (
        events(logger),
        {"batch_size": report.plan.micro_batch_size, "width": 256},
    )
    assert hyperparameters_shown(read) == own
    assert hyperparameters(logger.log_dir) == own | values(report)
    assert len(read.Scalars("hp_metric")) == 1


@pytest.mark.slow
def test_tensorboard_shows_the_plan_without_user_hyperparameters(tmp_path):
    logger = tensorboard(tmp_path)

    report = fit(logger, model=Model())

    assert hyperparameters_shown(events(logger)) == values(report)
    assert hyperparameters(logger.log_dir) == values(report)


@pytest.mark.slow
def test_tensorboard_shows_hyperparameters_logged_at_training_start(tmp_path):
    class Late(Named):
        def on_train_start(self):
            self.logger.log_hyperparams(self.hparams, {"accuracy": 0.0})

    logger = tensorboard(tmp_path, default_hp_metric=False)

    report = fit(logger, model=Late())

    size = report.plan.micro_batch_size
    assert hyperparameters_shown(events(logger)) == {"batch_size": size, "width": 256}


@pytest.mark.slow
def test_two_loggers_each_get_the_report(tmp_path):
    loggers = tensorboard(tmp_path / "one"), pl.loggers.CSVLogger(tmp_path / "other")

    report = fit(*loggers)

    for logger in loggers:
        assert_files(logger.log_dir, report)
        assert values(report).items() <= hyperparameters(logger.log_dir).items()


# W&B


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    package = pytest.importorskip("wandb")
    yield pl.loggers.WandbLogger(save_dir=tmp_path, mode="offline")
    package.teardown()


def records(path):
    """Return the protobuf records of an offline run, in blocks of 32 KiB as in LevelDB."""
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    content, at, parts = path.read_bytes(), 7, []
    while at + 7 <= len(content):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in {1, 4}:  # whole, or the last of its parts
            yield record.FromString(b"".join(parts))
            parts.clear()


def items(update):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in update}


@pytest.mark.slow
def test_wandb_gets_hyperparameters_table_summary_and_files(tmp_path, wandb):
    class LogsSteps(Named):
        def on_train_start(self):
            self.logger.experiment.log({"mine": 5}, step=0)

    report = fit(wandb, model=LogsSteps())

    directory = Path(wandb.experiment.dir)
    # Unlike `finish`, it waits until the process that writes the run ends
    importlib.import_module("wandb").teardown()
    config, summary, history = {}, {}, []
    for record in records(next(directory.parent.glob("*.wandb"))):
        config |= items(record.run.config.update) | items(record.config.update)
        summary |= items(record.summary.update)
        if record.history.item:
            history.append(items(record.history.item))
    size = report.plan.micro_batch_size
    assert config.items() >= {"batch_size": size, "width": 256, **values(report)}.items()
    assert summary["autobatch/samples_per_second"] == pytest.approx(speeds(report)[size])
    assert summary["autobatch/peak_bytes"] == peaks(report)[size]
    assert summary["autobatch/largest_fit"] == report.largest_fit
    # Values that the user logs at step 0 are neither lost nor moved
    assert history[0].items() >= {"mine": 5, "_step": 0}.items()
    table = json.loads((directory / history[0]["autobatch/sizes/path"]).read_text())
    sizes = json.loads(report.to_json())["sizes"]
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == sizes
    assert sum("loss" in row for row in history) == 8
    assert_files(directory, report)


# MLflow


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    pytest.importorskip("mlflow")
    return pl.loggers.MLFlowLogger(tracking_uri=f"file:{tmp_path}/runs")


@pytest.mark.slow
def test_mlflow_gets_hyperparameters_throughput_and_files(tmp_path, mlflow):
    report = fit(mlflow)

    client, run = mlflow.experiment, mlflow.run_id
    size = report.plan.micro_batch_size
    expected = {"batch_size": size, "width": 256, **values(report)}
    assert client.get_run(run).data.params == {name: str(value) for name, value in expected.items()}

    def curve(name):
        return {point.step: point.value for point in client.get_metric_history(run, name)}

    assert curve("autobatch/samples_per_second") == pytest.approx(speeds(report))
    assert curve("autobatch/peak_bytes") == peaks(report)
    assert len(curve("loss")) == 8
    (artifacts,) = tmp_path.glob("runs/*/*/artifacts")
    assert_files(artifacts, report)


@pytest.mark.slow
def test_mlflow_accepts_equal_hyperparameters_and_warns_of_others(mlflow, caplog):
    """Another fit in the same run may find another size."""
    report, fitted = example(), trainer(logger=mlflow)
    other = report.model_copy(update={"plan": autobatch.BatchPlan(16, 16)})

    _loggers.log_report(report, fitted)
    _loggers.log_report(report, fitted)
    assert "did not take" not in caplog.text
    _loggers.log_report(other, fitted)

    assert "MLFlowLogger did not take all of the report: " in caplog.text
