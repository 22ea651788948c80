"""Crash-exact resume: a run that is killed at any instant and resumed ends bit-identical to an uninterrupted run."""

import dataclasses
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from interrupted_runs import digest, finish, kill_after, small_run, start
from marks import CLASSES_ONLY
from models import dropout_network, tiny_network
from processes import SECONDS, End, run_train, wait_until
from small_data import change_one_sample, make_data
from torch import nn

import train
from batteries.core import files, signals
from batteries.core.config_io import to_json
from batteries.core.errors import UserError
from batteries.core.files import DirectoryLock
from batteries.evaluation.run_selection import read_config
from batteries.run.metadata import hash_code
from batteries.run.position import TrainingPosition, truncate_jsonl
from train import Config, Stage

STAGES = (Stage("stage0", 3, 1e-2), Stage("stage1", 2, 1e-3, "plateau"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(monkeypatch, data_dir, tmp_path) -> Config:
    monkeypatch.setattr(train, "build_model", dropout_network)
    options = {"stages": STAGES, "accumulation_steps": 2, "patience": 5, "checkpoint_every_steps": 2}
    return small_run(tmp_path, data_dir, **options)


def uninterrupted_run(config: Config, world_size: int = 1) -> tuple[dict[str, str], float]:
    """Return the digest of an uninterrupted run, and its seconds; each config is run once."""
    uninterrupted = dataclasses.replace(config, logdir=config.logdir.with_name("uninterrupted"))
    key = repr(dataclasses.replace(config, logdir=Path(), split_file=Path())), world_size
    if key not in UNINTERRUPTED_RUNS:
        begin = time.monotonic()
        finish(uninterrupted, world_size)
        UNINTERRUPTED_RUNS[key] = digest(uninterrupted.logdir), time.monotonic() - begin
    return UNINTERRUPTED_RUNS[key]


UNINTERRUPTED_RUNS: dict[tuple[str, int], tuple[dict[str, str], float]] = {}


@pytest.mark.parametrize(
    ("num_workers", "world_size", "kills", "checkpoint_every_steps"),
    [
        (0, 1, 5, 2),
        pytest.param(0, 1, 20, 2, marks=pytest.mark.slow),
        pytest.param(0, 1, 20, 1, marks=pytest.mark.slow),
        pytest.param(2, 1, 20, 2, marks=pytest.mark.slow),
        pytest.param(0, 2, 5, 2, marks=pytest.mark.slow),
    ],
)
def test_run_killed_at_random_instants_ends_bit_identically(
    config, num_workers, world_size, kills, checkpoint_every_steps
):
    config = dataclasses.replace(config, num_workers=num_workers, checkpoint_every_steps=checkpoint_every_steps)
    expected, seconds = uninterrupted_run(config, world_size)
    assert len(expected) == 5
    rng = random.Random(num_workers + checkpoint_every_steps)
    done = 0
    while done < kills:
        if kill_after(rng.uniform(0, seconds), config, world_size):
            done += 1
        else:  # it had finished; kill a new run
            assert digest(config.logdir) == expected
            shutil.rmtree(config.logdir)
    finish(config, world_size)
    assert digest(config.logdir) == expected


def kill_at(config: Config, stage: str, file: str) -> None:
    """Start the run and send SIGKILL right after it has saved `file` of `stage`."""
    original = train.CheckpointManager.save

    def save_and_die(self, checkpoint):
        original(self, checkpoint)
        self.wait()
        if self.logdir.name == stage and (self.logdir / file).exists():
            os.kill(os.getpid(), signal.SIGKILL)

    train.CheckpointManager.save = save_and_die
    try:
        [process] = start(config)
        process.join()
    finally:
        train.CheckpointManager.save = original
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture
def interrupted_run(config, saved_run) -> Config:
    """Return the config of a run that was killed in the second epoch of its second stage, after a checkpoint."""
    if not saved_run.exists():
        kill_at(config, "stage1", "epoch_2_step_6.pth")
        shutil.copytree(config.logdir, saved_run)
        shutil.copy(config.split_file, saved_run.with_suffix(".csv"))
    else:
        shutil.copytree(saved_run, config.logdir)
        shutil.copy(saved_run.with_suffix(".csv"), config.split_file)
        record = json.loads((config.logdir / "run.json").read_text())
        record["split"]["file"] = str(config.split_file)
        (config.logdir / "run.json").write_text(json.dumps(record))
    return config


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory) -> Path:
    """Return the directory that keeps a copy of the first interrupted run, for other tests."""
    return tmp_path_factory.mktemp("saved_run") / "run"


def resume(config: Config, **changes) -> End:
    """Run `python train.py --resume` with this config and changes to it."""
    path = config.logdir.with_name("config.json")
    path.write_text(json.dumps(to_json(dataclasses.replace(config, **changes))))
    return run_train(train.main, Config, "--config", str(path), "--resume")


def test_resumed_run_logs_where_it_continues(interrupted_run):
    end = resume(interrupted_run)
    assert end.code == 0, end.err
    where = "stage1/epoch_2_step_6.pth, in stage1 epoch 2 after 2 steps"
    assert f"weights  resumed from {interrupted_run.logdir}/{where}" in end.out
    record = json.loads((interrupted_run.logdir / "run.json").read_text())
    assert len(record["resumed"]) == 1
    assert record["exit"] == "finished"


@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "remove"])
def test_damaged_checkpoint_is_renamed_and_the_previous_one_used(interrupted_run, damage):
    expected, _ = uninterrupted_run(interrupted_run)
    path = interrupted_run.logdir / "stage1/epoch_2_step_6.pth"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "truncate":
        del data[-100:]
    elif damage == "zero":
        data[:512] = bytes(512)
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data)
    end = resume(interrupted_run)
    assert end.code == 0, end.err
    assert f"{path} is " in end.out
    assert "The run resumes from stage1/epoch_1.pth; 2 steps will be repeated." in end.out
    assert (path.with_name(f"{path.name}.corrupt").exists()) == (damage != "remove")
    assert digest(interrupted_run.logdir) == expected


