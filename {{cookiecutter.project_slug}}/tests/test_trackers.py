"""Trackers: their own files hold the numbers of metrics.jsonl, once each, and none of them can touch a run."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from models import tiny_network
from processes import run_ranks, run_train
from small_data import make_data
from torchvision.io import write_png

import train
from batteries.core.errors import UserError
from batteries.distributed.connectivity import find_free_port
from batteries.tracking import manager as trackers
from batteries.tracking.manager import check_trackers
from batteries.tracking.tensorboard import ROOT
from train import Config, Stage

PACKAGES = {"tensorboard": "tensorboard", "tensorboardx": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
INSTALLED = tuple(name for name, package in PACKAGES.items() if find_spec(package))
Points = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two stages of four steps an epoch, with a point after the second, for all trackers that are installed."""
    folder = tmp_path_factory.mktemp("trackers")
    patch = pytest.MonkeyPatch()
    patch.setattr(train, "build_model", tiny_network)
    patch.setattr("batteries.run.stage.LOG_EVERY", 2)
    patch.setattr("batteries.run.run.make_reports", draw_confusion)
    patch.setenv("WANDB_MODE", "offline")
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield Config(
        stages=(Stage("first", 3, 1e-2), Stage("second", 1, 1e-3)),
        data_dir=make_data(folder / "data"),
        split_file=folder / "splits.csv",
        logdir=folder / "run",
        device="cpu",
        limit_batches=4,
        num_workers=0,
        tracker=INSTALLED,
    )
    patch.undo()


def draw_confusion(logdir: Path, device: str) -> None:
    """As report.py does, in short."""
    (logdir / "plots").mkdir(exist_ok=True)
    write_png(torch.full((3, 4, 5), 7, dtype=torch.uint8), str(logdir / "plots/confusion.png"))


def run(config: Config, resume: bool = False) -> int:
    """The exit code of a run in a process of its own."""
    process = get_context("fork").Process(target=train.main, args=(dataclasses.replace(config, resume=resume),))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(scope="module")
def fresh(config) -> Config:
    """A run that nobody cut."""
    config = dataclasses.replace(config, logdir=config.logdir / "fresh")
    assert run(config) == 0
    return config


@pytest.fixture(scope="module")
def resumed(config) -> Config:
    """A run that was killed after the points of its second epoch, before the checkpoint of it, and went on."""
    config = dataclasses.replace(config, logdir=config.logdir / "resumed")
    process = train.CheckpointManager.process

    def die_first(self, score, epoch, checkpoint):
        if epoch == 2:
            time.sleep(1)  # wandb writes in a process of its own, ten times a second
            os.kill(os.getpid(), signal.SIGKILL)
        return process(self, score, epoch, checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.CheckpointManager, "process", die_first)
        assert run(config) == -signal.SIGKILL
    assert run(config, resume=True) == 0
    assert run(config, resume=True) == 0  # it had finished
    return config


def points_in(tracker: str, logdir: Path) -> Points:
    """Every point that a tracker holds of a run, by its own reader."""
    return {"wandb": wandb_points, "mlflow": mlflow_points}.get(tracker, tensorboard_points)(logdir, tracker)


def tensorboard_points(logdir: Path, tracker: str) -> Points:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(logdir / tracker)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def mlflow_points(logdir: Path, tracker: str) -> Points:
    client, found = mlflow_run(logdir)
    histories = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
    return {name: sorted((point.step, point.value) for point in history) for name, history in histories.items()}


