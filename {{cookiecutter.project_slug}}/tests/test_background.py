"""Tests of checkpoints written in the background, and of full disks."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from models import tiny_network
from processes import SECONDS, End, run_ranks, run_train
from small_data import make_data

import train
from batteries.checkpoint import manager
from batteries.checkpoint.async_writer import AsyncWriter, HostBuffers
from batteries.checkpoint.io import load_checkpoint, make_checkpoint
from batteries.checkpoint.manager import CheckpointManager
from batteries.core.config_io import to_json
from batteries.core.errors import UserError
from batteries.core.files import append_text
from batteries.core.jsonl import JsonlWriter
from train import Config, Stage


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """An event; no checkpoint is written until it is set."""
    gate = threading.Event()
    write = manager.save_checkpoint

    def wait_and_write(path, checkpoint):
        assert gate.wait(SECONDS)
        return write(path, checkpoint)

    monkeypatch.setattr(manager, "save_checkpoint", wait_and_write)
    return gate


def weights_of(path: Path) -> torch.Tensor:
    return torch.load(path, weights_only=True)["model_state_dict"]["weight"]


def make_example(model: torch.nn.Module, epoch: int) -> dict:
    return make_checkpoint("stage0", epoch, model, step=epoch * 10)


def test_save_returns_before_the_write_and_has_the_state_of_the_call(tmp_path, gate):
    model = torch.nn.Linear(3, 3)
    expected = model.weight.detach().clone()
    manager = CheckpointManager(tmp_path, writer=AsyncWriter())
    manager.process(score=0.5, epoch=1, checkpoint=make_example(model, 1))
    assert list(tmp_path.glob("*")) == []
    with torch.no_grad():
        model.weight += 1  # training continues
    gate.set()
    manager.wait()
    assert torch.equal(weights_of(tmp_path / "best.pth"), expected)


def test_each_of_several_saves_has_the_state_of_its_call(tmp_path):
    model = torch.nn.Linear(300, 300)
    manager = CheckpointManager(tmp_path, save_n_best=10, writer=AsyncWriter())
    for epoch in range(1, 9):
        torch.nn.init.constant_(model.weight, float(epoch))
        manager.process(score=epoch / 10, epoch=epoch, checkpoint=make_example(model, epoch))
    manager.wait()
    for epoch in range(1, 9):
        assert (weights_of(tmp_path / f"epoch_{epoch}.pth") == epoch).all()


def test_best_path_waits_for_the_pending_save(tmp_path, gate):
    manager = CheckpointManager(tmp_path, writer=AsyncWriter())
    manager.process(score=0.5, epoch=1, checkpoint=make_example(torch.nn.Linear(2, 2), 1))
    threading.Timer(0.1, gate.set).start()
    assert load_checkpoint(manager.best_path(), torch.nn.Linear(2, 2))["epoch"] == 1


def test_copied_state_is_equal_and_has_separate_memory():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "plain": [1, (2.5, None), "x"]}
    copy = HostBuffers().copy(state)
    assert copy["plain"] == state["plain"]
    assert copy["model"]._metadata == state["model"]._metadata
    assert copy["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    for name, tensor in state["model"].items():
        assert torch.equal(copy["model"][name], tensor)
        assert copy["model"][name].data_ptr() != tensor.data_ptr()


def test_repeated_tensor_is_copied_once_and_memory_is_reused():
    weight = torch.randn(5, 5)
    buffers = HostBuffers()
    first = buffers.copy({"a": weight, "b": weight})
    assert first["a"] is first["b"]
    assert buffers.copy({"a": weight})["a"] is first["a"]


class Moments(NamedTuple):
    """A named tuple in a state, as a custom optimizer could have one."""

    mean: torch.Tensor
    count: int


def test_named_tuples_are_copied():
    moments = Moments(torch.randn(3), 2)
    copy = HostBuffers().copy({"moments": moments, "shape": moments.mean.shape})
    assert type(copy["moments"]) is Moments
    assert torch.equal(copy["moments"].mean, moments.mean)
    assert copy["moments"].mean.data_ptr() != moments.mean.data_ptr()
    assert copy["moments"].count == 2
    assert copy["shape"] == torch.Size([3])


def test_write_error_is_raised_by_the_next_save_on_all_ranks(tmp_path, monkeypatch):
    def fail(path, checkpoint):
        raise RuntimeError("the disk is on fire")

    def save_twice() -> str:
        manager = CheckpointManager(tmp_path, writer=AsyncWriter())
        manager.process(score=0.5, epoch=1, checkpoint=make_example(torch.nn.Linear(2, 2), 1))
        with pytest.raises(RuntimeError) as error:
            manager.process(score=0.6, epoch=2, checkpoint=make_example(torch.nn.Linear(2, 2), 2))
        return str(error.value)

    monkeypatch.setattr(manager, "save_checkpoint", fail)
    assert run_ranks(2, save_twice) == ["the disk is on fire"] * 2


@pytest.fixture
def config(monkeypatch, tmp_path) -> Config:
    monkeypatch.setattr(train, "build_model", tiny_network)
    return Config(
        stages=(Stage("stage0", 4, 1e-2),),
        data_dir=make_data(tmp_path / "data"),
        device="cpu",
        tracker=("none",),
        num_workers=0,
        limit_batches=2,
        save_n_best=1,
        logdir=tmp_path / "run",
    )


def command(config: Config, *flags: str) -> End:
    """Run `python train.py` with this config."""
    path = config.data_dir.with_name("config.json")
    path.write_text(json.dumps(to_json(config)))
    return run_train(train.main, Config, "--config", str(path), *flags)


def test_write_error_ends_the_run_with_its_cause(config, monkeypatch):
    def fail(path, checkpoint):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(manager, "save_checkpoint", fail)
    end = command(config)
    assert end.code == 1
    assert "RuntimeError: the disk is on fire" in end.err
    assert json.loads((config.logdir / "run.json").read_text())["exit"] == "failed: RuntimeError: the disk is on fire"


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A separate file system of 1 MB."""
    monkeypatch.setattr("batteries.run.run.uncommitted_diff", lambda: None)  # git.diff could fill the disk
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


