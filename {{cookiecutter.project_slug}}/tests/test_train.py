"""train.py: complete runs, the run directory, and invalid options."""

import csv
import dataclasses
import gc
import hashlib
import json
import logging
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flags import override
from marks import CLASSES_ONLY
from models import CHANNELS, tiny_network
from processes import End, run_ranks, run_train
from small_data import make_data
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.functional import to_pil_image

import train
from batteries.core import command_line
from batteries.core.command_line import parse
from batteries.core.config_io import from_json, to_json
from batteries.core.errors import UserError
from batteries.core.files import DirectoryLock
from batteries.core.signals import SIGNALS, SignalHandler
from batteries.data.dataset import Dataset
from batteries.distributed.unwrap import unwrap_model
from batteries.tracking.manager import default_trackers
from batteries.training.metrics import MeanMetrics
from batteries.training.setup import preserved_settings
from batteries.training.wrap import wrap_model
from experiment.augmentations import valid_transform
from experiment.dataset import load_dataset
from train import Config, Stage


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def start(monkeypatch, data_dir, tmp_path):
    """Return a function that runs train.py with a tiny network and the given flags."""
    monkeypatch.setattr(train, "build_model", tiny_network)
    quick = ["--tracker", "none", "--device", "cpu", "--data-dir", str(data_dir), "--limit-batches", "3"]
    quick += ["--stages.0.epochs", "2", "--stages.1.epochs", "1", "--split-file", str(tmp_path / "splits/default.csv")]

    def run(*flags: str) -> End:
        return run_train(train.main, Config, *override(quick, flags))

    return run


def read_metrics(logdir) -> list[dict]:
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


def test_run_directory_has_the_documented_files(start, tmp_path):
    logdir = tmp_path / "run"
    assert start("--logdir", str(logdir), "--save-n-best", "1").code == 0
    found = {str(path.relative_to(logdir)) for path in logdir.rglob("*")} - {"git.diff"}
    stage1 = {"stage1", "stage1/epoch_1.pth", "stage1/best.pth", "stage1/last.pth", "stage1/checkpoints.json"}
    assert {"config.json", "run.json", "metrics.jsonl", "timings.jsonl", "train.log"} | stage1 <= found
    assert {"stage0/best.pth", "stage0/last.pth", "stage0/epoch_2.pth"} <= found
    epochs = [(line["stage"], line["epoch"], line["step"]) for line in read_metrics(logdir)]
    assert epochs == [("stage0", 1, 3), ("stage0", 2, 6), ("stage1", 1, 3)]
    record = json.loads((logdir / "run.json").read_text())
    assert (record["exit"], record["world_size"], record["device"]) == ("finished", 1, "cpu")
    assert record["versions"]["torch"] == torch.__version__
    assert "\x1b" not in (logdir / "train.log").read_text()


@CLASSES_ONLY
def test_main_returns_the_best_score_of_the_run(monkeypatch, data_dir, tmp_path):
    monkeypatch.setattr(train, "build_model", tiny_network)
    config = Config(
        data_dir=data_dir,
        split_file=tmp_path / "splits.csv",
        logdir=tmp_path / "run",
        tracker=("none",),
        device="cpu",
        limit_batches=3,
    )
    [best] = run_ranks(1, lambda: train.main(config), join=False)
    assert best == max(line["valid"]["accuracy"] for line in read_metrics(tmp_path / "run"))


@CLASSES_ONLY
def test_second_stage_starts_from_the_best_weights_of_the_first(monkeypatch, data_dir, tmp_path):
    monkeypatch.setattr(train, "build_model", tiny_network)
    scores = iter([0.9, 0.1, 0.5])  # epoch 1 of the first stage is its best
    monkeypatch.setattr(train, "valid_fn", lambda *_: {"accuracy": next(scores), "loss": 1.0})
    started = []

    def note_weights(state, *_):
        started.append({name: value.clone() for name, value in unwrap_model(state.model).state_dict().items()})
        torch.nn.init.normal_(next(state.model.parameters()))
        return {"loss": 1.0, "accuracy": 0.5}

    monkeypatch.setattr(train, "train_fn", note_weights)
    monkeypatch.setattr("batteries.run.stage.StageRun.log_epoch", lambda *_, **__: None)
    stages = Stage("stage0", 2, 0.1), Stage("stage1", 1, 0.1)
    config = Config(
        stages=stages,
        data_dir=data_dir,
        split_file=tmp_path / "splits.csv",
        logdir=tmp_path / "run",
        tracker=("none",),
        device="cpu",
    )

    def weights() -> list[bool]:
        train.main(config)
        best = torch.load(tmp_path / "run/stage0/best.pth", weights_only=True)
        assert best["epoch"] == 1
        return [torch.equal(started[2][name], value) for name, value in best["model_state_dict"].items()]

    [equal] = run_ranks(1, weights, join=False)
    assert all(equal)


