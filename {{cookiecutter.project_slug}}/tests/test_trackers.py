"""Trackers: each stores the values of metrics.jsonl exactly once, and its errors do not affect the run."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import write_png
from marks import CLASSES_ONLY
from models import tiny_network
from processes import SECONDS, run_ranks, run_train, wait_until
from small_data import make_data

import train
from batteries.core.errors import UserError
from batteries.core.project import ROOT
from batteries.distributed.connectivity import find_free_port
from batteries.tracking import manager
from batteries.tracking.base import TrackedRun
from batteries.tracking.manager import check_trackers
from train import Config, Stage

PACKAGES = {"tensorboard": "tensorboard", "tensorboardx": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
INSTALLED = tuple(name for name, package in PACKAGES.items() if find_spec(package))
Points = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two stages with four steps per epoch and a point after every second step, for all installed trackers."""
    directory = tmp_path_factory.mktemp("trackers")
    patch = pytest.MonkeyPatch()
    patch.setattr(train, "build_model", tiny_network)
    patch.setattr("batteries.run.stage.LOG_EVERY", 2)
    patch.setattr("batteries.run.run.make_reports", draw_confusion)
    patch.setenv("WANDB_MODE", "offline")
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield Config(
        stages=(Stage("first", 3, 1e-2), Stage("second", 1, 1e-3)),
        data_dir=make_data(directory / "data"),
        split_file=directory / "splits.csv",
        logdir=directory / "run",
        device="cpu",
        limit_batches=4,
        num_workers=0,
        tracker=INSTALLED,
    )
    patch.undo()


def draw_confusion(logdir: Path, device: str) -> None:
    """Write the image of the confusion matrix, as the report does."""
    (logdir / "plots").mkdir(exist_ok=True)
    write_png(torch.full((3, 4, 5), 7, dtype=torch.uint8), logdir / "plots/confusion.png")


def run(config: Config, resume: bool = False) -> int:
    """Run in a separate process and return the exit code."""
    process = get_context("fork").Process(target=train.main, args=(dataclasses.replace(config, resume=resume),))
    process.start()
    process.join(SECONDS)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(config) -> Config:
    """A run that was not interrupted."""
    config = dataclasses.replace(config, logdir=config.logdir / "uninterrupted")
    assert run(config) == 0
    return config


@pytest.fixture(scope="module")
def resumed(config) -> Config:
    """A run that was killed after the points of its second epoch, before its checkpoint, and resumed."""
    config = dataclasses.replace(config, logdir=config.logdir / "resumed")
    process = train.CheckpointManager.process

    def die_in_epoch_2(self, score, epoch, checkpoint):
        if epoch == 2:
            wait_for_wandb(config.logdir, "first/valid/accuracy", 8)
            os.kill(os.getpid(), signal.SIGKILL)
        return process(self, score, epoch, checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.CheckpointManager, "process", die_in_epoch_2)
        assert run(config) == -signal.SIGKILL
    assert run(config, resume=True) == 0
    assert run(config, resume=True) == 0  # a finished run
    return config


def points_in(tracker: str, logdir: Path) -> Points:
    """Return the points that a tracker stored of a run, as read by its library."""
    if tracker == "wandb":
        return wandb_points(logdir)
    if tracker == "mlflow":
        return mlflow_points(logdir)
    return tensorboard_points(logdir / tracker)


def tensorboard_points(directory: Path) -> Points:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(directory)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def mlflow_points(logdir: Path) -> Points:
    client, found = mlflow_run(logdir)
    histories = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
    return {name: sorted((point.step, point.value) for point in history) for name, history in histories.items()}