def use_numpy(monkeypatch) -> None:
    """Give the optimizer, the schedule, the metrics and model_args scalars of numpy."""
    build_optimizer = train.build_optimizer
    validate = train.valid_fn

    def build(*arguments) -> torch.optim.Optimizer:
        optimizer = build_optimizer(*arguments)
        for group in optimizer.param_groups:
            group["lr"] = np.float64(group["lr"])
            group["weight_decay"] = np.float32(group["weight_decay"])
        return optimizer

    class NumpyRun(train.Run):
        def __init__(self, *arguments, model_args, **options) -> None:
            super().__init__(
                *arguments, model_args={name: np.int64(value) for name, value in model_args.items()}, **options
            )

    monkeypatch.setattr(train, "build_optimizer", build)
    monkeypatch.setattr(train, "Run", NumpyRun)
    monkeypatch.setattr(
        train, "valid_fn", lambda *arguments: {name: np.float32(value) for name, value in validate(*arguments).items()}
    )


def test_run_with_scalars_of_numpy_trains_two_stages_and_resumes(config, monkeypatch):
    use_numpy(monkeypatch)
    config = dataclasses.replace(
        config,
        seed=np.int64(3),
        batch_size=np.int32(32),
        clip_norm=np.float32(1),
        weight_decay=np.float64(0.1),
        deterministic=np.bool_(True),
        stages=tuple(dataclasses.replace(stage, epochs=np.int64(stage.epochs)) for stage in config.stages),
    )
    finish(config)
    expected = digest(config.logdir)
    shutil.rmtree(config.logdir)
    kill_at(config, "stage1", "epoch_2_step_6.pth")
    assert json.loads((config.logdir / "config.json").read_text())["seed"] == 3
    end = resume(config)
    assert end.code == 0, end.err
    assert digest(config.logdir) == expected
    assert not list(config.logdir.glob("*/*.corrupt"))
    saved = torch.load(config.logdir / "stage1/last.pth", weights_only=True)
    assert type(saved["optimizer_state_dict"]["param_groups"][0]["weight_decay"]) is float
    assert type(saved["model_args"]["num_classes"]) is int


@pytest.mark.parametrize(
    "place", ["optimizer_state_dict.param_groups.0.rule", "scheduler_state_dict.rule", "model_args.rule"]
)
def test_value_that_a_checkpoint_cannot_hold_is_rejected_before_training(config, monkeypatch, place):
    build_state = train.build_state

    def build(*arguments):
        state = build_state(*arguments)
        if place.startswith("optimizer"):
            state.optimizer.param_groups[0]["rule"] = slice(1)
        if place.startswith("scheduler"):
            state.scheduler.state_dict = lambda: {"rule": slice(1)}
        return state

    class OtherRun(train.Run):
        def __init__(self, *arguments, model_args, **options) -> None:
            super().__init__(*arguments, model_args={**model_args, "rule": slice(1)}, **options)

    if place.startswith("model_args"):
        monkeypatch.setattr(train, "Run", OtherRun)
    monkeypatch.setattr(train, "build_state", build)
    monkeypatch.setattr(train, "train_fn", None)  # it is not called
    end = resume(config)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert end.err.startswith(f"error: {place} is a slice, which a checkpoint cannot hold, because")


