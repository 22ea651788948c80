"""Crash-exact resume: a run that is killed at any instant and resumed ends bit-identical to an uninterrupted run."""

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from models import CHANNELS
from processes import End, join_ranks, run_train
from small_data import change_one_sample, make_data
from torch import nn

import train
from batteries.core import command_line, signals
from batteries.core.config_io import to_json
from batteries.core.files import DirectoryLock
from batteries.distributed.connectivity import find_free_port
from batteries.run.metadata import hash_code
from train import Config, Stage

STAGES = (Stage("stage0", 3, 1e-2), Stage("stage1", 2, 1e-3, "plateau"))


def dropout_network(num_classes: int) -> nn.Module:
    """Build a small network with dropout and batch norm, so that any state that is not restored changes the result."""
    layers = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(CHANNELS * 16, 16), nn.BatchNorm1d(16)]
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(16, num_classes))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(monkeypatch, data_dir, tmp_path) -> Config:
    monkeypatch.setattr(train, "build_model", dropout_network)
    return Config(
        stages=STAGES,
        accumulation_steps=2,
        mixup=0.2,
        cutmix=1.0,
        data_dir=data_dir,
        split_file=tmp_path / "splits.csv",
        device="cpu",
        tracker=("none",),
        num_workers=0,
        limit_batches=4,  # the smallest test data have no more
        save_n_best=1,
        ema_decay=0.9,
        clip_norm=1.0,
        patience=5,
        checkpoint_every_steps=2,
        resume=True,
        logdir=tmp_path / "run",
    )


def start(config: Config, world_size: int = 1, command: bool = False) -> list:
    """Start a run and return its processes, one for each rank; forked, so that nothing is imported again.

    Args:
        config: The options.
        world_size: The number of ranks.
        command: Whether a process ends as the command line does, with its exit code.
    """
    port = find_free_port()

    def rank_main(rank: int) -> None:
        os.setpgrp()  # so that a signal also reaches the loader processes
        if world_size > 1:
            join_ranks(rank, world_size, port)
        if command:
            sys.argv = ["train.py"]
            command_line.run_command(lambda _: train.main(config), Config)
        else:
            train.main(config)

    processes = [get_context("fork").Process(target=rank_main, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    return processes


def finish(config: Config, world_size: int = 1) -> None:
    for process in start(config, world_size):
        process.join(120)
        assert process.exitcode == 0


def kill_after(seconds: float, config: Config, world_size: int = 1) -> bool:
    """Start the run and send SIGKILL after some seconds; return whether it was still running."""
    processes = start(config, world_size)
    time.sleep(seconds)
    running = all(process.exitcode is None for process in processes)
    for process in processes:
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    return running


def digest(logdir: Path) -> dict[str, str]:
    """Return the sha256 of the state in the last and best checkpoint of each stage, and of metrics.jsonl."""
    found = {"metrics": hashlib.sha256((logdir / "metrics.jsonl").read_bytes()).hexdigest()}
    for file in sorted(logdir.glob("stage*/*.pth")):
        if file.name in ("best.pth", "last.pth"):
            checkpoint = torch.load(file, weights_only=True)
            names = ("model", "optimizer", "scheduler", "scaler", "ema", "stopping")
            state = [checkpoint[f"{name}_state_dict"] for name in names]
            found[f"{file.parent.name}/{file.name}"] = f"{hash_of(state)} of epoch {checkpoint['epoch']}"
    return found


def hash_of(value) -> str:
    """Return the sha256 of nested tensors and plain values."""
    if isinstance(value, torch.Tensor):
        data = value.contiguous().numpy().tobytes()
    elif isinstance(value, dict):
        data = "".join(f"{name}:{hash_of(item)}" for name, item in value.items()).encode()
    elif isinstance(value, list | tuple):
        data = "".join(hash_of(item) for item in value).encode()
    else:
        data = repr(value).encode()
    return hashlib.sha256(data).hexdigest()


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 16}, "--batch-size was 32 and is 16; give --batch-size 32, or use another --logdir."),
        ({"seed": 1}, "--seed was 0 and is 1"),
        ({"fold": 1}, "--fold was 0 and is 1"),
        ({"accumulation_steps": 1}, "--accumulation-steps was 2 and is 1"),
        ({"tf32": False}, "--tf32 was True and is False; give --tf32, or use another --logdir."),
        ({"scores": ("roc_auc",)}, "--scores was [] and is ['roc_auc']; leave --scores out, or use another --logdir."),
        (
            {"stages": (STAGES[0], dataclasses.replace(STAGES[1], name="tuned"))},
            "--stages.1.name was stage1",
        ),
        (
            {"stages": (Stage("stage0", 4, 1e-2), STAGES[1])},
            "--stages.0.epochs was 3 and is 4; give --stages",
        ),
        ({"ema_decay": None}, "--ema-decay was 0.9 and is None; give --ema-decay 0.9, or use another --logdir."),
        ({"precision": "bf16"}, "--precision was fp32 and is bf16"),
        ({"stages": (STAGES[0], Stage("stage1", 2, 2e-3))}, "--stages.1.lr was 0.001 and is 0.002; give"),
    ],
)
def test_changed_option_is_rejected_at_resume(interrupted_run, changes, message):
    before = {path: path.read_bytes() for path in interrupted_run.logdir.rglob("[!.]*") if path.is_file()}
    end = resume(interrupted_run, **changes)
    assert end.code == 2
    assert message in end.err
    assert end.err.count("\n") == 1
    assert {path: path.read_bytes() for path in before} == before


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
        rows = [",".join([*row[:2], swapped.get(row[2], row[2]), *row[3:]]) for row in cells]
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
    assert "epoch_2_step_6.pth does not fit the architecture of the model (missing: 0.2.weight" in end.err
    assert {path: path.read_bytes() for path in before} == before


