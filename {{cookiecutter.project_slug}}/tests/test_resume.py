"""L1, crash-exact: a run that is killed at any instant and resumed ends bit for bit as one that was not."""

import dataclasses
import hashlib
import json
import os
import random
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
from batteries.core import command_line as cli
from batteries.core import signals as interrupts
from batteries.core.config_io import to_json
from batteries.core.files import DirectoryLock
from batteries.distributed.connectivity import find_free_port
from batteries.run.metadata import hash_code
from train import Config, Stage

STAGES = (Stage("stage0", 3, 1e-2), Stage("stage1", 2, 1e-3, "plateau"))


def dropout_network(num_classes: int) -> nn.Module:
    """Small, with dropout and batch norm, so that everything that can differ would."""
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
        limit_batches=4,  # the smallest data of the tests give no more
        save_n_best=1,
        ema_decay=0.9,
        clip_norm=1.0,
        patience=5,
        checkpoint_every_steps=2,
        resume=True,
        logdir=tmp_path / "run",
    )


def start(config: Config, world_size: int = 1, command: bool = False) -> list:
    """The processes of a run, one for each rank, forked from here so that nothing is imported anew.

    With `command` they end as the command line does, with its exit code.
    """
    port = find_free_port()

    def rank_main(rank: int) -> None:
        os.setpgrp()  # so that a kill reaches the workers of its loader as well
        if world_size > 1:
            join_ranks(rank, world_size, port)
        if command:
            sys.argv = ["train.py"]
            cli.run_command(lambda _: train.main(config), Config)
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
    """Start the run and end it with SIGKILL; whether it was still running."""
    processes = start(config, world_size)
    time.sleep(seconds)
    running = all(process.exitcode is None for process in processes)
    for process in processes:
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    return running


def digest(logdir: Path) -> dict[str, str]:
    """sha256 of all that the last and the best checkpoint of each stage hold, and of the metrics."""
    found = {"metrics": hashlib.sha256((logdir / "metrics.jsonl").read_bytes()).hexdigest()}
    for file in sorted(logdir.glob("stage*/*.pth")):
        if file.name in ("best.pth", "last.pth"):
            checkpoint = torch.load(file, weights_only=True)
            parts = ("model", "optimizer", "scheduler", "scaler", "ema", "stopping")
            state = [checkpoint[f"{part}_state_dict"] for part in parts]
            found[f"{file.parent.name}/{file.name}"] = f"{hash_of(state)} of epoch {checkpoint['epoch']}"
    return found


def hash_of(value) -> str:
    """sha256 over nested tensors and plain values."""
    if isinstance(value, torch.Tensor):
        data = value.contiguous().numpy().tobytes()
    elif isinstance(value, dict):
        data = "".join(f"{name}:{hash_of(part)}" for name, part in value.items()).encode()
    elif isinstance(value, list | tuple):
        data = "".join(hash_of(part) for part in value).encode()
    else:
        data = repr(value).encode()
    return hashlib.sha256(data).hexdigest()


def whole_run(config: Config, world_size: int = 1) -> tuple[dict[str, str], float]:
    """What the run ends with when nobody kills it, and how long it takes; made once for each config."""
    whole = dataclasses.replace(config, logdir=config.logdir.with_name("whole"))
    key = repr(dataclasses.replace(config, logdir=Path(), split_file=Path())), world_size
    if key not in WHOLE_RUNS:
        begin = time.monotonic()
        finish(whole, world_size)
        WHOLE_RUNS[key] = digest(whole.logdir), time.monotonic() - begin
    return WHOLE_RUNS[key]


WHOLE_RUNS: dict[tuple[str, int], tuple[dict[str, str], float]] = {}


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
def test_a_run_killed_at_random_instants_ends_as_one_that_was_not(
    config, num_workers, world_size, kills, checkpoint_every_steps
):
    config = dataclasses.replace(config, num_workers=num_workers, checkpoint_every_steps=checkpoint_every_steps)
    wanted, seconds = whole_run(config, world_size)
    assert len(wanted) == 5
    chance = random.Random(num_workers + checkpoint_every_steps)
    done = 0
    while done < kills:
        if kill_after(chance.uniform(0, seconds), config, world_size):
            done += 1
        else:  # it had ended: the next kills fall on a new run
            assert digest(config.logdir) == wanted
            shutil.rmtree(config.logdir)
    finish(config, world_size)
    assert digest(config.logdir) == wanted