def mlflow_run(logdir: Path, store: str = ""):
    """The client of a store, and the one run that it has of `logdir`."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store or f"sqlite:///{logdir.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(ROOT.name)
    [found] = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{logdir.name}'")
    return client, found


def wandb_points(logdir: Path, tracker: str) -> Points:
    points: Points = {}
    for kind, items in wandb_records(logdir):
        if kind == "history":
            step = items.pop("step")
            for name in [name for name in items if not name.startswith("_") and not isinstance(items[name], dict)]:
                points.setdefault(name, []).append((step, items[name]))
    return points


def wandb_records(logdir: Path) -> list[tuple[str, dict]]:
    """(kind, values) of each record in the offline files of a run, oldest first."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(logdir.glob("wandb/offline-run-*/*.wandb")):
        data = path.read_bytes()[7:]
        whole = b""
        for start in range(0, len(data) + 7, 32768):  # blocks, of which the first is 7 bytes shorter
            block = data[max(start - 7, 0) : start + 32768 - 7]
            while len(block) > 7:
                length, kind = struct.unpack("<HB", block[4:7])
                whole += block[7 : 7 + length]
                block = block[7 + length :]
                if kind in (1, 4):
                    record = wandb_internal_pb2.Record()
                    record.ParseFromString(whole)
                    whole = b""
                    found.append((record.WhichOneof("record_type"), wandb_items(record)))
    return found


def wandb_items(record) -> dict:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        return {"id": record.run.run_id} | {item.key: json.loads(item.value_json) for item in record.run.config.update}
    items = record.history.item if kind == "history" else record.summary.update if kind == "summary" else []
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def wanted_points(logdir: Path) -> Points:
    """The points of all epochs, from metrics.jsonl."""
    points: Points = {}
    before = {"first": 0, "second": 12}
    for line in map(json.loads, (logdir / "metrics.jsonl").read_text().splitlines()):
        step = before[line["stage"]] + line["step"]
        values = {f"{part}/{name}": value for part in ("train", "valid") for name, value in line[part].items()}
        for name, value in {**values, "lr": line["lr"]}.items():
            points.setdefault(f"{line['stage']}/{name}", []).append((step, pytest.approx(value, rel=1e-6)))
    return points


BOTH = pytest.mark.parametrize("kind", ["fresh", "resumed"])
EACH = pytest.mark.parametrize(
    "tracker",
    [pytest.param(name, marks=pytest.mark.skipif(name not in INSTALLED, reason="not installed")) for name in PACKAGES],
)


@pytest.mark.slow
@BOTH
@EACH
def test_a_tracker_holds_each_number_of_the_metrics_once_though_the_run_was_killed(tracker, kind, request):
    logdir = request.getfixturevalue(kind).logdir
    found = points_in(tracker, logdir)
    wanted = wanted_points(logdir)
    assert wanted["first/valid/accuracy"][2][0] == 12
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_has_each_point_once_in_each_tracker(config, monkeypatch):
    config = dataclasses.replace(config, logdir=config.logdir / "early", stages=(Stage("first", 1, 1e-2),))

    def die(*_):
        time.sleep(1)  # wandb writes in a process of its own, ten times a second
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(train, "valid_fn", die)
        assert run(config) == -signal.SIGKILL
    assert run(config, resume=True) == 0
    for tracker in INSTALLED:
        found = points_in(tracker, config.logdir)
        assert [step for step, _ in found["first/steps/loss"]] == [2], tracker
        assert {name: found[name] for name in wanted_points(config.logdir)} == wanted_points(config.logdir), tracker


@pytest.mark.slow
@BOTH
@EACH
def test_a_tracker_holds_loss_rate_gradient_norm_and_speed_within_an_epoch_once(tracker, kind, request):
    found = points_in(tracker, request.getfixturevalue(kind).logdir)
    for name in ("loss", "lr", "gradient_norm", "samples_per_second"):
        assert [step for step, _ in found[f"first/steps/{name}"]] == [2, 6, 10]
        assert [step for step, _ in found[f"second/steps/{name}"]] == [14]


@pytest.mark.slow
@pytest.mark.skipif("tensorboard" not in INSTALLED, reason="not installed")
@BOTH
@pytest.mark.parametrize("tracker", ["tensorboard", "tensorboardx"])
def test_tensorboard_holds_knobs_final_score_commit_and_pictures(tracker, kind, request):
    if tracker not in INSTALLED:
        pytest.skip("not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    logdir = request.getfixturevalue(kind).logdir
    found = EventAccumulator(str(logdir / tracker)).Reload()
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    knobs = metadata.parse_session_start_info_plugin_data(content).hparams
    assert (knobs["stages.0.lr"].number_value, knobs["batch_size"].number_value) == (0.01, 32)
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
def test_mlflow_holds_knobs_final_score_commit_and_pictures_in_one_run(kind, request):
    logdir = request.getfixturevalue(kind).logdir
    client, found = mlflow_run(logdir)
    record = json.loads((logdir / "run.json").read_text())
    assert (found.data.params["stages.0.lr"], found.data.params["batch_size"]) == ("0.01", "32")
    [score] = client.get_metric_history(found.info.run_id, "best/accuracy")
    assert (score.value, score.step) == (record["best"]["score"], 16)
    assert found.data.tags["best_checkpoint"].endswith("best.pth")
    assert found.data.tags["mlflow.source.git.commit"] == str(record["git_commit"])
    assert found.info.status == "FINISHED"
    pictures = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"samples_step_0.png", "confusion_step_16.png"} <= pictures


@pytest.mark.slow
@pytest.mark.skipif("wandb" not in INSTALLED, reason="not installed")
@BOTH
def test_wandb_holds_knobs_final_score_commit_and_pictures_in_one_run(kind, request):
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
    for picture in ("samples", "confusion"):
        assert sum(f"{picture}/_type" in items for items in rows) == 1


@pytest.mark.slow
@EACH
def test_a_tracker_that_is_added_when_a_run_goes_on_gets_the_epochs_that_it_missed(config, tracker):
    config = dataclasses.replace(config, logdir=config.logdir / f"late_{tracker}", stages=config.stages[:1])
    assert run(dataclasses.replace(config, tracker=("none",))) == 0
    two_stages = (*config.stages, Stage("second", 1, 1e-3))
    assert run(dataclasses.replace(config, tracker=(tracker,), stages=two_stages), resume=True) == 0
    found, wanted = points_in(tracker, config.logdir), wanted_points(config.logdir)
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("method", ["start", "log", "image", "finish"])
def test_a_tracker_whose_calls_fail_is_left_out_with_one_warning_and_changes_no_weight(
    config, monkeypatch, tmp_path, method
):
    class Failing:
        dashboard = ""

        def start(self, run):
            return -1

        def log(self, *_):
            return None

        image = finish = log

    def fail(*_):
        raise OSError(f"the server has gone{' far' * 100}\nfor good")

    config = dataclasses.replace(config, stages=config.stages[:1], logdir=tmp_path / "quiet", tracker=("none",))
    setattr(Failing, method, fail)
    monkeypatch.setattr(trackers, "_make_backend", lambda name: Failing())
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    assert run(config) == 0
    assert run(dataclasses.replace(config, logdir=tmp_path / "noisy", tracker=("tensorboard",))) == 0
    said = (tmp_path / "noisy/train.log").read_text()
    assert said.count("WARNING") == 1
    [warning] = re.findall(r"tensorboard failed \((.*)\) and is left out from here on; metrics.jsonl has", said)
    assert (warning[:23], warning[-2:], len(warning) <= 160) == ("the server has gone far", " …", True)
    quiet, noisy = (
        torch.load(tmp_path / name / "first/last.pth", weights_only=True)["model_state_dict"]
        for name in ("quiet", "noisy")
    )
    assert all(torch.equal(quiet[name], noisy[name]) for name in quiet)
    assert (tmp_path / "quiet/metrics.jsonl").read_bytes() == (tmp_path / "noisy/metrics.jsonl").read_bytes()


def test_a_tracker_that_does_not_finish_is_left_alone(config, monkeypatch, tmp_path):
    class Slow:
        dashboard = ""

        def start(self, run):
            return -1

        def log(self, *_):
            return None

        image = log

        def finish(self, *_):
            time.sleep(60)

    monkeypatch.setattr(trackers, "_make_backend", lambda name: Slow())
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    monkeypatch.setattr(trackers, "SECONDS_TO_FINISH", 0.1)
    assert run(dataclasses.replace(config, logdir=tmp_path / "run", tracker=("mlflow",))) == 0
    assert "mlflow has not finished after 0.1 s and is left alone." in (tmp_path / "run/train.log").read_text()


@pytest.mark.skipif("tensorboard" not in INSTALLED, reason="not installed")
def test_rank_0_alone_writes_to_a_tracker(config, tmp_path):
    config = dataclasses.replace(config, logdir=tmp_path / "run", tracker=("tensorboard",))
    run_ranks(2, lambda: train.main(config), join=False)
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1
    found = tensorboard_points(tmp_path / "run", "tensorboard")
    assert [step for step, _ in found["first/valid/accuracy"]] == [4, 8, 12]


@pytest.mark.slow
@pytest.mark.skipif("wandb" not in INSTALLED, reason="not installed")
def test_wandb_without_an_account_works_offline_and_says_so(config, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("UV", raising=False)  # of a test that uv runs
    monkeypatch.setenv("HOME", str(tmp_path))
    config = dataclasses.replace(config, logdir=tmp_path / "run", tracker=("wandb",))
    assert run(config) == 0
    said = (tmp_path / "run/train.log").read_text()
    assert "wandb works offline: it has no account here (wandb login)." in said
    assert f"look     wandb sync {tmp_path}/run/wandb/offline-run-*-" in said
    assert (
        wandb_points(tmp_path / "run", "wandb")["first/valid/accuracy"]
        == (wanted_points(tmp_path / "run")["first/valid/accuracy"])
    )


@pytest.fixture
def mlflow_server(tmp_path):
    """The address of a server of MLflow on this machine, and its process."""
    port = find_free_port()
    store = ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}", "--artifacts-destination", str(tmp_path)]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--port", str(port), "--workers", "1"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).read()
            break
        except OSError:
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}", server
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.mark.slow
@pytest.mark.skipif("mlflow" not in INSTALLED, reason="not installed")
def test_mlflow_writes_to_the_server_that_is_named_and_the_run_outlives_it(
    config, monkeypatch, tmp_path, mlflow_server
):
    address, server = mlflow_server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = dataclasses.replace(config, tracker=("mlflow",))
    whole = dataclasses.replace(config, logdir=tmp_path / "whole")
    assert run(whole) == 0
    client, found = mlflow_run(whole.logdir, address)
    points = client.get_metric_history(found.info.run_id, "first/valid/accuracy")
    assert [(point.step, point.value) for point in points] == wanted_points(whole.logdir)["first/valid/accuracy"]
    assert "samples_step_0.png" in [file.path for file in client.list_artifacts(found.info.run_id)]

    process = train.CheckpointManager.process

    def end_server(self, score, epoch, checkpoint):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        return process(self, score, epoch, checkpoint)

    monkeypatch.setattr(train.CheckpointManager, "process", end_server)
    assert run(dataclasses.replace(config, logdir=tmp_path / "alone")) == 0
    assert (tmp_path / "alone/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert (tmp_path / "alone/train.log").read_text().count("mlflow failed (") == 1


@pytest.mark.parametrize(
    "names", [(), ("none", "tensorboard"), ("tensorboard", "tensorboard")], ids=["none", "beside", "twice"]
)
def test_trackers_that_cannot_be_meant_are_refused(names):
    with pytest.raises(UserError, match=r"must be none, or one or more trackers, each once\."):
        check_trackers(names)


@pytest.mark.parametrize(("tracker", "package"), PACKAGES.items())
def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    config, monkeypatch, tmp_path, tracker, package
):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    flags = ["--logdir", str(tmp_path / "run"), "--tracker", tracker, "--device", "cpu"]
    end = run_train(train.main, Config, *flags, "--data-dir", str(config.data_dir))
    assert end.code == 2
    assert end.err == f"error: --tracker {tracker} needs the package {package}: uv add {package}, or --tracker none.\n"
    assert not (tmp_path / "run").exists()