def mlflow_run(logdir: Path, store: str = ""):
    """Return the client of a store, and its only run of `logdir`."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store or f"sqlite:///{logdir.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(ROOT.name)
    [found] = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{logdir.name}'")
    return client, found


def wait_for_wandb(logdir: Path, name: str, step: int) -> None:
    """Wait until wandb has written a point, which it does in a separate process."""
    if "wandb" not in INSTALLED:
        return

    def is_written() -> bool:
        try:
            return step in [found for found, _ in wandb_points(logdir).get(name, [])]
        except Exception:  # noqa: BLE001 (an incomplete record)
            return False

    wait_until(is_written, f"the point of {name} at step {step} in the file of wandb")


def wandb_points(logdir: Path) -> Points:
    points: Points = {}
    for kind, items in wandb_records(logdir):
        if kind == "history":
            step = items.pop("step")
            for name, value in items.items():
                if not name.startswith("_") and not isinstance(value, dict):
                    points.setdefault(name, []).append((step, value))
    return points


def wandb_records(logdir: Path) -> list[tuple[str, dict]]:
    """Return (kind, values) of each record in the offline files of a run, oldest first."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(logdir.glob("wandb/offline-run-*/*.wandb")):
        data = path.read_bytes()[7:]
        content = b""
        for start in range(0, len(data) + 7, 32768):  # the first block is 7 bytes shorter
            block = data[max(start - 7, 0) : start + 32768 - 7]
            while len(block) > 7:
                length, kind = struct.unpack("<HB", block[4:7])
                content += block[7 : 7 + length]
                block = block[7 + length :]
                if kind in (1, 4):
                    record = wandb_internal_pb2.Record()
                    record.ParseFromString(content)
                    content = b""
                    found.append((record.WhichOneof("record_type"), wandb_items(record)))
    return found


def wandb_items(record) -> dict:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        return {"id": record.run.run_id} | {item.key: json.loads(item.value_json) for item in record.run.config.update}
    items = []
    if kind == "history":
        items = record.history.item
    elif kind == "summary":
        items = record.summary.update
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def expected_points(logdir: Path) -> Points:
    """Return the points of all epochs, from metrics.jsonl."""
    points: Points = {}
    steps_before = {"first": 0, "second": 12}
    for line in map(json.loads, (logdir / "metrics.jsonl").read_text().splitlines()):
        step = steps_before[line["stage"]] + line["step"]
        values = {"lr": line["lr"]}
        for split in ("train", "valid"):
            values |= {f"{split}/{name}": value for name, value in line[split].items()}
        for name, value in values.items():
            points.setdefault(f"{line['stage']}/{name}", []).append((step, pytest.approx(value, rel=1e-6)))
    return points


BOTH = pytest.mark.parametrize("kind", ["uninterrupted", "resumed"])
EACH = pytest.mark.parametrize(
    "tracker",
    [pytest.param(name, marks=pytest.mark.skipif(name not in INSTALLED, reason="not installed")) for name in PACKAGES],
)


@pytest.mark.slow
@BOTH
@EACH
def test_trackers_store_each_metric_once_even_after_a_kill(tracker, kind, request):
    logdir = request.getfixturevalue(kind).logdir
    found = points_in(tracker, logdir)
    expected = expected_points(logdir)
    assert expected["first/valid/accuracy"][2][0] == 12
    assert {name: found[name] for name in expected} == expected


@pytest.mark.slow
def test_run_killed_before_its_first_checkpoint_has_each_point_once(config, monkeypatch):
    config = dataclasses.replace(config, logdir=config.logdir / "early", stages=(Stage("first", 1, 1e-2),))

    def die(*_):
        wait_for_wandb(config.logdir, "first/steps/loss", 2)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(train, "valid_fn", die)
        assert run(config) == -signal.SIGKILL
    assert run(config, resume=True) == 0
    for tracker in INSTALLED:
        found = points_in(tracker, config.logdir)
        assert [step for step, _ in found["first/steps/loss"]] == [2], tracker
        expected = expected_points(config.logdir)
        assert {name: found[name] for name in expected} == expected, tracker


@pytest.mark.slow
@BOTH
@EACH
def test_trackers_store_curves_within_an_epoch_once(tracker, kind, request):
    found = points_in(tracker, request.getfixturevalue(kind).logdir)
    for name in ("loss", "lr", "gradient_norm", "samples_per_second"):
        assert [step for step, _ in found[f"first/steps/{name}"]] == [2, 6, 10]
        assert [step for step, _ in found[f"second/steps/{name}"]] == [14]


@pytest.mark.slow
@pytest.mark.skipif("tensorboard" not in INSTALLED, reason="not installed")
@BOTH
@pytest.mark.parametrize("tracker", ["tensorboard", "tensorboardx"])
def test_tensorboard_stores_options_score_command_and_images(tracker, kind, request):
    if tracker not in INSTALLED:
        pytest.skip("not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    logdir = request.getfixturevalue(kind).logdir
    found = EventAccumulator(str(logdir / tracker)).Reload()
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    options = metadata.parse_session_start_info_plugin_data(content).hparams
    assert (options["stages.0.lr"].number_value, options["batch_size"].number_value) == (0.01, 32)
    record = json.loads((logdir / "run.json").read_text())
    assert [event.value for event in found.Scalars("best/accuracy")] == [pytest.approx(record["best"]["score"])]
    assert [event.step for event in found.Images("samples")] == [0]
    assert [(event.step, event.width, event.height) for event in found.Images("confusion")] == [(16, 5, 4)]
    [text] = found.Tensors("run/text_summary")
    assert record["command"].encode() in text.tensor_proto.string_val[0]
    [path] = found.Tensors("best_checkpoint/text_summary")
    assert path.tensor_proto.string_val[0].decode().endswith("best.pth")


@pytest.mark.slow
@pytest.mark.skipif("mlflow" not in INSTALLED, reason="not installed")
@BOTH
def test_mlflow_stores_options_score_commit_and_images_in_one_run(kind, request):
    logdir = request.getfixturevalue(kind).logdir
    client, found = mlflow_run(logdir)
    record = json.loads((logdir / "run.json").read_text())
    assert (found.data.params["stages.0.lr"], found.data.params["batch_size"]) == ("0.01", "32")
    [score] = client.get_metric_history(found.info.run_id, "best/accuracy")
    assert (score.value, score.step) == (record["best"]["score"], 16)
    assert found.data.tags["best_checkpoint"].endswith("best.pth")
    assert found.data.tags["mlflow.source.git.commit"] == str(record["git_commit"])
    assert found.info.status == "FINISHED"
    images = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"samples_step_0.png", "confusion_step_16.png"} <= images


@pytest.mark.slow
@pytest.mark.skipif("wandb" not in INSTALLED, reason="not installed")
@BOTH
def test_wandb_stores_options_score_commit_and_images_in_one_run(kind, request):
    logdir = request.getfixturevalue(kind).logdir
    records = wandb_records(logdir)
    record = json.loads((logdir / "run.json").read_text())
    runs = [items for name, items in records if name == "run"]
    assert {items["id"] for items in runs} == {record["id"]}
    assert (runs[0]["stages"][0]["lr"], runs[0]["batch_size"]) == (0.01, 32)
    assert runs[0]["run"]["git_commit"] == str(record["git_commit"])
    summary = {name: value for kind, items in records if kind == "summary" for name, value in items.items()}
    assert summary["best/accuracy"] == record["best"]["score"]
    assert summary["best_checkpoint"].endswith("best.pth")
    rows = [items for name, items in records if name == "history"]
    for image in ("samples", "confusion"):
        assert sum(f"{image}/_type" in items for items in rows) == 1


@pytest.mark.slow
@EACH
def test_tracker_added_on_resume_gets_the_earlier_epochs(config, tracker):
    config = dataclasses.replace(config, logdir=config.logdir / f"late_{tracker}", stages=config.stages[:1])
    assert run(dataclasses.replace(config, tracker=("none",))) == 0
    two_stages = (*config.stages, Stage("second", 1, 1e-3))
    assert run(dataclasses.replace(config, tracker=(tracker,), stages=two_stages), resume=True) == 0
    found = points_in(tracker, config.logdir)
    expected = expected_points(config.logdir)
    assert {name: found[name] for name in expected} == expected


class IdleTracker:
    """A tracker that stores nothing."""

    dashboard = ""

    def start(self, run):
        return -1

    def log(self, values, step):
        pass

    def image(self, name, array, step):
        pass

    def finish(self, score, best, failed):
        pass


@pytest.mark.parametrize("method", ["start", "log", "image", "finish"])
def test_failing_tracker_is_disabled_with_one_warning_and_does_not_change_the_run(
    config, monkeypatch, tmp_path, method
):
    class Failing(IdleTracker):
        pass

    def fail(*_):
        raise OSError(f"the server has gone{' far' * 100}\nfor good")

    config = dataclasses.replace(config, stages=config.stages[:1], logdir=tmp_path / "without", tracker=("none",))
    setattr(Failing, method, fail)
    monkeypatch.setattr(manager, "_make_backend", lambda name: Failing())
    monkeypatch.setattr(manager, "find_spec", lambda name: True)
    assert run(config) == 0
    assert run(dataclasses.replace(config, logdir=tmp_path / "failing", tracker=("tensorboard",))) == 0
    log = (tmp_path / "failing/train.log").read_text()
    assert log.count("WARNING") == 1
    [reason] = re.findall(r"tensorboard failed \((.*)\) and is disabled from here on; metrics.jsonl has all", log)
    assert (reason[:23], reason[-2:], len(reason) <= 160) == ("the server has gone far", " …", True)
    weights = torch.load(tmp_path / "without/first/last.pth", weights_only=True)["model_state_dict"]
    other_weights = torch.load(tmp_path / "failing/first/last.pth", weights_only=True)["model_state_dict"]
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    metrics = (tmp_path / "without/metrics.jsonl").read_bytes()
    assert metrics == (tmp_path / "failing/metrics.jsonl").read_bytes()


INVALID_IMAGES = {
    "a Tensor (8, 8) of torch.float32": torch.zeros(8, 8),
    "a Tensor (8, 8, 3) of torch.uint8": torch.zeros(8, 8, 3, dtype=torch.uint8),
    "a Tensor (2, 3, 8, 8) of torch.float32": torch.zeros(2, 3, 8, 8),
    "a Tensor (2, 8, 8) of torch.float32": torch.zeros(2, 8, 8),
    "a Tensor (3, 0, 8) of torch.float32": torch.zeros(3, 0, 8),
    "a ndarray (8, 8) of uint8": np.zeros((8, 8), np.uint8),
    "a Tensor (3, 8, 8) of torch.int64": torch.full((3, 8, 8), 256),
    "of type str": "cat.png",
}


@pytest.mark.parametrize("tracker", INSTALLED)
def test_image_of_wrong_shape_is_named_and_the_tracker_continues(caplog, monkeypatch, tmp_path, tracker):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(logging.getLogger("batteries"), "propagate", True)
    trackers = manager.Trackers([tracker])
    trackers.start(TrackedRun("abcdefgh", tmp_path / "run", {}, {}, "loss"))
    for image in INVALID_IMAGES.values():
        trackers.image("sheet", lambda image=image: image, 1)
    trackers.image("grey", lambda: np.zeros((1, 8, 8), np.uint8), 1)
    trackers.image("float", lambda: torch.zeros(3, 8, 8, requires_grad=True), 1)
    trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    if tracker == "wandb":
        wait_for_wandb(tmp_path / "run", "loss", 1)  # wandb closes its file after finish() has returned
    warnings = [record.getMessage() for record in caplog.records if record.name == "batteries"]
    assert warnings == [
        f"image sheet is not logged: it is {found}; give a uint8 tensor (3, H, W)." for found in INVALID_IMAGES
    ]
    assert points_in(tracker, tmp_path / "run")["loss"] == [(1, 1.0)]


def test_tracker_that_does_not_finish_is_abandoned(config, monkeypatch, tmp_path):
    class Slow(IdleTracker):
        def finish(self, score, best, failed):
            time.sleep(SECONDS)

    monkeypatch.setattr(manager, "_make_backend", lambda name: Slow())
    monkeypatch.setattr(manager, "find_spec", lambda name: True)
    monkeypatch.setattr(manager, "SECONDS_TO_FINISH", 0.1)
    assert run(dataclasses.replace(config, logdir=tmp_path / "run", tracker=("mlflow",))) == 0
    warning = "mlflow did not finish within 0.1 s; its last points may be missing."
    assert warning in (tmp_path / "run/train.log").read_text()


@CLASSES_ONLY
@pytest.mark.skipif("tensorboard" not in INSTALLED, reason="not installed")
def test_only_rank_0_writes_to_a_tracker(config, tmp_path):
    config = dataclasses.replace(config, logdir=tmp_path / "run", tracker=("tensorboard",))
    run_ranks(2, lambda: train.main(config), join=False)
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1
    found = tensorboard_points(tmp_path / "run/tensorboard")
    assert [step for step, _ in found["first/valid/accuracy"]] == [4, 8, 12]


@pytest.mark.slow
@pytest.mark.skipif("wandb" not in INSTALLED, reason="not installed")
def test_wandb_without_an_account_runs_offline_with_a_warning(config, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("UV", raising=False)  # set if uv runs the tests
    monkeypatch.setenv("HOME", str(tmp_path))
    config = dataclasses.replace(config, logdir=tmp_path / "run", tracker=("wandb",))
    assert run(config) == 0
    log = (tmp_path / "run/train.log").read_text()
    assert "wandb runs offline: no account is configured on this machine (wandb login)." in log
    assert f"curves   wandb sync {tmp_path}/run/wandb/offline-run-*-" in log
    found = wandb_points(tmp_path / "run")
    assert found["first/valid/accuracy"] == expected_points(tmp_path / "run")["first/valid/accuracy"]


@pytest.mark.skipif("mlflow" not in INSTALLED, reason="not installed")
@pytest.mark.parametrize("name", ["a b?c=d%20e#f", "%3F&ü:1@2"])
def test_mlflow_stores_a_run_in_a_directory_with_special_characters(config, monkeypatch, tmp_path, name):
    monkeypatch.delenv("UV", raising=False)
    logdir = tmp_path / name / "run"
    config = dataclasses.replace(config, stages=(Stage("first", 1, 1e-2),), logdir=logdir, tracker=("mlflow",))
    assert run(config) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert {"mlflow.db", "mlartifacts"} <= {path.name for path in logdir.parent.iterdir()}
    assert "mlflow failed" not in (logdir / "train.log").read_text()
    [command] = re.findall(r"curves   (mlflow ui .*)", (logdir / "train.log").read_text())
    *words, address = shlex.split(command)
    assert words == ["mlflow", "ui", "--backend-store-uri"]
    client, found = mlflow_run(logdir, address)
    assert found.data.tags["best_checkpoint"] == str(logdir / "first/best.pth")
    assert client.list_artifacts(found.info.run_id)


@pytest.fixture
def mlflow_server(tmp_path):
    """Start an MLflow server on this machine; return its URL and its process."""
    port = find_free_port()
    store = ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}", "--artifacts-destination", str(tmp_path)]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--port", str(port), "--workers", "1"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def answers() -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=SECONDS).read()
        except OSError:
            return False
        return True

    wait_until(answers, "an answer of the server")
    yield f"http://127.0.0.1:{port}", server
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.mark.slow
@pytest.mark.skipif("mlflow" not in INSTALLED, reason="not installed")
def test_mlflow_logs_to_a_server_and_the_run_survives_its_loss(config, monkeypatch, tmp_path, mlflow_server):
    address, server = mlflow_server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = dataclasses.replace(config, tracker=("mlflow",))
    complete = dataclasses.replace(config, logdir=tmp_path / "complete")
    assert run(complete) == 0
    client, found = mlflow_run(complete.logdir, address)
    points = client.get_metric_history(found.info.run_id, "first/valid/accuracy")
    assert [(point.step, point.value) for point in points] == expected_points(complete.logdir)["first/valid/accuracy"]
    assert "samples_step_0.png" in [file.path for file in client.list_artifacts(found.info.run_id)]

    process = train.CheckpointManager.process

    def end_server(self, score, epoch, checkpoint):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        return process(self, score, epoch, checkpoint)

    monkeypatch.setattr(train.CheckpointManager, "process", end_server)
    assert run(dataclasses.replace(config, logdir=tmp_path / "serverless")) == 0
    assert (tmp_path / "serverless/metrics.jsonl").read_bytes() == (tmp_path / "complete/metrics.jsonl").read_bytes()
    assert (tmp_path / "serverless/train.log").read_text().count("mlflow failed (") == 1


@pytest.mark.parametrize(
    "names", [(), ("none", "tensorboard"), ("tensorboard", "tensorboard")], ids=["empty", "combined", "repeated"]
)
def test_invalid_combinations_of_trackers_are_rejected(names):
    with pytest.raises(UserError, match=r"must be none, or one or more different trackers\."):
        check_trackers(names)


@pytest.mark.parametrize(("tracker", "package"), PACKAGES.items())
def test_tracker_that_is_not_installed_is_rejected_with_the_install_command(
    config, monkeypatch, tmp_path, tracker, package
):
    monkeypatch.setattr(manager, "find_spec", lambda name: None)
    flags = ["--logdir", str(tmp_path / "run"), "--tracker", tracker, "--device", "cpu"]
    end = run_train(train.main, Config, *flags, "--data-dir", str(config.data_dir))
    assert end.code == 2
    assert end.err == f"error: --tracker {tracker} needs the package {package}: uv add {package}, or --tracker none.\n"
    assert not (tmp_path / "run").exists()