def kill_at(config: Config, stage: str, file: str) -> None:
    """Start the run and end it with SIGKILL right after it has saved `file`."""
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
def cut_run(config, cuts) -> Config:
    """A run that was killed within the second epoch of its second stage, with a checkpoint in that epoch."""
    if not cuts.exists():
        kill_at(config, "stage1", "epoch_2_step_6.pth")
        shutil.copytree(config.logdir, cuts)
        shutil.copy(config.split_file, cuts.with_suffix(".csv"))
    else:
        shutil.copytree(cuts, config.logdir)
        shutil.copy(cuts.with_suffix(".csv"), config.split_file)
        record = json.loads((config.logdir / "run.json").read_text())
        record["split"]["file"] = str(config.split_file)
        (config.logdir / "run.json").write_text(json.dumps(record))
    return config


@pytest.fixture(scope="session")
def cuts(tmp_path_factory) -> Path:
    """Where the first cut run is kept for the tests that want one like it."""
    return tmp_path_factory.mktemp("cuts") / "run"


def resume(config: Config, **changes) -> End:
    """The end of `python train.py --resume` with this config."""
    path = config.logdir.with_name("config.json")
    path.write_text(json.dumps(to_json(dataclasses.replace(config, **changes))))
    return run_train(train.main, Config, "--config", str(path), "--resume")


def test_a_resumed_run_says_where_it_goes_on(cut_run):
    end = resume(cut_run)
    assert end.code == 0, end.err
    where = "stage1/epoch_2_step_6.pth, in stage1 epoch 2 after 2 steps"
    assert f"weights  resumed from {cut_run.logdir}/{where}" in end.out
    record = json.loads((cut_run.logdir / "run.json").read_text())
    assert len(record["resumed"]) == 1
    assert record["exit"] == "finished"


@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "remove"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(cut_run, damage):
    wanted, _ = whole_run(cut_run)
    path = cut_run.logdir / "stage1/epoch_2_step_6.pth"
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
    end = resume(cut_run)
    assert end.code == 0, end.err
    assert f"{path} is " in end.out
    assert "The run goes on from stage1/epoch_1.pth; 2 steps of it are done again." in end.out
    assert (path.with_name(f"{path.name}.corrupt").exists()) == (damage != "remove")
    assert digest(cut_run.logdir) == wanted


def test_a_stage_whose_checkpoints_are_all_damaged_is_done_again_from_the_stage_before(cut_run):
    wanted, _ = whole_run(cut_run)
    for path in (cut_run.logdir / "stage1").glob("epoch_*.pth"):
        path.write_bytes(b"torn")
    end = resume(cut_run)
    assert end.code == 0, end.err
    assert "The run goes on from stage0/epoch_3.pth; 6 steps of stage1 are done again." in end.out
    assert digest(cut_run.logdir) == wanted


