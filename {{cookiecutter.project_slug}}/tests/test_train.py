"""A whole run, its folder, and what bad input is told."""

import csv
import dataclasses
import hashlib
import json
import math
import os

import numpy as np
import pytest
import torch
from models import tiny_network
from processes import End, run_ranks, run_train
from small_data import make_data
from torch import nn

import train
from batteries.core.command_line import parse
from batteries.core.config_io import from_json, to_json
from batteries.distributed.unwrap import unwrap_model
from batteries.tracking.manager import default_trackers
from batteries.training.metrics import MeanMetrics
from train import Config, Stage


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def start(monkeypatch, data_dir, tmp_path):
    """Runs train.py with a tiny network; flags as on the command line."""
    monkeypatch.setattr(train, "build_model", tiny_network)
    quick = ["--tracker", "none", "--device", "cpu", "--data-dir", str(data_dir), "--limit-batches", "3"]
    quick += ["--stages.0.epochs", "2", "--stages.1.epochs", "1", "--split-file", str(tmp_path / "splits/default.csv")]

    def run(*flags: str) -> End:
        return run_train(train.main, Config, *quick, *flags)

    return run


def read_metrics(logdir) -> list[dict]:
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_the_files_that_the_readme_names(start, tmp_path):
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


def test_the_best_score_of_the_run_is_what_main_gives(monkeypatch, data_dir, tmp_path):
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


def test_the_second_stage_starts_from_the_best_weights_of_the_first(monkeypatch, data_dir, tmp_path):
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