def test_init_from_starts_a_run_with_the_weights_of_a_checkpoint(start, monkeypatch, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert start("--logdir", str(first)).code == 0
    monkeypatch.setattr(train, "train_fn", lambda *_: {"accuracy": 0.5, "loss": 1.0})  # does not change the weights
    monkeypatch.setattr("batteries.run.stage.StageRun.log_epoch", lambda *_, **__: None)
    best = first / "stage1/best.pth"
    end = start("--logdir", str(second), "--init-from", str(best))
    assert end.code == 0, end.err
    assert f"weights  {best}" in end.out
    initial = torch.load(best, weights_only=True)["model_state_dict"]
    copied = torch.load(second / "stage0/last.pth", weights_only=True)["model_state_dict"]
    assert all(torch.equal(copied[name], initial[name]) for name in initial)


def test_missing_init_from_file_is_rejected_before_anything_is_written(start, tmp_path):
    end = start("--logdir", str(tmp_path / "run"), "--init-from", "nowhere.pth")
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert "nowhere.pth does not exist" in end.err
    assert not (tmp_path / "run").exists()


def test_equal_configs_give_equal_metrics_and_other_seeds_differ(start, tmp_path):
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    assert start("--logdir", str(first), "--num-workers", "0").code == 0
    assert start("--config", str(first / "config.json"), "--logdir", str(again), "--num-workers", "2").code == 0
    assert start("--logdir", str(other), "--seed", "1").code == 0
    assert (first / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()
    assert (first / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes()


def test_runs_in_threads_equal_runs_in_the_main_thread(monkeypatch, data_dir, tmp_path):
    monkeypatch.setattr(train, "build_model", tiny_network)

    def run(name: str) -> float:
        split_file = tmp_path / "split.csv"
        stages = (Stage("stage0", epochs=2, lr=0.1),)
        config = Config(stages, data_dir=data_dir, split_file=split_file, device="cpu", logdir=tmp_path / name)
        return train.main(dataclasses.replace(config, limit_batches=3, tracker=("none",)))

    handlers = [signal.getsignal(number) for number in SIGNALS]
    streams = sys.stdout, sys.stderr
    with preserved_settings():
        expected = run("main")
        with ThreadPoolExecutor(2) as pool:  # two runs at the same time
            assert list(pool.map(run, ("first", "second"))) == [expected, expected]
    assert (sys.stdout, sys.stderr) == streams
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    for name in ("first", "second"):
        assert read_metrics(tmp_path / name) == read_metrics(tmp_path / "main")


def test_run_that_cannot_begin_restores_stdout_and_releases_the_lock(monkeypatch, data_dir, tmp_path):
    def fail(*arguments):
        raise ValueError("no handlers")

    monkeypatch.setattr(train, "build_model", tiny_network)
    monkeypatch.setattr(SignalHandler, "__enter__", fail)
    released = []
    monkeypatch.setattr(DirectoryLock, "release", lambda lock: released.append(lock))
    config = Config(data_dir=data_dir, split_file=tmp_path / "split.csv", logdir=tmp_path / "run", tracker=("none",))
    streams = sys.stdout, sys.stderr
    with preserved_settings(), pytest.raises(ValueError, match="no handlers"):
        train.main(dataclasses.replace(config, device="cpu"))
    assert (sys.stdout, sys.stderr) == streams
    assert logging.getLogger("batteries").handlers == []
    assert len(released) == 1


@CLASSES_ONLY
@pytest.mark.parametrize("mixing", [[], ["--mixup", "0.4", "--cutmix", "1"]])
def test_two_ranks_give_the_metrics_of_one(start, monkeypatch, data_dir, tmp_path, mixing):
    one, two = tmp_path / "one", tmp_path / "two"
    assert start("--logdir", str(one), *mixing).code == 0
    config = from_json(Config, json.loads((one / "config.json").read_text()))
    run_ranks(2, lambda: train.main(dataclasses.replace(config, logdir=two)), join=False)
    for actual, expected in zip(read_metrics(two), read_metrics(one), strict=True):
        assert actual["valid"]["accuracy"] == expected["valid"]["accuracy"]
        assert actual["train"]["loss"] == pytest.approx(expected["train"]["loss"], rel=1e-6)


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch norm with a ReLU that calls F.batch_norm itself, as in timm."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        state = self.running_mean, self.running_var, self.weight, self.bias
        return nn.functional.batch_norm(images, *state, self.training, self.momentum, self.eps).relu()


def activated_network(num_classes: int) -> nn.Module:
    layers = [nn.Conv2d(CHANNELS, 8, 3, 2, bias=False), BatchNormAct2d(8), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, num_classes))


@CLASSES_ONLY
def test_two_ranks_give_the_metrics_of_one_with_a_subclass_of_batchnorm(start, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "build_model", activated_network)
    one, two = tmp_path / "one", tmp_path / "two"
    assert start("--logdir", str(one)).code == 0
    config = from_json(Config, json.loads((one / "config.json").read_text()))
    run_ranks(2, lambda: train.main(dataclasses.replace(config, logdir=two)), join=False)
    for actual, expected in zip(read_metrics(two), read_metrics(one), strict=True):
        assert actual["train"]["loss"] == pytest.approx(expected["train"]["loss"], rel=1e-5)
        assert actual["valid"]["loss"] == pytest.approx(expected["valid"]["loss"], rel=1e-5)
    weights = torch.load(two / "stage1/last.pth", weights_only=True)["model_state_dict"]
    activated_network(len(weights["4.bias"])).load_state_dict(weights)  # as predict.py does


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_deprecated_call_in_a_run_fails_in_the_tests(start, monkeypatch, tmp_path, category):
    def load_dataset(directory):
        code = compile("warnings.warn('it is deprecated', category)", "dataset.py", "exec")
        exec(code, {"__name__": "experiment.dataset", "warnings": warnings, "category": category})

    monkeypatch.setattr(train, "load_dataset", load_dataset)
    end = start("--logdir", str(tmp_path / "run"))
    assert end.code == 1
    assert f"{category.__name__}: it is deprecated" in end.err


def test_process_group_outlives_the_reducers_of_the_model(monkeypatch, data_dir, tmp_path):
    destroy = torch.distributed.destroy_process_group
    alive = []

    def destroy_group() -> None:
        alive.append([type(value) for value in gc.get_objects() if isinstance(value, DistributedDataParallel)])
        destroy()

    def wrap_in_a_cycle(*arguments, **options) -> nn.Module:
        wrapped = wrap_model(*arguments, **options)
        wrapped.cycle = [wrapped]  # only the garbage collector frees it
        return wrapped

    monkeypatch.setattr(torch.distributed, "destroy_process_group", destroy_group)
    monkeypatch.setattr(train, "wrap_model", wrap_in_a_cycle)
    monkeypatch.setattr(train, "build_model", tiny_network)
    config = Config(data_dir=data_dir, split_file=tmp_path / "split.csv", logdir=tmp_path / "run", tracker=("none",))

    def run() -> list:
        gc.disable()
        train.main(dataclasses.replace(config, device="cpu", limit_batches=2))
        return alive

    assert run_ranks(2, run, join=False) == [[[]], [[]]]


def test_config_json_round_trip():
    config = Config(stages=(Stage("a", 1, 0.1),), fold=3)
    assert from_json(Config, json.loads(json.dumps(to_json(config)))) == config


def test_home_directory_is_expanded_in_every_path_option(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text('{"data_dir": "~/data", "pretrained": "~/old.pth"}')
    config = parse(Config, ["--config=~/config.json", "--logdir=~/runs/x", "--split-file", "~/split.csv"])
    assert config.data_dir == tmp_path / "data"
    assert config.pretrained == str(tmp_path / "old.pth")
    assert config.logdir == tmp_path / "runs/x"
    assert config.split_file == tmp_path / "split.csv"
    assert parse(Config, ["--pretrained=~/new.pth"]).pretrained == str(tmp_path / "new.pth")
    assert parse(Config, ["--logdir=a~/b"]).logdir == Path("a~/b")


def test_flags_take_precedence_over_a_config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(Config(seed=5, fold=2, stages=(Stage("only", 9, 0.1),)))))
    config = parse(Config, ["--config", str(path), "--seed", "6", "--stages.0.epochs", "4"])
    assert (config.seed, config.fold, config.stages) == (6, 2, (Stage("only", 4, 0.1),))


@CLASSES_ONLY
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bach-size", "3"], "unknown option --bach-size; did you mean '--batch-size'? See python train.py --help."),
        (["--hlep"], "unknown option --hlep; did you mean '--help'? See python train.py --help."),
        (["--no-determinstic"], "unknown option --no-determinstic; did you mean '--no-deterministic'?"),
        (["--stages.0.lrs", "1"], "unknown option --stages.0.lrs; did you mean '--stages.0.lr'?"),
        (
            ["--stages.2.lr", "1"],
            "--stages.2.lr does not exist: --stages has 2 items, from 0; add one in train.py, or in the file of --con",
        ),
        (
            ["--deterministic", "False"],
            "unknown word False; an option that is on or off takes no value: give --flag or",
        ),
        (["--seed"], "--seed needs a value. See python train.py --help."),
        (
            ["--tracker", "tensorbord"],
            "--tracker tensorbord is not a valid choice; did you mean 'tensorboard'? Use one of: ",
        ),
        (["--batch-size", "many"], "--batch-size many must be an integer. See python train.py --help."),
        (["--seed", "1.5"], "--seed 1.5 must be an integer."),
        (["--stages.0.lr", "1e-3,1e-4"], "--stages.0.lr 1e-3,1e-4 must be a number."),
        (["logs/baseline"], "unknown command or option logs/baseline; a value must follow its option."),
        (["resume"], "unknown command or option resume; did you mean '--resume'?"),
        (["--stages.0.freeze", "layer1"], "--stages.0.freeze 'layer1' is not a module of the model; it has 0, 1."),
        (
            ["--batch-size", "33", "--accumulation-steps", "2"],
            "--batch-size 33 must be a multiple of 2 (1 process x 2 ",
        ),
        (["--batch-size", "1000000"], "--batch-size 1000000 is larger than the train split, which has "),
        (["--fold", "9"], "--fold 9 does not exist; SPLIT_FILE has the folds 0 to 4."),
        (["--device", "cuda:7"], "--device cuda:7 needs GPU 7, but this machine has "),
        (["--device", "gpu"], "--device gpu is not a device; use one of: auto, cpu"),
        (["--seed", "-1"], "--seed -1 must be 0 to 4294967295."),
        (["--stages.0.epochs", "0"], "--stages.0.epochs 0 must be 1 or more."),
        (["--stages.1.lr", "nan"], "--stages.1.lr nan must be finite and greater than 0."),
        (["--stages.1.lr", "inf"], "--stages.1.lr inf must be finite and greater than 0."),
        (["--stages.1.name", "../x"], "--stages.1.name '../x' must be a directory name with the characters"),
        (["--stages.1.name", ".."], "--stages.1.name '..' must be a directory name with the characters"),
        (["--stages.1.name", ""], "--stages.1.name '' must be a directory name with the characters"),
        (["--stages.1.name", "train.log"], "--stages.1.name 'train.log' must be a directory name with the characters"),
        (["--stages.1.name", "stage0"], "--stages has two stages named stage0; give each stage a different name."),
        (["--main-metric", "loss"], "--main-metric loss: lower is better. Add --minimize-metric."),
        (["--minimize-metric"], "--main-metric accuracy: higher is better. Use --no-minimize-metric."),
        (["--min-delta", "0.1"], "--min-delta 0.1 has no effect without --patience; give both."),
        (["--weight-decay", "-1"], "--weight-decay -1.0 must be 0 or more."),
        (["--mixup", "-1"], "--mixup -1.0 must be 0 or more."),
        (
            ["--accumulation-steps", "32"],
            "--batch-size results in micro-batches of one sample, and batch norm needs two",
        ),
        (["--logdir", ""], "--logdir . is this repository; use a separate directory"),
        (["--save-n-best", "0"], "--save-n-best 0 must be 1 or more."),
        (["--limit-batches", "0"], "--limit-batches 0 must be 1 or more."),
        (["--valid-batch-size", "0"], "--valid-batch-size 0 must be 1 or more."),
        (["--num-workers", "-1"], "--num-workers -1 must be 0 or more."),
        (["--config", "nowhere.json"], "--config nowhere.json cannot be read"),
        (["--config"], "--config needs a file"),
        (["--config", "--resume"], "--config needs a file"),
        (["--logdir", "train.py"], "--logdir train.py cannot be a directory: train.py is a file"),
        (
            ["--main-metric", "acuracy"],
            "--main-metric acuracy is not a known metric; did you mean 'accuracy'? Use one of: ",
        ),
        (
            ["--main-metric", "f1"],
            "--main-metric f1 is not a known metric. Use one of: loss, accuracy, balanced_accuracy, macro_f1",
        ),
        (["--scores", "f1_macro"], "--scores f1_macro is not a known metric; did you mean 'macro_f1'? Use one of: "),
        (["--stages.0.schedule", "cosin"], "--stages.0.schedule cosin is not a valid choice; did you mean 'cosine'?"),
        (["--stages.0.freeze", "0.wieght"], "--stages.0.freeze '0.wieght' is not a module of the model"),
        (["--stages.0.freeze", "0", "1"], "--stages.0.freeze 0 1 leaves no trainable parameter."),
        (["--patience", "0"], "--patience 0 must be 1 or more."),
        (["--ema-decay", "1"], "--ema-decay 1.0 must be 0 or more and less than 1."),
        (["--clip-norm", "0"], "--clip-norm 0.0 must be greater than 0."),
        (
            ["--stages.1.schedule", "cosine", "--stages.1.warmup-epochs", "3"],
            "--stages.1.warmup-epochs 3 is not shorter than the stage, which has 1 epoch; use less.",
        ),
        (["--stages.0.start", "last"], "--stages.0.start last has no stage before it to start from; leave it out."),
        (
            ["--stages.0.schedule", "multi-step", "--stages.0.epochs", "6", "--stages.0.warmup-epochs", "5"],
            "--stages.0.warmup-epochs 5 exceeds the 3 epochs before the first drop of multi-step; use less.",
        ),
        (
            ["--stages.0.warmup-epochs", "1"],
            "--stages.0.warmup-epochs 1 has no effect with --stages.0.schedule one-cycle",
        ),
        (["--precision", "fp8"], "--precision fp8 is not a valid choice"),
        (
            ["--init-from", "a", "--pretrained", "b"],
            "--init-from and --pretrained both set the initial weights; give one of them.",
        ),
        (["--data-parallel", "--compile"], "--compile and --data-parallel exclude each other"),
    ],
)
def test_invalid_options_are_rejected_without_side_effects(start, monkeypatch, tmp_path, flags, message):
    monkeypatch.setattr(train, "build_model", lambda num_classes: nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.Flatten()))
    logdir = tmp_path / "run"
    end = start(*override(["--logdir", str(logdir)], flags))
    assert end.code == 2
    assert end.err.startswith("error: ")
    assert message.replace("SPLIT_FILE", str(tmp_path / "splits/default.csv")) in end.err
    assert end.err.count("\n") == 1
    assert end.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"batch_size": "32"}', "batch_size is '32', and must be int."),
        ('{"batch_size": null}', "batch_size is None, and must be int."),
        ('{"seed": true}', "seed is True, and must be int."),
        ('{"deterministic": "no"}', "deterministic is 'no', and must be bool."),
        ('{"weight_decay": "0.1"}', "weight_decay is '0.1', and must be float."),
        ('{"logdir": null}', "logdir is None, and must be Path."),
        ('{"stages": []}', "--stages is empty; a run needs one stage or more."),
        ('{"stages": ["a"]}', 'stages must be an object with "name", "epochs", "lr" and so on, not'),
        ('{"stages": {"name": "a"}}', "stages is {'name': 'a'}, and must be tuple"),
        ('{"stages": [{"name": "a", "epochs": 1.5, "lr": 1}]}', "stages: epochs is 1.5, and must be int."),
        ('{"stages": [{"name": "a"}]}', "does not make a Stage"),
        ("[1]", 'must be an object with "stages", "batch_size", "accumulation_steps" and so on, not [1].'),
        ("{", "cannot be read"),
    ],
)
def test_config_file_with_a_value_of_the_wrong_type_is_rejected(start, tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    end = run_train(train.main, Config, "--config", str(tmp_path / "config.json"), "--logdir", str(tmp_path / "run"))
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert message in end.err
    assert not (tmp_path / "run").exists()


def test_logdir_that_has_only_checkpoints_is_rejected(start, tmp_path):
    (tmp_path / "run/stage0").mkdir(parents=True)
    (tmp_path / "run/stage0/best.pth").write_text("precious")
    assert "already holds a run" in start("--logdir", str(tmp_path / "run")).err
    assert (tmp_path / "run/stage0/best.pth").read_text() == "precious"


def test_incomplete_torchrun_environment_is_ignored(start, monkeypatch, tmp_path):
    assert start("--logdir", str(tmp_path / "plain")).code == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert start("--logdir", str(tmp_path / "stray")).code == 0
    assert (tmp_path / "plain/metrics.jsonl").read_bytes() == (tmp_path / "stray/metrics.jsonl").read_bytes()


def test_metric_of_invalid_shape_is_rejected(cpu):
    with pytest.raises(ValueError, match=r"metric accuracy has shape \(5, 8\) for 8 samples"):
        MeanMetrics().update(8, accuracy=torch.ones(5, 8))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Stage)])