def test_where_no_checkpoint_is_sound_the_run_is_refused_and_never_started_afresh(cut_run):
    for path in cut_run.logdir.glob("stage*/epoch_*.pth"):
        path.write_bytes(b"torn")
    metrics = (cut_run.logdir / "metrics.jsonl").read_bytes()
    end = resume(cut_run)
    assert end.code == 2
    assert "--resume finds no sound checkpoint in " in end.err
    assert (cut_run.logdir / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("file", ["stage1/checkpoints.json", "run.json", "metrics.jsonl"])
def test_a_damaged_record_is_refused_by_name(cut_run, file):
    (cut_run.logdir / file).write_text("{torn\n")
    end = resume(cut_run)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert f"{cut_run.logdir}/{file} is damaged" in end.err


def test_a_damaged_end_of_an_epoch_gives_way_to_the_checkpoint_at_its_last_step(config):
    kill_at(config, "stage0", "epoch_1_step_2.pth")
    finish(config := dataclasses.replace(config, stages=STAGES[:1]))
    last = config.logdir / "stage0/epoch_3.pth"
    last.write_bytes(b"torn")
    assert resume(config).code == 0
    assert last.with_name("epoch_3.pth.corrupt").exists()


@pytest.mark.parametrize("lost", ["the file", "the last line"])
def test_metrics_that_lack_an_epoch_are_refused_by_name(cut_run, lost):
    path = cut_run.logdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if lost == "the file":
        path.unlink()
    else:
        path.write_text("".join(lines[:3]))  # stage0 alone, and the run is in stage1
    end = resume(cut_run)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert f"{path} lacks the epoch before that of {cut_run.logdir}/stage1/epoch_2_step_6.pth; put it back" in end.err


def test_a_missing_ledger_is_refused_by_name(cut_run):
    (cut_run.logdir / "stage1/checkpoints.json").unlink()
    end = resume(cut_run)
    assert end.code == 2
    assert f"{cut_run.logdir}/stage1/checkpoints.json is missing" in end.err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 16}, "--batch-size was 32 and is 16; give --batch-size 32, or another --logdir."),
        ({"seed": 1}, "--seed was 0 and is 1"),
        ({"fold": 1}, "--fold was 0 and is 1"),
        ({"accumulation_steps": 1}, "--accumulation-steps was 2 and is 1"),
        ({"tf32": False}, "--tf32 was True and is False; give --tf32, or another --logdir."),
        ({"scores": ("roc_auc",)}, "--scores was [] and is ['roc_auc']; leave --scores out, or another --logdir."),
        (
            {"stages": (STAGES[0], dataclasses.replace(STAGES[1], name="tuned"))},
            "--stages.1.name was stage1",
        ),
        (
            {"stages": (Stage("stage0", 4, 1e-2), STAGES[1])},
            "--stages.0.epochs was 3 and is 4; give --stages",
        ),
        ({"ema_decay": None}, "--ema-decay was 0.9 and is None; give --ema-decay 0.9, or another --logdir."),
        ({"precision": "bf16"}, "--precision was fp32 and is bf16"),
        ({"stages": (STAGES[0], Stage("stage1", 2, 2e-3))}, "--stages.1.lr was 0.001 and is 0.002; give"),
    ],
)
def test_another_run_is_not_resumed_and_the_difference_is_named(cut_run, changes, sentence):
    before = {path: path.read_bytes() for path in cut_run.logdir.rglob("[!.]*") if path.is_file()}
    end = resume(cut_run, **changes)
    assert end.code == 2
    assert sentence in end.err
    assert end.err.count("\n") == 1
    assert {path: path.read_bytes() for path in before} == before


def test_other_data_are_not_resumed(cut_run, monkeypatch, tmp_path):
    load_dataset = train.load_dataset

    def load_changed(data_dir):
        shutil.copytree(data_dir, tmp_path / "changed")
        return change_one_sample(load_dataset(tmp_path / "changed"))

    monkeypatch.setattr(train, "load_dataset", load_changed)
    end = resume(cut_run)
    assert end.code == 2
    assert "the data or their split are not those of " in end.err


@pytest.mark.parametrize("change", ["another fold", "the order of its rows", "another file"])
def test_a_split_file_that_was_edited_since_is_not_resumed(cut_run, change):
    path = cut_run.split_file
    header, *rows = path.read_text().splitlines()
    if change == "another fold":  # groups stay whole
        swapped = {"3": "4", "4": "3"}
        parts = [row.split(",") for row in rows]
        rows = [",".join([*part[:2], swapped.get(part[2], part[2]), *part[3:]]) for part in parts]
    else:
        rows.reverse()
    path.write_text("\n".join([header, *rows]) + "\n")
    if change == "another file":
        cut_run = dataclasses.replace(cut_run, split_file=path.rename(path.with_name("other.csv")))
    before = (cut_run.logdir / "run.json").read_bytes()
    end = resume(cut_run)
    assert (end.code, end.err.count("\n")) == (2, 1)
    assert f"--resume would change the run: {cut_run.split_file} is not what the run began with, {path} of sha256" in (
        end.err
    )
    assert (cut_run.logdir / "run.json").read_bytes() == before