def test_init_from_starts_a_new_run_from_the_weights_of_another(start, monkeypatch, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert start("--logdir", str(first)).code == 0
    monkeypatch.setattr(train, "train_fn", lambda *_: {"accuracy": 0.5, "loss": 1.0})  # changes no weight
    monkeypatch.setattr("batteries.run.stage.StageRun.log_epoch", lambda *_, **__: None)
    best = first / "stage1/best.pth"
    end = start("--logdir", str(second), "--init-from", str(best))
    assert end.code == 0, end.err
    assert f"weights  {best}" in end.out
    ours, theirs = (
        torch.load(path, weights_only=True)["model_state_dict"] for path in (second / "stage0/last.pth", best)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_init_from_a_file_that_is_not_there_is_refused_before_anything_is_written(start, tmp_path):
    end = start("--logdir", str(tmp_path / "run"), "--init-from", "nowhere.pth")
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert "nowhere.pth is not there" in end.err
    assert not (tmp_path / "run").exists()


def test_the_same_config_gives_the_same_metrics_and_another_seed_others(start, tmp_path):
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    assert start("--logdir", str(first), "--num-workers", "0").code == 0
    assert start("--config", str(first / "config.json"), "--logdir", str(again), "--num-workers", "2").code == 0
    assert start("--logdir", str(other), "--seed", "1").code == 0
    assert (first / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()
    assert (first / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("mixing", [[], ["--mixup", "0.4", "--cutmix", "1"]])
def test_two_ranks_give_the_metrics_of_one(start, monkeypatch, data_dir, tmp_path, mixing):
    one, two = tmp_path / "one", tmp_path / "two"
    assert start("--logdir", str(one), *mixing).code == 0
    config = from_json(Config, json.loads((one / "config.json").read_text()))
    run_ranks(2, lambda: train.main(dataclasses.replace(config, logdir=two)), join=False)
    for ours, theirs in zip(read_metrics(two), read_metrics(one), strict=True):
        assert ours["valid"]["accuracy"] == theirs["valid"]["accuracy"]
        assert ours["train"]["loss"] == pytest.approx(theirs["train"]["loss"], rel=1e-6)


def test_a_config_survives_json():
    config = Config(stages=(Stage("a", 1, 0.1),), fold=3)
    assert from_json(Config, json.loads(json.dumps(to_json(config)))) == config


def test_flags_beside_a_config_file_win(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(Config(seed=5, fold=2, stages=(Stage("only", 9, 0.1),)))))
    config = parse(Config, ["--config", str(path), "--seed", "6", "--stages.0.epochs", "4"])
    assert (config.seed, config.fold, config.stages) == (6, 2, (Stage("only", 4, 0.1),))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--bach-size", "3"], "--bach-size is no flag; did you mean '--batch-size'?"),
        (["--tracker", "tensorbord"], "--tracker tensorbord is no choice; did you mean 'tensorboard'? Use one of: "),
        (["--batch-size", "many"], "--batch-size: invalid literal for int()"),
        (
            ["--batch-size", "33", "--accumulation-steps", "2"],
            "--batch-size 33 must be a multiple of 2 (1 process x 2 ",
        ),
        (["--batch-size", "1000000"], "--batch-size 1000000 does not fit: the train split has "),
        (["--fold", "9"], "--fold 9 is not there; use 0 to 4."),
        (["--device", "cuda:7"], "--device cuda:7 needs GPU 7, but this machine has "),
        (["--device", "gpu"], "--device gpu is not a device; use one of: auto, cpu"),
        (["--seed", "-1"], "--seed -1 must be 0 to 4294967295."),
        (["--stages.0.epochs", "0"], "--stages.0.epochs 0 must be 1 or more."),
        (["--stages.1.lr", "nan"], "--stages.1.lr nan must be over 0."),
        (["--stages.1.lr", "inf"], "--stages.1.lr inf must be over 0."),
        (["--stages.1.name", "../x"], "--stages.1.name '../x' must be the name of a folder of its own"),
        (["--stages.1.name", ".."], "--stages.1.name '..' must be the name of a folder of its own"),
        (["--stages.1.name", ""], "--stages.1.name '' must be the name of a folder of its own"),
        (["--stages.1.name", "train.log"], "--stages.1.name 'train.log' must be the name of a folder of its own"),
        (["--stages.1.name", "stage0"], "--stages need one or more, of different names, not stage0, stage0."),
        (["--main-metric", "loss"], "--main-metric loss is better when it is less: give --minimize-metric."),
        (["--minimize-metric"], "--main-metric accuracy is better when it is more: leave out --minimize-metric."),
        (["--min-delta", "0.1"], "--min-delta 0.1 is for --patience; give that too, or leave it out."),
        (["--weight-decay", "-1"], "--weight-decay -1.0 must be 0 or more."),
        (["--mixup", "-1"], "--mixup -1.0 must be 0 or more."),
        (["--accumulation-steps", "32"], "--batch-size leaves micro-batches of one sample, and batch norm needs two"),
        (["--logdir", ""], "--logdir . is this repository itself"),
        (["--save-n-best", "0"], "--save-n-best 0 must be 1 or more."),
        (["--limit-batches", "0"], "--limit-batches 0 must be 1 or more."),
        (["--valid-batch-size", "0"], "--valid-batch-size 0 must be 1 or more."),
        (["--num-workers", "-1"], "--num-workers -1 must be 0 or more."),
        (["--config", "nowhere.json"], "--config nowhere.json cannot be read"),
        (["--config"], "--config needs a file"),
        (["--logdir", "train.py"], "--logdir train.py cannot be a folder"),
        (["--main-metric", "acuracy"], "--main-metric acuracy is no metric; did you mean 'accuracy'? Use one of: "),
        (["--scores", "f1_macro"], "--scores f1_macro is no metric; did you mean 'macro_f1'? Use one of: "),
        (["--stages.0.schedule", "cosin"], "--stages.0.schedule cosin is no choice; did you mean 'cosine'?"),
        (["--stages.0.freeze", "0.wieght"], "--stages.0.freeze '0.wieght' is no module of the model"),
        (["--stages.0.freeze", "0", "1"], "--stages.0.freeze 0 1 leaves nothing to learn."),
        (["--patience", "0"], "--patience 0 must be 1 or more."),
        (["--ema-decay", "1"], "--ema-decay 1.0 must be 0 or more, and under 1."),
        (["--clip-norm", "0"], "--clip-norm 0.0 must be over 0."),
        (
            ["--stages.1.schedule", "cosine", "--stages.1.warmup-epochs", "3"],
            "--stages.1.warmup-epochs 3 is as long as the stage or longer (1 epochs); use less.",
        ),
        (["--stages.0.start", "last"], "--stages.0.start last has no stage before it to start from; leave it out."),
        (
            ["--stages.0.schedule", "multi-step", "--stages.0.epochs", "6", "--stages.0.warmup-epochs", "5"],
            "--stages.0.warmup-epochs 5 goes on after the first drop, at 3 epochs; use less.",
        ),
        (["--stages.0.warmup-epochs", "1"], "--stages.0.warmup-epochs 1 has no place in --stages.0.schedule one-cycle"),
        (["--precision", "fp8"], "--precision fp8 is no choice"),
        (["--init-from", "a", "--pretrained", "b"], "--init-from and --pretrained both say where weights come from"),
        (["--data-parallel", "--compile"], "--compile does not go with --data-parallel"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2_and_nothing_is_written(
    start, monkeypatch, tmp_path, flags, sentence
):
    monkeypatch.setattr(train, "build_model", lambda num_classes: nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()))
    logdir = tmp_path / "run"
    end = start("--logdir", str(logdir), *flags)
    assert end.code == 2
    assert end.err.startswith("error: ")
    assert sentence in end.err
    assert end.err.count("\n") == 1
    assert end.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"batch_size": "32"}', "batch_size is '32', and must be int."),
        ('{"batch_size": null}', "batch_size is None, and must be int."),
        ('{"seed": true}', "seed is True, and must be int."),
        ('{"deterministic": "no"}', "deterministic is 'no', and must be bool."),
        ('{"weight_decay": "0.1"}', "weight_decay is '0.1', and must be float."),
        (
            '{"main_metric": "f1"}',
            "--main-metric f1 is no metric. Use one of: loss, accuracy, balanced_accuracy, macro_f1",
        ),
        ('{"logdir": null}', "logdir is None, and must be Path."),
        ('{"stages": []}', "--stages need one or more, of different names, not none."),
        ('{"stages": ["a"]}', 'stages must be an object with "name", "epochs", "lr" and so on, not'),
        ('{"stages": {"name": "a"}}', "stages is {'name': 'a'}, and must be tuple"),
        ('{"stages": [{"name": "a", "epochs": 1.5, "lr": 1}]}', "stages: epochs is 1.5, and must be int."),
        ('{"stages": [{"name": "a"}]}', "does not make a Stage"),
        ("[1]", 'must be an object with "stages", "batch_size", "accumulation_steps" and so on, not [1].'),
        ("{", "cannot be read"),
    ],
)
def test_a_config_file_with_a_value_of_another_kind_is_refused(start, tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text)
    end = run_train(train.main, Config, "--config", str(tmp_path / "config.json"), "--logdir", str(tmp_path / "run"))
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert sentence in end.err
    assert not (tmp_path / "run").exists()