def test_option_without_its_stage_suggests_that_of_each_stage(name, tmp_path):
    flag = name.replace("_", "-")
    for words in ([f"--{flag}", "1"], [f"--{flag}=1"], [f"--{name}", "1"], [f"--stages.{flag}", "1"]):
        with pytest.raises(UserError) as raised:
            parse(Config, words)
        expected = f"did you mean '--stages.0.{flag}' or '--stages.1.{flag}'? See python "
        assert f"unknown option {words[0].partition('=')[0]}; {expected}" in str(raised.value)
    (tmp_path / "one.json").write_text('{"stages": [{"name": "a", "epochs": 1, "lr": 0.1}]}')
    with pytest.raises(UserError, match=rf"unknown option --{flag}; did you mean '--stages\.0\.{flag}'\?"):
        parse(Config, ["--config", str(tmp_path / "one.json"), f"--{flag}", "1"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "1", "--seed", "2"], "--seed is given twice; give it once, with all its values."),
        (["--seed=1", "--seed", "1"], "--seed is given twice"),
        (["--batch-size", "8", "--batch_size=8"], "--batch_size is given twice"),
        (["--scores", "roc_auc", "--scores", "macro_f1"], "--scores is given twice; give it once, with all its values"),
        (["--stages.0.lr", "1", "--stages.1.lr", "1", "--stages.0.lr", "2"], "--stages.0.lr is given twice"),
        (["--config", "a.json", "--seed", "1", "--config=b.json"], "--config is given twice"),
        (["--resume", "--resume"], "--resume is given twice"),
        (["--resume", "--no-resume"], "--resume and --no-resume are both given; give one of them."),
        (["--no-tf32", "--seed", "1", "--tf32"], "--no-tf32 and --tf32 are both given; give one of them."),
    ],
)
def test_option_that_is_given_twice_is_rejected(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(Config, flags)


@CLASSES_ONLY
def test_options_with_the_same_last_part_or_prefix_are_not_repeats():
    flags = ["--stages.0.lr", "1", "--stages.1.lr", "2", "--batch-size", "8", "--valid-batch-size", "8"]
    config = parse(Config, [*flags, "--scores", "roc_auc", "macro_f1", "--stages.0.freeze", "a", "b"])
    assert [stage.lr for stage in config.stages] == [1, 2]
    assert (config.scores, config.stages[0].freeze) == (("roc_auc", "macro_f1"), ("a", "b"))


def make_project(directory: Path) -> Path:
    """Make the files by which the command line recognises a project."""
    for name in ("train.py", "tools/predict.py", "batteries/core/project.py"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    return directory


def test_scripts_of_another_project_are_rejected(monkeypatch, tmp_path):
    installed, other = make_project(tmp_path / "installed"), make_project(tmp_path / "other")
    (tmp_path / "link").symlink_to(other)
    monkeypatch.setattr(command_line, "ROOT", installed)
    for script, module in (("train.py", "train"), ("tools/predict.py", "tools.predict")):
        for directory in (other, tmp_path / "link"):
            with pytest.raises(UserError, match=rf"start it in {other} with python -m {module}\.$"):
                command_line.check_installed_project(str(directory / script))


def test_scripts_of_the_installed_project_are_accepted(monkeypatch, tmp_path):
    project = make_project(tmp_path / "batteries")  # a project may have the name of the package
    (tmp_path / "link").symlink_to(project)
    (tmp_path / "train.py").symlink_to(project / "train.py")
    (tmp_path / "start.py").touch()
    paths = [tmp_path / "train.py", tmp_path / "start.py"]
    paths += [root / name for root in (project, tmp_path / "link") for name in ("train.py", "tools/predict.py")]
    for root in (project, tmp_path / "link"):
        monkeypatch.setattr(command_line, "ROOT", root)
        for path in paths:
            command_line.check_installed_project(str(path))
        monkeypatch.chdir(root)
        for program in ("train.py", "tools/predict.py", "-c", ""):
            command_line.check_installed_project(program)


def test_config_file_with_an_unknown_option_suggests_the_closest(start, tmp_path):
    (tmp_path / "config.json").write_text('{"batchsize": 3}')
    end = start("--config", str(tmp_path / "config.json"))
    assert end.code == 2
    assert "has an unknown option 'batchsize'; did you mean 'batch_size'?" in end.err


def test_logdir_that_holds_a_run_is_rejected_and_unchanged(start, tmp_path):
    logdir = tmp_path / "run"
    assert start("--logdir", str(logdir)).code == 0
    before = {path: path.read_bytes() for path in logdir.rglob("*") if path.is_file()}
    end = start("--logdir", str(logdir))
    assert end.code == 2
    assert end.err == (
        f"error: --logdir {logdir} already holds a run; resume it with --resume, or choose another directory, "
        f"such as --logdir {logdir}_2.\n"
    )
    assert {path: path.read_bytes() for path in logdir.rglob("*") if path.is_file()} == before


@CLASSES_ONLY
def test_data_set_with_too_few_samples_of_a_class_is_rejected(start, monkeypatch, tmp_path):
    load_dataset = train.load_dataset

    def load_thinned(data_dir):
        dataset = load_dataset(data_dir)
        targets = np.asarray(dataset.targets)
        targets[np.flatnonzero(targets == 3)[2:]] = 4
        return dataset

    monkeypatch.setattr(train, "load_dataset", load_thinned)
    end = start("--logdir", str(tmp_path / "run"))
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert "has 2 samples" in end.err
    assert not (tmp_path / "run").exists()


@CLASSES_ONLY
def test_split_file_is_written_once_and_its_sha256_recorded(start, tmp_path):
    path = tmp_path / "splits/default.csv"
    for name in ("one", "two"):
        assert start("--logdir", str(tmp_path / name), "--fold", "1").code == 0
        split = json.loads((tmp_path / name / "run.json").read_text())["split"]
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        made_with = split.pop("made_with")
        assert split == {"file": str(path), "sha256": sha256, "folds": 5}
        assert (made_with is not None) == (name == "one")
        assert ("INFO classes  " in (tmp_path / name / "train.log").read_text()) == (name == "one")
    assert path.read_text().startswith("id,target,fold")
    assert start("--logdir", str(tmp_path / "one"), "--fold", "1", "--resume").code == 0
    record = json.loads((tmp_path / "one/run.json").read_text())
    assert record["split"]["made_with"] == {name: version(name) for name in ("scikit-learn", "numpy")}


def test_training_reads_no_sample_of_the_test_split(start, monkeypatch, tmp_path):
    read = tmp_path / "read.txt"
    load_dataset = train.load_dataset

    def load_noted(data_dir):
        dataset = load_dataset(data_dir)
        get_one, get_batch = type(dataset).__getitem__, getattr(dataset, "get_batch", None)

        def note(indices) -> None:
            with read.open("a") as file:
                file.write("".join(f"{dataset.ids[index]}\n" for index in np.atleast_1d(indices)))

        class Noted(type(dataset)):
            def __getitem__(self, index):
                note(index)
                return get_one(self, index)

        dataset.__class__ = Noted
        if get_batch is not None:

            def note_batch(indices):
                note(indices)
                return get_batch(indices)

            dataset.get_batch = note_batch
        return dataset

    monkeypatch.setattr(train, "load_dataset", load_noted)
    end = start("--logdir", str(tmp_path / "run"), "--tracker", *default_trackers(), "--limit-batches", "1000")
    assert end.code == 0, end.err
    with (tmp_path / "splits/default.csv").open(newline="") as file:
        rows = {row["id"]: row["fold"] for row in csv.DictReader(file)}
    seen = set(read.read_text().splitlines())
    assert {rows[name] for name in seen} == {"0", "1", "2", "3", "4"}
    assert "-1" in rows.values()


def test_bug_keeps_its_traceback_and_is_recorded(start, monkeypatch, tmp_path):
    def broken(*_):
        return int("x")

    monkeypatch.setattr(train, "train_fn", broken)
    end = start("--logdir", str(tmp_path / "run"))
    assert end.code == 1
    assert "Traceback" in end.err
    assert "invalid literal for int()" in json.loads((tmp_path / "run/run.json").read_text())["exit"]
    assert "invalid literal for int()" in (tmp_path / "run/train.log").read_text()


class WrongData:
    """The data of the project with a change of each sample."""

    def __init__(self, dataset: Dataset, change: Callable) -> None:
        self.dataset = dataset
        self.change = change

    def __getattr__(self, name: str) -> Any:
        if name in ("dataset", "get_batch", "check"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.change(*self.dataset[index])


def normalize(images: torch.Tensor) -> torch.Tensor:
    return images.float().mul_(torch.ones(5, 1, 1))


MODEL = "what build_model in experiment/model.py returns"
LOSS = "what build_criterion in experiment/task.py returns"


@CLASSES_ONLY
@pytest.mark.parametrize(
    ("name", "make", "came", "expected"),
    [
        ("load_dataset", lambda image, target: (to_pil_image(image), target), "returned a PIL Image as image", "; ret"),
        ("load_dataset", lambda image, target: (image, int(target) + 1), "returned target 10 for sample ", "0 to 9."),
        (
            "load_dataset",
            lambda image, target: (image, torch.tensor(int(target), dtype=torch.int32)),
            f"{LOSS} fails on (32, 10) float32, (32,) int32 from 0 to 9: expected target dtype to be Long",
            "; __getitem__ in experiment/dataset.py must return class targets as int or torch.int64.",
        ),
        (
            "build_model",
            lambda num_classes: tiny_network(num_classes - 3),
            f"{LOSS} fails on (32, 7) float32, (32,) int64 from 0 to 9: Target ",
            "; build_model in experiment/model.py must return one output for each class, and __getitem__ in "
            "experiment/dataset.py targets from 0.",
        ),
        (
            "build_criterion",
            lambda *_: nn.functional.mse_loss,
            f"{LOSS} fails on (32, 10) float32, (32,) int64 from 0 to 9: The size of tensor a (10) must match",
            "must have the shapes that the loss takes.",
        ),
        (
            "normalize",
            normalize,
            f"normalize in tests/test_train.py fails on (32, {CHANNELS}, ",
            "MEAN and STD in experiment/augmentations.py need one value for each channel of the images.",
        ),
        (
            "build_model",
            lambda num_classes: nn.Sequential(nn.Conv2d(7, 2, 1), tiny_network(num_classes)),
            f"{MODEL} fails on (32, {CHANNELS}, ",
            "to have 7 channels, but got ",
        ),
        (
            "build_model",
            lambda num_classes: tiny_network(num_classes).double(),
            f"{MODEL} fails on (32, {CHANNELS}, ",
            "experiment/augmentations.py must return float32.",
        ),
    ],
)
def test_code_mistakes_are_one_line_and_the_traceback_is_in_train_log(
    start, monkeypatch, data_dir, tmp_path, name, make, came, expected
):
    monkeypatch.setattr(train, "train_transform", valid_transform)  # no augmentation that needs a tensor
    if name == "load_dataset":
        monkeypatch.setattr(train, name, lambda _: WrongData(load_dataset(data_dir), make))
    else:
        monkeypatch.setattr(train.task if name == "build_criterion" else train, name, make)
    end = start("--logdir", str(tmp_path / "run"), "--limit-batches", "30")
    assert end.code in (1, 2)
    assert end.err.count("\n") == 1, end.err
    assert end.err.startswith("error: ")
    assert came in end.err
    assert expected in end.err
    if " fails on " in came:
        assert "Traceback" in (tmp_path / "run/train.log").read_text()


@CLASSES_ONLY
@pytest.mark.parametrize("accuracy", [math.nan, 0.9])  # NaN outputs can have a finite accuracy
def test_non_finite_loss_is_null_in_metrics_jsonl_and_never_best(start, monkeypatch, tmp_path, accuracy):
    monkeypatch.setattr(train, "valid_fn", lambda *_: {"accuracy": accuracy, "loss": math.nan})
    assert start("--logdir", str(tmp_path / "run")).code == 0
    known = None if math.isnan(accuracy) else accuracy
    assert read_metrics(tmp_path / "run")[0]["valid"] == {"accuracy": known, "loss": None}
    assert not (tmp_path / "run/stage0/best.pth").exists()


def test_local_rank_zero_loads_the_data_before_other_ranks(monkeypatch, data_dir, tmp_path):
    monkeypatch.setattr(train, "build_model", tiny_network)
    load_dataset = train.load_dataset
    loaded = tmp_path / "loaded"

    def load_noted(folder):
        assert loaded.exists() == (os.environ["LOCAL_RANK"] != "0")
        dataset = load_dataset(folder)
        loaded.touch()
        return dataset

    monkeypatch.setattr(train, "load_dataset", load_noted)
    config = Config(
        data_dir=data_dir,
        split_file=tmp_path / "splits.csv",
        logdir=tmp_path / "run",
        tracker=("none",),
        device="cpu",
        limit_batches=1,
    )
    assert len(run_ranks(2, lambda: train.main(config), join=False)) == 2