def fill(directory: Path) -> None:
    """Fill the disk."""
    with (directory / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def check_manifest(directory: Path) -> dict:
    """Compare the manifest with its files, and return it."""
    manifest = json.loads((directory / "checkpoints.json").read_text())
    for entry in manifest["checkpoints"]:
        data = (directory / entry["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
    return manifest


def test_one_full_disk_is_tolerated_and_best_is_on_disk(small_disk, caplog):
    manager = CheckpointManager(small_disk / "stage0", writer=AsyncWriter())
    model = torch.nn.Linear(100, 100)

    def save(epoch: int, score: float) -> bool:
        return manager.process(score=score, epoch=epoch, checkpoint=make_example(model, epoch))

    save(1, 0.5)
    manager.wait()
    fill(small_disk)
    assert save(2, 0.9)
    assert manager.is_better(0.6)  # 0.9 was not saved
    assert check_manifest(small_disk / "stage0")["best"] == {"epoch": 1, "score": 0.5}
    files = {path.name for path in (small_disk / "stage0").iterdir()}
    assert files == {"epoch_1.pth", "best.pth", "last.pth", "checkpoints.json"}
    (small_disk / "filler").unlink()
    assert save(3, 0.6)
    manager.wait()
    assert [entry["epoch"] for entry in check_manifest(small_disk / "stage0")["checkpoints"]] == [1, 3]
    assert torch.load(small_disk / "stage0/best.pth", weights_only=True)["epoch"] == 3


def test_second_full_disk_fails_with_the_size_that_is_needed(small_disk):
    manager = CheckpointManager(small_disk / "stage0", writer=AsyncWriter())
    model = torch.nn.Linear(100, 100)  # 40.4 kB
    for epoch in (1, 2):
        manager.process(score=0.5, epoch=epoch, checkpoint=make_example(model, epoch))
        if epoch == 1:
            manager.wait()
            fill(small_disk)
    assert manager.is_better(0.6)
    manager.process(score=0.6, epoch=3, checkpoint=make_example(model, 3))
    with pytest.raises(
        UserError, match=r"epoch_3\.pth cannot be written: it needs 40\.4 kB, and the disk has 0 bytes free"
    ):
        manager.is_better(0.7)
    assert [entry["epoch"] for entry in check_manifest(small_disk / "stage0")["checkpoints"]] == [1]


def test_full_disk_in_the_last_save_is_not_tolerated(small_disk):
    manager = CheckpointManager(small_disk / "stage0", writer=AsyncWriter())
    (small_disk / "stage0").mkdir()
    fill(small_disk)
    manager.process(score=0.5, epoch=1, checkpoint=make_example(torch.nn.Linear(100, 100), 1))
    with pytest.raises(UserError, match="cannot be written"):
        manager.wait()
    assert manager.best_score is None


@pytest.mark.parametrize("freed", [True, False])
def test_run_with_a_full_disk_ends_bit_identical(config, small_disk, monkeypatch, freed):
    command(config)
    expected = final_state(config.logdir)
    config = dataclasses.replace(config, logdir=small_disk / "run")
    valid_fn = train.valid_fn
    calls = []

    def fill_and_validate(*arguments):
        calls.append(1)
        if len(calls) == 2:
            fill(small_disk)
        elif len(calls) == 3 and freed:
            (small_disk / "filler").unlink()
        return valid_fn(*arguments)

    monkeypatch.setattr(train, "valid_fn", fill_and_validate)
    end = command(config)
    assert "epoch_2.pth cannot be written" in end.out
    assert "Traceback" not in end.err
    if not freed:
        assert end.code == 2
        assert end.err.startswith(f"error: {small_disk}/run/stage0/epoch_3.pth cannot be written: it needs ")
        (small_disk / "filler").unlink()
        monkeypatch.setattr(train, "valid_fn", valid_fn)
        end = command(config, "--resume")
    assert end.code == 0, end.err
    assert final_state(config.logdir) == expected


def final_state(logdir: Path) -> tuple[bytes, list[torch.Tensor]]:
    """Return the bytes of metrics.jsonl and of the last weights."""
    weights = torch.load(logdir / "stage0/last.pth", weights_only=True)["model_state_dict"]
    metrics = (logdir / "metrics.jsonl").read_bytes()
    assert len(metrics.splitlines()) == 4
    return metrics, [tensor.numpy().tobytes() for tensor in weights.values()]


def test_lines_lost_to_a_full_disk_are_written_by_a_resumed_run(config, small_disk, monkeypatch):
    command(config)
    expected = final_state(config.logdir)
    config = dataclasses.replace(config, logdir=small_disk / "run")
    write = JsonlWriter.write
    process = train.CheckpointManager.process

    def process_and_kill(self, score, epoch, checkpoint):
        process(self, score, epoch, checkpoint)
        if epoch == 2:
            self.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(JsonlWriter, "write", lambda *_, **__: None)  # as if there were space only for checkpoints
    monkeypatch.setattr(train.CheckpointManager, "process", process_and_kill)
    assert command(config).code == -signal.SIGKILL
    assert not (config.logdir / "metrics.jsonl").exists()
    monkeypatch.setattr(JsonlWriter, "write", write)
    monkeypatch.setattr(train.CheckpointManager, "process", process)
    assert command(config, "--resume").code == 0
    assert final_state(config.logdir) == expected


def test_partly_written_line_is_removed(small_disk):
    path = small_disk / "metrics.jsonl"
    append_text(path, "x" * 4000 + "\n")  # leaves 95 bytes in its page
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        append_text(path, "y" * 300 + "\n")
    assert path.read_text() == "x" * 4000 + "\n"


def test_logdir_can_be_on_another_file_system_than_temporary_files(config, small_disk):
    assert os.stat(small_disk).st_dev != os.stat(tempfile.gettempdir()).st_dev
    assert command(dataclasses.replace(config, logdir=small_disk / "run")).code == 0
    assert check_manifest(small_disk / "run/stage0")["checkpoints"][-1]["epoch"] == 4


def test_read_only_logdir_is_rejected(config, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    end = command(dataclasses.replace(config, logdir=small_disk / "run"))
    assert end.code == 2
    problem = f"--logdir {small_disk}/run cannot be written: {small_disk} is read-only"
    assert end.err == f"error: {problem}; choose another one.\n"


LARGE = 2_000_000  # weights: 8 MB per file, so that most of the time of a save is writing


def save_forever(directory: Path, started: object) -> None:
    """Save checkpoints until the process is killed."""
    os.setpgrp()
    manager = CheckpointManager(directory, save_n_best=2, writer=AsyncWriter())
    if (directory / "checkpoints.json").exists():
        manager.restore(torch.load(directory / "last.pth", weights_only=True))
    model = torch.nn.Linear(LARGE, 1)
    first = 1 + max((entry.epoch for entry in manager.entries), default=0)
    started.set()  # type: ignore[attr-defined]
    for epoch in range(first, first + 10_000):
        torch.nn.init.constant_(model.weight, float(epoch))
        manager.process(score=(epoch * 7 % 5) / 5, epoch=epoch, checkpoint=make_example(model, epoch))


@pytest.mark.slow
def test_best_and_last_are_valid_after_50_kills_during_saves(tmp_path):
    generator = random.Random(0)
    context = get_context("fork")
    directory = tmp_path / "stage0"
    killed_while_writing = 0
    for _ in range(50):
        started = context.Event()
        process = context.Process(target=save_forever, args=(directory, started))
        process.start()
        assert started.wait(SECONDS)
        time.sleep(generator.uniform(0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed_while_writing += any(directory.glob(".*.tmp"))
        if not (directory / "checkpoints.json").exists():
            continue  # killed during the first save
        manifest = check_manifest(directory)
        for name in ("last.pth", "best.pth"):
            model = torch.nn.Linear(LARGE, 1)
            epoch = load_checkpoint(directory / name, model)["epoch"]  # compares the sha256
            assert (model.weight == epoch).all()
            # After a kill between manifest and links, a link has the earlier checkpoint; `restore` repairs that.
            epochs = [entry["epoch"] for entry in manifest["checkpoints"]]
            assert epoch in (epochs[-2:] if name == "last.pth" else epochs)
    assert killed_while_writing > 10