def test_a_folder_with_checkpoints_alone_holds_a_run_too(start, tmp_path):
    (tmp_path / "run/stage0").mkdir(parents=True)
    (tmp_path / "run/stage0/best.pth").write_text("precious")
    assert "holds a run already" in start("--logdir", str(tmp_path / "run")).err
    assert (tmp_path / "run/stage0/best.pth").read_text() == "precious"


def test_a_variable_of_torchrun_that_strayed_into_the_environment_changes_nothing(start, monkeypatch, tmp_path):
    assert start("--logdir", str(tmp_path / "plain")).code == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert start("--logdir", str(tmp_path / "stray")).code == 0
    assert (tmp_path / "plain/metrics.jsonl").read_bytes() == (tmp_path / "stray/metrics.jsonl").read_bytes()


def test_a_metric_of_another_shape_than_one_number_a_sample_is_refused(cpu):
    with pytest.raises(ValueError, match=r"metric accuracy has shape \(8, 5\) for 8 samples"):
        MeanMetrics().update(8, accuracy=torch.ones(8, 5))


def test_a_config_with_an_unknown_knob_is_refused_with_the_near_one(start, tmp_path):
    (tmp_path / "config.json").write_text('{"batchsize": 3}')
    end = start("--config", str(tmp_path / "config.json"))
    assert end.code == 2
    assert "'batchsize', which is no knob; did you mean 'batch_size'?" in end.err