def rewrite(path: Path, change) -> None:
    """Change a checkpoint of a run, and its sha256 in the manifest."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    manifest = json.loads(path.with_name("checkpoints.json").read_text())
    for entry in manifest["checkpoints"]:
        if entry["file"] == path.name:
            entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name("checkpoints.json").write_text(json.dumps(manifest))


def test_valid_file_that_cannot_be_read_is_not_renamed(interrupted_run):
    path = interrupted_run.logdir / "stage1/epoch_2_step_6.pth"
    rewrite(path, lambda checkpoint: checkpoint.update(lr=np.float64(0.1)))
    content = path.read_bytes()
    end = resume(interrupted_run)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert (
        f"error: {path} cannot be read as a checkpoint of tensors and plain values (UnpicklingError: it holds a "
        in end.err
    )
    assert "damaged" not in end.err + end.out
    assert path.read_bytes() == content


def test_checkpoint_from_before_the_warm_up_of_the_average_resumes(interrupted_run):
    expected, _ = uninterrupted_run(interrupted_run)
    path = interrupted_run.logdir / "stage1/epoch_2_step_6.pth"
    rewrite(path, lambda checkpoint: checkpoint.pop("ema_steps"))
    end = resume(interrupted_run)
    assert end.code == 0, end.err
    assert digest(interrupted_run.logdir) == expected


def test_stage_without_valid_checkpoint_restarts_from_the_previous_stage(interrupted_run):
    expected, _ = uninterrupted_run(interrupted_run)
    for path in (interrupted_run.logdir / "stage1").glob("epoch_*.pth"):
        path.write_bytes(b"truncated")
    end = resume(interrupted_run)
    assert end.code == 0, end.err
    assert "The run resumes from stage0/epoch_3.pth; 6 steps of stage1 will be repeated." in end.out
    assert digest(interrupted_run.logdir) == expected


def test_run_without_valid_checkpoint_is_rejected_and_not_restarted(interrupted_run):
    for path in interrupted_run.logdir.glob("stage*/epoch_*.pth"):
        path.write_bytes(b"truncated")
    metrics = (interrupted_run.logdir / "metrics.jsonl").read_bytes()
    end = resume(interrupted_run)
    assert end.code == 2
    assert "--resume finds no valid checkpoint in " in end.err
    assert (interrupted_run.logdir / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("file", ["stage1/checkpoints.json", "run.json", "metrics.jsonl"])
def test_damaged_run_file_is_rejected(interrupted_run, file):
    (interrupted_run.logdir / file).write_text("{truncated\n")
    end = resume(interrupted_run)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert f"{interrupted_run.logdir}/{file} is damaged" in end.err


def test_damaged_checkpoint_at_the_end_of_an_epoch_is_replaced(config):
    kill_at(config, "stage0", "epoch_1_step_2.pth")
    config = dataclasses.replace(config, stages=STAGES[:1])
    finish(config)
    last = config.logdir / "stage0/epoch_3.pth"
    last.write_bytes(b"truncated")
    assert resume(config).code == 0
    assert last.with_name("epoch_3.pth.corrupt").exists()


@pytest.mark.parametrize("lost", ["the file", "the last line"])
def test_metrics_jsonl_that_lacks_an_epoch_is_rejected(interrupted_run, lost):
    path = interrupted_run.logdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if lost == "the file":
        path.unlink()
    else:
        path.write_text("".join(lines[:3]))  # only those of stage0; the run is in stage1
    end = resume(interrupted_run)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert (
        f"{path} lacks the epoch before that of {interrupted_run.logdir}/stage1/epoch_2_step_6.pth; restore the file"
        in end.err
    )


def test_missing_manifest_is_rejected(interrupted_run):
    (interrupted_run.logdir / "stage1/checkpoints.json").unlink()
    end = resume(interrupted_run)
    assert end.code == 2
    assert f"{interrupted_run.logdir}/stage1/checkpoints.json is missing" in end.err


@CLASSES_ONLY
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 16}, "--batch-size was 32 and is 16; give --batch-size 32, or use another --logdir."),
        ({"seed": 1}, "--seed was 0 and is 1"),
        ({"fold": 1}, "--fold was 0 and is 1"),
        ({"accumulation_steps": 1}, "--accumulation-steps was 2 and is 1"),
        ({"tf32": False}, "--tf32 was True and is False; give --tf32, or use another --logdir."),
        (
            {"scores": ("roc_auc",)},
            "--scores was [] and is ['roc_auc']; give --scores without a value, or use another --logdir.",
        ),
        (
            {"stages": (STAGES[0], dataclasses.replace(STAGES[1], name="tuned"))},
            "--stages.1.name was stage1",
        ),
        (
            {"stages": (Stage("stage0", 4, 1e-2), STAGES[1])},
            "--stages.0.epochs was 3 and is 4; give --stages.0.epochs 3, and add a stage in train.py or in the file of",
        ),
        ({"stages": (Stage("stage0", 2, 1e-2), STAGES[1])}, "is 2; give --stages.0.epochs 3, or use another --logdir."),
        ({"stages": STAGES[:1]}, "it is in stage 2, and --stages has only 1; give --config RUN/config.json, or use "),
        ({"ema_decay": None}, "--ema-decay was 0.9 and is None; give --ema-decay 0.9, or use another --logdir."),
        ({"precision": "bf16"}, "--precision was fp32 and is bf16"),
        ({"stages": (STAGES[0], Stage("stage1", 2, 2e-3))}, "--stages.1.lr was 0.001 and is 0.002; give"),
    ],
)
def test_changed_option_is_rejected_at_resume(interrupted_run, changes, message):
    before = {path: path.read_bytes() for path in interrupted_run.logdir.rglob("[!.]*") if path.is_file()}
    end = resume(interrupted_run, **changes)
    assert end.code == 2
    assert message.replace("RUN", str(interrupted_run.logdir)) in end.err
    assert end.err.count("\n") == 1
    assert {path: path.read_bytes() for path in before} == before


@dataclasses.dataclass(frozen=True)
class NewStage(Stage):
    """A later version of Stage, with more options."""

    drop_rate: float = 0.0
    layers: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A group of options."""

    strength: float = 0.5
    colour: bool = True


