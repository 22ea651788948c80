"""Checkpoints written while training goes on, and full disks: nothing is torn, nothing is lost in silence."""

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

import pytest
import torch
from models import tiny_network
from processes import End, run_ranks, run_train
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
    """Nothing is written until it is set."""
    gate, write = threading.Event(), manager.save_checkpoint

    def wait_and_write(path, checkpoint):
        assert gate.wait(30)
        return write(path, checkpoint)

    monkeypatch.setattr(manager, "save_checkpoint", wait_and_write)
    return gate


def weights_of(path: Path) -> torch.Tensor:
    return torch.load(path, weights_only=True)["model_state_dict"]["weight"]


def some_checkpoint(model: torch.nn.Module, epoch: int) -> dict:
    return make_checkpoint("stage0", epoch, model, step=epoch * 10)


def test_a_save_returns_before_it_is_written_and_holds_the_state_of_its_call(tmp_path, gate):
    model = torch.nn.Linear(3, 3)
    wanted = model.weight.detach().clone()
    manager = CheckpointManager(tmp_path, writer=AsyncWriter())
    manager.process(score=0.5, epoch=1, checkpoint=some_checkpoint(model, 1))
    assert list(tmp_path.glob("*")) == []
    with torch.no_grad():
        model.weight += 1  # training goes on
    gate.set()
    manager.wait()
    assert torch.equal(weights_of(tmp_path / "best.pth"), wanted)


def test_each_of_many_saves_holds_the_state_of_its_call(tmp_path):
    model = torch.nn.Linear(300, 300)
    manager = CheckpointManager(tmp_path, save_n_best=10, writer=AsyncWriter())
    for epoch in range(1, 9):
        torch.nn.init.constant_(model.weight, float(epoch))
        manager.process(score=epoch / 10, epoch=epoch, checkpoint=some_checkpoint(model, epoch))
    manager.wait()
    for epoch in range(1, 9):
        assert (weights_of(tmp_path / f"epoch_{epoch}.pth") == epoch).all()


def test_the_best_path_is_that_of_a_save_still_under_way(tmp_path, gate):
    manager = CheckpointManager(tmp_path, writer=AsyncWriter())
    manager.process(score=0.5, epoch=1, checkpoint=some_checkpoint(torch.nn.Linear(2, 2), 1))
    threading.Timer(0.1, gate.set).start()
    assert load_checkpoint(manager.best_path(), torch.nn.Linear(2, 2))["epoch"] == 1


def test_a_copy_of_a_state_is_that_state_in_memory_of_its_own():
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


def test_what_is_one_tensor_in_a_state_is_one_in_the_copy_and_memory_is_used_again():
    weight, buffers = torch.randn(5, 5), HostBuffers()
    first = buffers.copy({"a": weight, "b": weight})
    assert first["a"] is first["b"]
    assert buffers.copy({"a": weight})["a"] is first["a"]


def test_an_error_in_the_writer_is_raised_by_the_next_save_on_all_ranks(tmp_path, monkeypatch):
    def fail(path, checkpoint):
        raise RuntimeError("the disk is on fire")

    def save_twice() -> str:
        manager = CheckpointManager(tmp_path, writer=AsyncWriter())
        manager.process(score=0.5, epoch=1, checkpoint=some_checkpoint(torch.nn.Linear(2, 2), 1))
        with pytest.raises(RuntimeError) as error:
            manager.process(score=0.6, epoch=2, checkpoint=some_checkpoint(torch.nn.Linear(2, 2), 2))
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
    """The end of `python train.py` with this config."""
    path = config.data_dir.with_name("config.json")
    path.write_text(json.dumps(to_json(config)))
    return run_train(train.main, Config, "--config", str(path), *flags)