def test_a_logdir_that_holds_a_run_is_refused_and_left_as_it_is(start, tmp_path):
    logdir = tmp_path / "run"
    assert start("--logdir", str(logdir)).code == 0
    before = {path: path.read_bytes() for path in logdir.rglob("*") if path.is_file()}
    end = start("--logdir", str(logdir))
    assert end.code == 2
    assert end.err == (
        f"error: --logdir {logdir} holds a run already; go on with it by --resume, "
        f"or choose another, such as --logdir {logdir}_2.\n"
    )
    assert {path: path.read_bytes() for path in logdir.rglob("*") if path.is_file()} == before


def test_a_data_set_with_too_few_of_a_class_is_refused(start, monkeypatch, tmp_path):
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


def test_a_run_makes_its_split_file_once_and_notes_its_sha256(start, tmp_path):
    path = tmp_path / "splits/default.csv"
    for name in ("one", "two"):
        assert start("--logdir", str(tmp_path / name), "--fold", "1").code == 0
        split = json.loads((tmp_path / name / "run.json").read_text())["split"]
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        assert split == {"file": str(path), "sha256": sha256, "folds": 5}
    assert path.read_text().startswith("id,target,fold")


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
            dataset.get_batch = lambda indices: (note(indices), get_batch(indices))[1]
        return dataset

    monkeypatch.setattr(train, "load_dataset", load_noted)
    end = start("--logdir", str(tmp_path / "run"), "--tracker", *default_trackers(), "--limit-batches", "1000")
    assert end.code == 0, end.err
    with (tmp_path / "splits/default.csv").open(newline="") as file:
        rows = {row["id"]: row["fold"] for row in csv.DictReader(file)}
    seen = set(read.read_text().splitlines())
    assert {rows[name] for name in seen} == {"0", "1", "2", "3", "4"}
    assert "-1" in rows.values()


def test_a_bug_keeps_its_traceback_and_is_noted_in_the_run(start, monkeypatch, tmp_path):
    def broken(*_):
        return int("x")

    monkeypatch.setattr(train, "train_fn", broken)
    end = start("--logdir", str(tmp_path / "run"))
    assert end.code == 1
    assert "Traceback" in end.err
    assert "invalid literal for int()" in json.loads((tmp_path / "run/run.json").read_text())["exit"]
    assert "invalid literal for int()" in (tmp_path / "run/train.log").read_text()


@pytest.mark.parametrize("accuracy", [math.nan, 0.9])  # of outputs that are NaN accuracy is a number all the same
def test_a_loss_that_is_not_finite_is_null_in_the_metrics_and_never_best(start, monkeypatch, tmp_path, accuracy):
    monkeypatch.setattr(train, "valid_fn", lambda *_: {"accuracy": accuracy, "loss": math.nan})
    assert start("--logdir", str(tmp_path / "run")).code == 0
    known = None if math.isnan(accuracy) else accuracy
    assert read_metrics(tmp_path / "run")[0]["valid"] == {"accuracy": known, "loss": None}
    assert not (tmp_path / "run/stage0/best.pth").exists()


def test_one_process_of_a_machine_loads_the_data_before_the_others(monkeypatch, data_dir, tmp_path):
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