@dataclasses.dataclass(frozen=True)
class NewConfig(Config):
    """A later version of Config, with more options."""

    stages: tuple[NewStage, ...] = (NewStage("stage0", 1, 1e-2),)
    drop_rate: float = 0.0
    teacher: Path | None = None
    folder: Path = Path("data/more")
    layers: tuple[str, ...] = ()
    heads: tuple[str, ...] = dataclasses.field(default_factory=lambda: ("a", "b"))
    is_large: bool = True
    augmentation: Augmentation = Augmentation()


def as_new(config: Config, **changes) -> NewConfig:
    """Return a config of today as one of the later version."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values["stages"] = tuple(NewStage(**dataclasses.asdict(stage)) for stage in config.stages)
    return NewConfig(**(values | changes))


def resume_as(config_class: type, config: Config) -> End:
    """Run `python train.py --resume` of a version whose options are `config_class`."""
    path = config.logdir.with_name("config.json")
    path.write_text(json.dumps(to_json(config)))
    return run_train(train.main, config_class, "--config", str(path), "--resume")


def test_run_from_before_new_options_resumes_with_their_defaults(interrupted_run):
    expected, _ = uninterrupted_run(interrupted_run)
    end = resume_as(NewConfig, as_new(interrupted_run))
    assert end.code == 0, end.err
    assert digest(interrupted_run.logdir) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop_rate": 0.1}, "--drop-rate was 0.0 and is 0.1; give --drop-rate 0.0, or use another --logdir."),
        ({"teacher": Path("a b")}, "--teacher was None and is a b; give --teacher None, or use another --logdir."),
        ({"folder": Path("x")}, "--folder was data/more and is x; give --folder data/more, or use another --logdir."),
        ({"heads": ("a",)}, "--heads was ['a', 'b'] and is ['a']; give --heads a b, or use another --logdir."),
        ({"is_large": False}, "--is-large was True and is False; give --is-large, or use another --logdir."),
        (
            {"augmentation": Augmentation(colour=False)},
            "--augmentation.colour was True and is False; give --augmentation.colour, or use another --logdir.",
        ),
        (
            {"stages": (NewStage("stage0", 3, 1e-2), NewStage("stage1", 2, 1e-3, "plateau", layers=(1,)))},
            "--stages.1.layers was [1, 2] and is [1]; give --stages.1.layers 1 2, or use another --logdir.",
        ),
    ],
)
def test_new_option_with_another_value_is_rejected_at_resume(interrupted_run, changes, message):
    end = resume_as(NewConfig, as_new(interrupted_run, **changes))
    assert (end.code, end.err) == (2, f"error: --resume would change the run: {message}\n")


def test_new_option_without_a_default_is_rejected_at_resume(interrupted_run):
    kind = dataclasses.make_dataclass("WithoutDefault", [("width", int)], bases=(Stage,), frozen=True, kw_only=True)
    fields = [("stages", tuple[kind, ...], (kind("stage0", 1, 1e-2, width=3),))]
    config_class = dataclasses.make_dataclass("Changed", fields, bases=(Config,), frozen=True)
    values = {field.name: getattr(interrupted_run, field.name) for field in dataclasses.fields(interrupted_run)}
    values["stages"] = tuple(kind(**dataclasses.asdict(stage), width=3) for stage in interrupted_run.stages)
    end = resume_as(config_class, config_class(**values))
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert "it began without --stages.0.width, which has no default; give it a default in train.py, or use" in end.err


def test_removed_options_are_reported_at_resume_and_ignored(config):
    stages = (NewStage("stage0", 2, 1e-2, drop_rate=0.2),)
    kill_at(as_new(config, stages=stages, drop_rate=0.1), "stage0", "epoch_1_step_2.pth")
    end = resume(dataclasses.replace(config, stages=(Stage("stage0", 2, 1e-2),)))
    assert end.code == 0, end.err
    removed = "--stages.0.drop-rate 0.2, --stages.0.layers [1, 2], --drop-rate 0.1, --teacher None"
    assert f"Options of the run that no longer exist have no effect: {removed}, --folder data/more" in end.out
    assert read_config(config.logdir, Config).stages == (Stage("stage0", 2, 1e-2),)


def test_tools_read_a_run_from_before_new_and_removed_options(interrupted_run):
    assert read_config(interrupted_run.logdir, NewConfig).stages[1].layers == (1, 2)
    path = interrupted_run.logdir / "config.json"
    values = json.loads(path.read_text())
    values["removed"] = 1
    values["stages"][0]["removed"] = 1
    path.write_text(json.dumps(values))
    assert [stage.name for stage in read_config(interrupted_run.logdir, Config).stages] == ["stage0", "stage1"]


def test_finished_stage_with_more_epochs_is_rejected_with_what_works(config):
    short = dataclasses.replace(config, stages=(Stage("stage0", 1, 1e-2),))
    finish(short)
    end = resume(dataclasses.replace(config, stages=(Stage("stage0", 2, 1e-2),)))
    best = config.logdir / "stage0/best.pth"
    assert (end.code, end.err) == (
        2,
        "error: --resume would change the run: --stages.0.epochs was 1 and is 2; give --stages.0.epochs 1, and add a "
        f"stage in train.py or in the file of --config, or start a run in another --logdir with --init-from {best}.\n",
    )
    longer = dataclasses.replace(config, stages=(*short.stages, Stage("stage1", 1, 1e-2)))
    assert resume(longer).code == 0
    assert len((config.logdir / "metrics.jsonl").read_text().splitlines()) == 2
    other = dataclasses.replace(short, logdir=config.logdir.with_name("other"), init_from=best)
    assert resume(other).code == 0


def die_in_the_first_epoch(config: Config) -> None:
    """Start the run and send SIGKILL in its first step, before any checkpoint."""
    original = train.optimizer_step
    train.optimizer_step = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    try:
        [process] = start(config)
        process.join()
    finally:
        train.optimizer_step = original
    assert process.exitcode == -signal.SIGKILL
    assert not list(config.logdir.glob("*/*.pth"))


def test_run_without_a_checkpoint_restarts_unchanged(config):
    die_in_the_first_epoch(config)
    end = resume(config)
    assert end.code == 0, end.err
    assert digest(config.logdir) == uninterrupted_run(config)[0]


@pytest.mark.parametrize("change", ["model", "option", "data", "initial weights"])
def test_changed_run_without_a_checkpoint_is_rejected_at_resume(config, monkeypatch, tmp_path, change):
    config = dataclasses.replace(config, stages=(Stage("stage0", 1, 1e-2),))
    if change == "initial weights":
        finish(dataclasses.replace(config, logdir=tmp_path / "first"))
    die_in_the_first_epoch(config)
    before = {path: path.read_bytes() for path in config.logdir.rglob("[!.]*") if path.is_file()}
    changes = {}
    if change == "model":
        message = r"the model was Sequential with [\d,]+ parameters \(sha256 .* [0-9a-f]{12}\) and is Sequential with "
        monkeypatch.setattr(train, "build_model", lambda num_classes: nn.Sequential(dropout_network(num_classes)))
    elif change == "option":
        message = r"--batch-size was 32 and is 16; give --batch-size 32, or use another --logdir\."
        changes = {"batch_size": 16}
    elif change == "initial weights":
        message = r"--init-from was None and is \S+best.pth; give --init-from None, or use another --logdir\."
        changes = {"init_from": tmp_path / "first/stage0/best.pth"}
    else:
        load_dataset = train.load_dataset
        shutil.copytree(config.data_dir, tmp_path / "changed")
        monkeypatch.setattr(train, "load_dataset", lambda _: change_one_sample(load_dataset(tmp_path / "changed")))
        message = r"the data or their split differ from those with which it began\. Restore them, or use another"
    end = resume(config, **changes)
    assert (end.code, end.err.count("\n")) == (2, 1), end.out
    assert re.search(rf"--resume would change the run: {message}", end.err), end.err
    assert {path: path.read_bytes() for path in before} == before


def test_run_without_a_checkpoint_keeps_its_initial_weights_at_resume(config, tmp_path):
    config = dataclasses.replace(config, stages=(Stage("stage0", 1, 1e-2),))
    first = dataclasses.replace(config, logdir=tmp_path / "first")
    finish(first)
    best = first.logdir / "stage0/best.pth"
    die_in_the_first_epoch(dataclasses.replace(config, init_from=best))
    end = resume(config)
    assert f"weights  {best}" in end.out
    assert json.loads((config.logdir / "config.json").read_text())["init_from"] == str(best)


def test_changed_code_of_a_run_without_a_checkpoint_is_reported_at_resume(config, monkeypatch):
    config = dataclasses.replace(config, stages=(Stage("stage0", 1, 1e-2),))
    die_in_the_first_epoch(config)
    monkeypatch.setattr("batteries.run.run.hash_code", lambda: hash_code() | {"experiment/model.py": "another"})
    assert (
        "experiment/model.py changed since the run was saved; the resumed run uses the new code." in resume(config).out
    )


@pytest.mark.parametrize(
    ("position", "kept"), [((0, 1, 0), 0), ((0, 2, 5), 1), ((1, 1, 0), 2), ((1, 2, 3), 3), ((1, 9, 0), 4)]
)
def test_lines_from_the_position_on_are_removed(tmp_path, position, kept):
    epochs = [("one", 1), ("one", 2), ("two", 1), ("two", 2)]
    lines = [json.dumps({"stage": stage, "epoch": epoch}) + "\n" for stage, epoch in epochs]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines) + '{"stage": "tw')
    truncate_jsonl(path, ["one", "two"], TrainingPosition(*position))
    assert path.read_text() == "".join(lines[:kept])


def test_changed_data_are_rejected_at_resume(interrupted_run, monkeypatch, tmp_path):
    load_dataset = train.load_dataset

    def load_changed(data_dir):
        shutil.copytree(data_dir, tmp_path / "changed")
        return change_one_sample(load_dataset(tmp_path / "changed"))

    monkeypatch.setattr(train, "load_dataset", load_changed)
    end = resume(interrupted_run)
    assert end.code == 2
    assert "the data or their split differ from those of " in end.err


@pytest.mark.parametrize("change", ["another fold", "the order of its rows", "another file"])
def test_changed_split_file_is_rejected_at_resume(interrupted_run, change):
    path = interrupted_run.split_file
    header, *rows = path.read_text().splitlines()
    if change == "another fold":  # all samples of a group stay in one fold
        swapped = {"3": "4", "4": "3"}
        cells = [row.split(",") for row in rows]
        place = header.split(",").index("fold")
        rows = [",".join([*row[:place], swapped.get(row[place], row[place]), *row[place + 1 :]]) for row in cells]
    else:
        rows.reverse()
    path.write_text("\n".join([header, *rows]) + "\n")
    if change == "another file":
        interrupted_run = dataclasses.replace(interrupted_run, split_file=path.rename(path.with_name("other.csv")))
    before = (interrupted_run.logdir / "run.json").read_bytes()
    end = resume(interrupted_run)
    assert (end.code, end.err.count("\n")) == (2, 1)
    problem = f"{interrupted_run.split_file} is not the split file that the run began with, {path} with sha256 "
    assert f"--resume would change the run: {problem}" in end.err
    assert (interrupted_run.logdir / "run.json").read_bytes() == before


def test_moved_split_file_is_accepted_at_resume(interrupted_run):
    expected, _ = uninterrupted_run(interrupted_run)
    moved = interrupted_run.split_file.rename(interrupted_run.split_file.with_name("moved.csv"))
    end = resume(interrupted_run, split_file=moved)
    assert end.code == 0, end.err
    assert digest(interrupted_run.logdir) == expected


def test_changed_model_is_rejected_at_resume(interrupted_run, monkeypatch):
    monkeypatch.setattr(train, "build_model", lambda num_classes: nn.Sequential(dropout_network(num_classes)))
    before = {path: path.read_bytes() for path in interrupted_run.logdir.rglob("[!.]*") if path.is_file()}
    end = resume(interrupted_run)
    assert end.code == 2
    assert "epoch_2_step_6.pth does not fit the architecture of the model (missing: 0." in end.err
    assert {path: path.read_bytes() for path in before} == before


def test_changed_versions_are_reported_at_resume(interrupted_run, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    end = resume(interrupted_run)
    assert end.code == 0, end.err
    changes = r"Changed since the run was saved: torch \S+ -> 9\.9\.9\. "
    assert re.search(changes + r"The results are equal up to rounding, not bit-identical\.\n", end.out)


@CLASSES_ONLY
def test_early_stop_survives_a_kill_and_its_stage_is_not_continued(config, monkeypatch):
    """The stage stops early after its second epoch, and the run is killed right after that checkpoint."""
    monkeypatch.setattr(train, "valid_fn", lambda *_: {"accuracy": 0.5, "loss": 1.0})
    config = dataclasses.replace(config, patience=1)
    process = train.CheckpointManager.process

    def process_and_die(self, score, epoch, checkpoint):
        process(self, score, epoch, checkpoint)
        if epoch == 2:
            self.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(train.CheckpointManager, "process", process_and_die)
    [killed] = start(config)
    killed.join()
    monkeypatch.setattr(train.CheckpointManager, "process", process)
    finish(config)
    lines = [json.loads(line) for line in (config.logdir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in lines] == [
        ("stage0", 1),
        ("stage0", 2),
        ("stage1", 1),
        ("stage1", 2),
    ]


def test_options_that_do_not_affect_results_may_change_at_resume(interrupted_run):
    expected, _ = uninterrupted_run(interrupted_run)
    assert resume(interrupted_run, num_workers=2, checkpoint_every_steps=None, show_warnings=True).code == 0
    assert digest(interrupted_run.logdir) == expected


def test_stage_that_has_not_begun_may_change_at_resume(config):
    first = dataclasses.replace(config, stages=STAGES[:1])
    finish(first)
    assert resume(config).code == 0
    expected, _ = uninterrupted_run(config)
    assert digest(config.logdir) == expected


def test_resuming_a_finished_run_changes_nothing(config):
    finish(config)
    before = digest(config.logdir)
    end = resume(config)
    assert end.code == 0
    assert "already finished" in end.out
    assert digest(config.logdir) == before


def test_resume_starts_a_new_run_in_an_empty_logdir(config):
    end = resume(config)
    assert end.code == 0
    assert "weights  random, from seed 0" in end.out
    assert digest(config.logdir) == uninterrupted_run(config)[0]


def test_second_process_on_the_same_logdir_is_rejected(interrupted_run):
    lock = DirectoryLock(interrupted_run.logdir / ".lock")
    lock.acquire()
    end = resume(interrupted_run)
    lock.release()
    assert end.code == 2
    assert f"is in use by process {os.getpid()} on " in end.err


def fail_with(code: int):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_file_system_without_locks_is_reported_once(tmp_path, monkeypatch, caplog, code):
    monkeypatch.setattr(files, "_reported_missing", set())
    monkeypatch.setattr("fcntl.lockf", fail_with(code))
    for _ in range(2):
        DirectoryLock(tmp_path / ".lock").acquire()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"The file system of {tmp_path} has no locks ({os.strerror(code)}): use it from one process at a time."
    ]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EAGAIN])
def test_lock_of_an_unnamed_process_is_reported(tmp_path, monkeypatch, code):
    monkeypatch.setattr("fcntl.lockf", fail_with(code))
    with pytest.raises(UserError, match=r"is in use by another process; wait for it"):
        DirectoryLock(tmp_path / ".lock").acquire()


def test_world_size_may_change_at_resume_up_to_rounding(config, monkeypatch, data_dir):
    monkeypatch.setattr(train, "build_model", tiny_network)  # without dropout
    finish(dataclasses.replace(config, logdir=config.logdir.with_name("uninterrupted")))
    kill_at(config, "stage1", "epoch_2_step_6.pth")
    finish(config, world_size=2)
    assert "equal up to rounding, not bit-identical" in (config.logdir / "train.log").read_text()
    uninterrupted = config.logdir.with_name("uninterrupted")
    actual_weights = read_weights(config.logdir)
    expected_weights = read_weights(uninterrupted)
    for name, values in expected_weights.items():
        torch.testing.assert_close(actual_weights[name], values, rtol=1e-5, atol=1e-6)
    assert read_losses(config.logdir) == pytest.approx(read_losses(uninterrupted), rel=1e-6)


def read_weights(logdir: Path) -> dict[str, torch.Tensor]:
    return torch.load(logdir / "stage1/last.pth", weights_only=True)["model_state_dict"]


def read_losses(logdir: Path) -> list[float]:
    return [json.loads(line)["train"]["loss"] for line in (logdir / "metrics.jsonl").read_text().splitlines()]


def wait_for_start(logdir: Path, starts: int) -> None:
    """Wait until the run has logged its header `starts` times: from then on it handles signals."""
    log = logdir / "train.log"
    wait_until(lambda: log.exists() and log.read_text().count("INFO code ") >= starts, "the start of the run")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signal_to_one_rank_saves_the_run_and_resume_is_bit_identical(config, name, world_size):
    config = dataclasses.replace(config, checkpoint_every_steps=None, num_workers=1)
    expected, seconds = uninterrupted_run(config, world_size)
    number = getattr(signal, name)
    rng = random.Random(number)
    stopped = started = 0
    while stopped < 3:
        processes = start(config, world_size, command=True)
        wait_for_start(config.logdir, starts=started + 1)
        started += 1
        time.sleep(0.1 + rng.uniform(0, seconds / 2))
        if processes[-1].exitcode is None:
            os.kill(processes[-1].pid, number)
        for process in processes:
            process.join(SECONDS)
        outcome = json.loads((config.logdir / "run.json").read_text())["exit"]
        if outcome == "finished":  # it had finished before the signal
            assert digest(config.logdir) == expected
            shutil.rmtree(config.logdir)
            started = 0
            continue
        assert {process.exitcode for process in processes} == {128 + number}
        assert outcome == f"preempted by {name}"
        stopped += 1
    finish(config, world_size)
    assert digest(config.logdir) == expected


def test_second_signal_ends_the_run_immediately(config, monkeypatch):
    def hang(model, loader, run, config):
        (config.logdir / "hangs").touch()
        wait_until(lambda: run._parts.policy.signals.received, "the first signal")
        (config.logdir / "received").touch()  # one signal does not end the run within a step
        time.sleep(SECONDS)

    monkeypatch.setattr(train, "valid_fn", hang)
    monkeypatch.setattr(signals, "MIN_SECONDS_APART", 0.0)
    [process] = start(config)
    for event, number in (("hangs", signal.SIGTERM), ("received", signal.SIGINT)):
        wait_until((config.logdir / event).exists, event)
        os.kill(process.pid, number)
    process.join(SECONDS)
    assert process.exitcode == 130


def test_checkpoint_is_written_within_an_epoch_after_some_minutes(config):
    config = dataclasses.replace(config, checkpoint_every_steps=None, checkpoint_every_minutes=0.0, stages=STAGES[:1])
    finish(config)
    manifest = json.loads((config.logdir / "stage0/checkpoints.json").read_text())
    assert "epoch_3_step_11.pth" in [entry["file"] for entry in manifest["checkpoints"]]


@CLASSES_ONLY
def test_best_checkpoint_survives_restarts(config, monkeypatch):
    scores = [0.4, 0.9, 0.5, 0.3, 0.2]  # three epochs of the first stage, two of the second
    config = dataclasses.replace(config, ema_decay=None)
    path = config.logdir.with_name("calls")

    def scripted(*_):
        position = int(path.read_text()) if path.exists() else 0
        path.write_text(str(position + 1))
        return {"accuracy": scores[position], "loss": 1.0}

    monkeypatch.setattr(train, "valid_fn", scripted)
    original = train.CheckpointManager.process

    def process_and_die(self, score, epoch, checkpoint):
        original(self, score, epoch, checkpoint)
        self.wait()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(train.CheckpointManager, "process", process_and_die)
    for _ in scores:
        [process] = start(config)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finish(config)
    best = torch.load(config.logdir / "stage0/best.pth", weights_only=True)
    assert (best["epoch"], best["metrics"]["valid"]["accuracy"]) == (2, 0.9)
    assert torch.load(config.logdir / "stage1/best.pth", weights_only=True)["epoch"] == 1
    best_of_run = json.loads((config.logdir / "run.json").read_text())["best"]
    assert best_of_run == {"metric": "accuracy", "score": 0.9, "stage": "stage0", "epoch": 2}


@pytest.mark.parametrize("world_size", [1, 2])
def test_signal_during_the_last_validation_saves_the_run(config, monkeypatch, world_size):
    config = dataclasses.replace(config, ema_decay=None, stages=STAGES[:1])
    expected, _ = uninterrupted_run(config, world_size)
    valid_fn, calls = train.valid_fn, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return valid_fn(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "valid_fn", stop)
        processes = start(config, world_size, command=True)
        for process in processes:
            process.join(SECONDS)
    assert {process.exitcode for process in processes} == {128 + signal.SIGTERM}
    assert json.loads((config.logdir / "run.json").read_text())["exit"] == "preempted by SIGTERM"
    finish(config, world_size)
    assert digest(config.logdir) == expected


def test_changed_code_is_reported_at_resume(config, monkeypatch):
    config = dataclasses.replace(config, stages=STAGES[:1])
    finish(config)
    hashes = hash_code()
    assert {"train.py", "experiment/model.py", "experiment/augmentations.py"} <= set(hashes)
    monkeypatch.setattr("batteries.run.run.hash_code", lambda: hashes | {"experiment/model.py": "another"})
    finish(config)
    log = (config.logdir / "train.log").read_text()
    assert log.count("experiment/model.py changed since the run was saved; the resumed run uses the new code.") == 1


def test_resumed_run_keeps_its_initial_weight_options(config):
    first = dataclasses.replace(config, stages=STAGES[:1], logdir=config.logdir.with_name("first"))
    finish(first)
    best = first.logdir / "stage0/best.pth"
    finish(dataclasses.replace(first, logdir=config.logdir, init_from=best))
    finish(dataclasses.replace(first, logdir=config.logdir))
    assert json.loads((config.logdir / "config.json").read_text())["init_from"] == str(best)


def test_files_are_checked_at_the_first_start_and_not_at_a_resume(config, monkeypatch, tmp_path):
    checked = tmp_path / "checked.txt"

    def check_files(*_) -> None:
        with checked.open("a") as file:
            file.write("checked\n")

    monkeypatch.setattr(train, "check_files", check_files)
    finish(config)
    finish(dataclasses.replace(config, resume=True))
    assert checked.read_text() == "checked\n"