def test_a_split_file_may_lie_elsewhere_when_the_run_goes_on(cut_run):
    wanted, _ = whole_run(cut_run)
    moved = cut_run.split_file.rename(cut_run.split_file.with_name("moved.csv"))
    end = resume(cut_run, split_file=moved)
    assert end.code == 0, end.err
    assert digest(cut_run.logdir) == wanted


def test_another_model_is_not_resumed(cut_run, monkeypatch):
    monkeypatch.setattr(train, "build_model", lambda num_classes: nn.Sequential(dropout_network(num_classes)))
    before = {path: path.read_bytes() for path in cut_run.logdir.rglob("[!.]*") if path.is_file()}
    end = resume(cut_run)
    assert end.code == 2
    assert "epoch_2_step_6.pth is of another architecture than the model (missing: 0.2.weight" in end.err
    assert {path: path.read_bytes() for path in before} == before


def test_other_versions_are_said_to_change_the_rounding(cut_run, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    end = resume(cut_run)
    assert end.code == 0, end.err
    assert " before and 9.9.9 now: it goes on equal to rounding, not bit for bit." in end.out


def test_an_early_end_survives_a_kill_and_its_stage_is_not_gone_on_with(config, monkeypatch):
    """The stage ends at its second epoch; the run is killed right after that checkpoint."""
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
        *(("stage0", 1), ("stage0", 2), ("stage1", 1), ("stage1", 2))
    ]


def test_what_changes_no_number_may_change(cut_run):
    wanted, _ = whole_run(cut_run)
    assert resume(cut_run, num_workers=2, checkpoint_every_steps=None, show_warnings=True).code == 0
    assert digest(cut_run.logdir) == wanted


def test_a_stage_that_has_not_begun_may_change(config):
    first = dataclasses.replace(config, stages=STAGES[:1])
    finish(first)
    assert resume(config).code == 0
    wanted, _ = whole_run(config)
    assert digest(config.logdir) == wanted


def test_a_finished_run_says_so_and_changes_no_number(config):
    finish(config)
    before = digest(config.logdir)
    end = resume(config)
    assert end.code == 0
    assert "finished already" in end.out
    assert digest(config.logdir) == before


def test_resume_starts_a_run_where_there_is_none(config):
    end = resume(config)
    assert end.code == 0
    assert "weights  random, from seed 0" in end.out
    assert digest(config.logdir) == whole_run(config)[0]


def test_a_second_process_on_the_same_logdir_is_refused(cut_run):
    lock = DirectoryLock(cut_run.logdir / ".lock")
    lock.acquire()
    end = resume(cut_run)
    lock.release()
    assert end.code == 2
    assert f"is in use by process {os.getpid()} on " in end.err


def test_ranks_may_change_at_a_resume_and_then_weights_agree_to_rounding_and_it_is_said(config, monkeypatch, data_dir):
    layers = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(CHANNELS * 16, 10)]
    monkeypatch.setattr(train, "build_model", lambda num_classes: nn.Sequential(*layers))  # without dropout
    finish(dataclasses.replace(config, logdir=config.logdir.with_name("whole")))
    kill_at(config, "stage1", "epoch_2_step_6.pth")
    finish(config, world_size=2)
    assert "equal to rounding, not bit for bit" in (config.logdir / "train.log").read_text()
    ours, theirs = (
        torch.load(logdir / "stage1/last.pth", weights_only=True)["model_state_dict"]
        for logdir in (config.logdir, config.logdir.with_name("whole"))
    )
    for name, values in theirs.items():
        torch.testing.assert_close(ours[name], values, rtol=1e-5, atol=1e-6)
    ours, theirs = (
        [json.loads(line)["train"]["loss"] for line in (logdir / "metrics.jsonl").read_text().splitlines()]
        for logdir in (config.logdir, config.logdir.with_name("whole"))
    )
    assert ours == pytest.approx(theirs, rel=1e-6)