def test_an_error_in_the_writer_ends_the_run_with_its_cause(config, monkeypatch):
    def fail(path, checkpoint):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(manager, "save_checkpoint", fail)
    end = command(config)
    assert end.code == 1
    assert "RuntimeError: the disk is on fire" in end.err
    assert json.loads((config.logdir / "run.json").read_text())["exit"] == "failed: RuntimeError: the disk is on fire"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> None:
    """Leave no room."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def check_ledger(folder: Path) -> dict:
    """The ledger, after each of its files was compared with it."""
    ledger = json.loads((folder / "checkpoints.json").read_text())
    for row in ledger["checkpoints"]:
        data = (folder / row["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (row["bytes"], row["sha256"])
    return ledger


def test_a_full_disk_is_forgiven_once_and_best_is_what_is_there(small_disk, caplog):
    manager = CheckpointManager(small_disk / "stage0", writer=AsyncWriter())
    model = torch.nn.Linear(100, 100)

    def save(epoch: int, score: float) -> bool:
        return manager.process(score=score, epoch=epoch, checkpoint=some_checkpoint(model, epoch))

    save(1, 0.5)
    manager.wait()
    fill(small_disk)
    assert save(2, 0.9)
    assert manager.is_better(0.6)  # 0.9 is not on disk
    assert check_ledger(small_disk / "stage0")["best"] == {"epoch": 1, "score": 0.5}
    assert {path.name for path in (small_disk / "stage0").iterdir()} == {
        *("epoch_1.pth", "best.pth", "last.pth", "checkpoints.json")
    }
    (small_disk / "filler").unlink()
    assert save(3, 0.6)
    manager.wait()
    assert [row["epoch"] for row in check_ledger(small_disk / "stage0")["checkpoints"]] == [1, 3]
    assert torch.load(small_disk / "stage0/best.pth", weights_only=True)["epoch"] == 3


def test_a_disk_that_stays_full_ends_the_run_and_says_how_much_was_needed(small_disk):
    manager = CheckpointManager(small_disk / "stage0", writer=AsyncWriter())
    model = torch.nn.Linear(100, 100)  # 40.4 kB
    for epoch in (1, 2):
        manager.process(score=0.5, epoch=epoch, checkpoint=some_checkpoint(model, epoch))
        if epoch == 1:
            manager.wait()
            fill(small_disk)
    assert manager.is_better(0.6)
    manager.process(score=0.6, epoch=3, checkpoint=some_checkpoint(model, 3))
    with pytest.raises(UserError, match=r"epoch_3\.pth cannot be written: it needs 40\.4 kB and 0 bytes are free"):
        manager.is_better(0.7)
    assert [row["epoch"] for row in check_ledger(small_disk / "stage0")["checkpoints"]] == [1]


def test_the_last_save_is_not_forgiven(small_disk):
    manager = CheckpointManager(small_disk / "stage0", writer=AsyncWriter())
    (small_disk / "stage0").mkdir()
    fill(small_disk)
    manager.process(score=0.5, epoch=1, checkpoint=some_checkpoint(torch.nn.Linear(100, 100), 1))
    with pytest.raises(UserError, match="cannot be written"):
        manager.wait()
    assert manager.best_score is None


@pytest.mark.parametrize("freed", [True, False])
def test_a_run_outlives_a_full_disk_for_one_epoch_and_ends_with_the_same_bits(config, small_disk, monkeypatch, freed):
    command(config)
    wanted = final_state(config.logdir)
    config = dataclasses.replace(config, logdir=small_disk / "run")
    valid_fn, calls = train.valid_fn, []

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
    assert final_state(config.logdir) == wanted


def final_state(logdir: Path) -> tuple[bytes, list[torch.Tensor]]:
    """The bytes of metrics.jsonl and of the last weights."""
    weights = torch.load(logdir / "stage0/last.pth", weights_only=True)["model_state_dict"]
    metrics = (logdir / "metrics.jsonl").read_bytes()
    assert len(metrics.splitlines()) == 4
    return metrics, [tensor.numpy().tobytes() for tensor in weights.values()]


def test_lines_that_found_no_room_come_back_with_a_resumed_run(config, small_disk, monkeypatch):
    command(config)
    wanted = final_state(config.logdir)
    config = dataclasses.replace(config, logdir=small_disk / "run")
    write, process = JsonlWriter.write, train.CheckpointManager.process

    def process_and_die(self, score, epoch, checkpoint):
        process(self, score, epoch, checkpoint)
        if epoch == 2:
            self.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(JsonlWriter, "write", lambda *_, **__: None)  # as on a full disk, with room for checkpoints
    monkeypatch.setattr(train.CheckpointManager, "process", process_and_die)
    assert command(config).code == -signal.SIGKILL
    assert not (config.logdir / "metrics.jsonl").exists()
    monkeypatch.setattr(JsonlWriter, "write", write)
    monkeypatch.setattr(train.CheckpointManager, "process", process)
    assert command(config, "--resume").code == 0
    assert final_state(config.logdir) == wanted


def test_a_line_that_fits_in_part_leaves_the_file_as_it_was(small_disk):
    path = small_disk / "metrics.jsonl"
    append_text(path, "x" * 4000 + "\n")  # 95 bytes are left of its page
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        append_text(path, "y" * 300 + "\n")
    assert path.read_text() == "x" * 4000 + "\n"


def test_a_logdir_on_another_file_system_than_temporary_files_works(config, small_disk):
    assert os.stat(small_disk).st_dev != os.stat(tempfile.gettempdir()).st_dev
    assert command(dataclasses.replace(config, logdir=small_disk / "run")).code == 0
    assert check_ledger(small_disk / "run/stage0")["checkpoints"][-1]["epoch"] == 4


def test_a_read_only_logdir_is_refused_and_nothing_is_written(config, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    end = command(dataclasses.replace(config, logdir=small_disk / "run"))
    assert end.code == 2
    assert (
        end.err == f"error: --logdir {small_disk}/run cannot be written: {small_disk} is read-only; choose another.\n"
    )


LARGE = 2_000_000  # weights: 8 MB a file, so that most of a save's time is writing


def save_for_ever(folder: Path, started: object) -> None:
    """A run that does nothing but save."""
    os.setpgrp()
    manager = CheckpointManager(folder, save_n_best=2, writer=AsyncWriter())
    if (folder / "checkpoints.json").exists():
        manager.restore(torch.load(folder / "last.pth", weights_only=True))
    model = torch.nn.Linear(LARGE, 1)
    first = 1 + max((row.epoch for row in manager.rows), default=0)
    started.set()  # type: ignore[attr-defined]
    for epoch in range(first, first + 10_000):
        torch.nn.init.constant_(model.weight, float(epoch))
        manager.process(score=(epoch * 7 % 5) / 5, epoch=epoch, checkpoint=some_checkpoint(model, epoch))


@pytest.mark.slow
def test_after_50_kills_inside_a_save_last_and_best_load_and_match_their_ledger(tmp_path):
    chance, context = random.Random(0), get_context("fork")
    folder, killed_while_writing = tmp_path / "stage0", 0
    for _ in range(50):
        started = context.Event()
        process = context.Process(target=save_for_ever, args=(folder, started))
        process.start()
        assert started.wait(60)
        time.sleep(chance.uniform(0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed_while_writing += any(folder.glob(".*.tmp"))
        if not (folder / "checkpoints.json").exists():
            continue  # killed within the very first save
        ledger = check_ledger(folder)
        for name in ("last.pth", "best.pth"):
            model = torch.nn.Linear(LARGE, 1)
            epoch = load_checkpoint(folder / name, model)["epoch"]  # compares the sha256
            assert (model.weight == epoch).all()
            # A kill between the ledger and the link leaves the one before it, which `restore` puts right.
            rows = [row["epoch"] for row in ledger["checkpoints"]]
            assert epoch in rows[-2:] if name == "last.pth" else epoch in rows
    assert killed_while_writing > 10