def test_changed_versions_are_reported_at_resume(interrupted_run, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    end = resume(interrupted_run)
    assert end.code == 0, end.err
    changes = r"Changed since the run was saved: torch \S+ -> 9\.9\.9\. "
    assert re.search(changes + r"The results are equal up to rounding, not bit-identical\.\n", end.out)


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


def test_world_size_may_change_at_resume_up_to_rounding(config, monkeypatch, data_dir):
    layers = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(CHANNELS * 16, 10)]
    monkeypatch.setattr(train, "build_model", lambda num_classes: nn.Sequential(*layers))  # without dropout
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
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if (logdir / "train.log").exists() and (logdir / "train.log").read_text().count("INFO code ") >= starts:
            return
        time.sleep(0.01)
    raise AssertionError("the run does not start")


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
            process.join(60)
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
    def hang(*_):
        (config.logdir / "hangs").touch()
        time.sleep(60)

    monkeypatch.setattr(train, "valid_fn", hang)
    monkeypatch.setattr(signals, "MIN_SECONDS_APART", 0.0)
    [process] = start(config)
    until = time.monotonic() + 60
    while not (config.logdir / "hangs").exists() and time.monotonic() < until:
        time.sleep(0.01)
    for number in (signal.SIGTERM, signal.SIGINT):
        assert process.exitcode is None  # one signal does not end the run within a step
        os.kill(process.pid, number)
        process.join(1)
    assert process.exitcode == 130


def test_checkpoint_is_written_within_an_epoch_after_some_minutes(config):
    config = dataclasses.replace(config, checkpoint_every_steps=None, checkpoint_every_minutes=0.0, stages=STAGES[:1])
    finish(config)
    manifest = json.loads((config.logdir / "stage0/checkpoints.json").read_text())
    assert "epoch_3_step_11.pth" in [entry["file"] for entry in manifest["checkpoints"]]


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
            process.join(60)
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