def wait_for_start(logdir: Path, starts: int) -> None:
    """Wait until the run has said for the `starts`-th time where it begins: from then on it listens to signals."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if (logdir / "train.log").exists() and (logdir / "train.log").read_text().count("INFO code ") >= starts:
            return
        time.sleep(0.01)
    raise AssertionError("the run does not start")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_to_one_rank_saves_the_run_on_all_and_it_goes_on_bit_for_bit(config, name, world_size):
    config = dataclasses.replace(config, checkpoint_every_steps=None, num_workers=1)
    wanted, seconds = whole_run(config, world_size)
    number = getattr(signal, name)
    chance = random.Random(number)
    stopped = started = 0
    while stopped < 3:
        processes = start(config, world_size, command=True)
        wait_for_start(config.logdir, starts=started + 1)
        started += 1
        time.sleep(0.1 + chance.uniform(0, seconds / 2))
        if processes[-1].exitcode is None:
            os.kill(processes[-1].pid, number)
        for process in processes:
            process.join(60)
        exit_said = json.loads((config.logdir / "run.json").read_text())["exit"]
        if exit_said == "finished":  # it had ended before the signal came
            assert digest(config.logdir) == wanted
            shutil.rmtree(config.logdir)
            started = 0
            continue
        assert {process.exitcode for process in processes} == {128 + number}
        assert exit_said == f"preempted by {name}"
        stopped += 1
    finish(config, world_size)
    assert digest(config.logdir) == wanted


def test_a_second_signal_ends_the_run_at_once(config, monkeypatch):
    def hang(*_):
        (config.logdir / "hangs").touch()
        time.sleep(60)

    monkeypatch.setattr(train, "valid_fn", hang)
    monkeypatch.setattr(interrupts, "SECONDS_APART", 0.0)
    [process] = start(config)
    until = time.monotonic() + 60
    while not (config.logdir / "hangs").exists() and time.monotonic() < until:
        time.sleep(0.01)
    for number in (signal.SIGTERM, signal.SIGINT):
        assert process.exitcode is None  # one signal alone is waited with until the step is done
        os.kill(process.pid, number)
        process.join(1)
    assert process.exitcode == 130


def test_a_checkpoint_is_written_within_the_epoch_when_the_minutes_are_over(config):
    config = dataclasses.replace(config, checkpoint_every_steps=None, checkpoint_every_minutes=0.0, stages=STAGES[:1])
    finish(config)
    ledger = json.loads((config.logdir / "stage0/checkpoints.json").read_text())
    assert "epoch_3_step_11.pth" in [row["file"] for row in ledger["checkpoints"]]


def test_the_best_checkpoint_survives_restarts(config, monkeypatch):
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
def test_a_signal_in_the_last_validation_ends_the_run_saved_and_it_goes_on_to_the_same_end(
    config, monkeypatch, world_size
):
    config = dataclasses.replace(config, ema_decay=None, stages=STAGES[:1])
    wanted, _ = whole_run(config, world_size)
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
    assert digest(config.logdir) == wanted


def test_code_that_changed_since_the_run_was_saved_is_named_at_its_resume(config, monkeypatch):
    config = dataclasses.replace(config, stages=STAGES[:1])
    finish(config)
    hashes = hash_code()
    assert {"train.py", "experiment/model.py", "experiment/augmentations.py"} <= set(hashes)
    monkeypatch.setattr("batteries.run.run.hash_code", lambda: hashes | {"experiment/model.py": "another"})
    finish(config)
    said = (config.logdir / "train.log").read_text()
    assert said.count("experiment/model.py changed since the run was saved: it goes on with the new code.") == 1


def test_a_run_that_goes_on_remembers_which_weights_it_began_with(config):
    first = dataclasses.replace(config, stages=STAGES[:1], logdir=config.logdir.with_name("first"))
    finish(first)
    best = first.logdir / "stage0/best.pth"
    finish(dataclasses.replace(first, logdir=config.logdir, init_from=best))
    finish(dataclasses.replace(first, logdir=config.logdir))
    assert json.loads((config.logdir / "config.json").read_text())["init_from"] == str(best)
