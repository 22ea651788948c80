"""Starting, killing and comparing whole runs, in forked processes."""

import hashlib
import os
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from marks import MIXING
from processes import SECONDS, join_ranks

import train
from batteries.core import command_line
from batteries.distributed.connectivity import find_free_port
from train import Config


def small_run(directory: Path, data_dir: Path, **options: Any) -> Config:
    """Return the options of a small run on a CPU, whose every step depends on each state that a run has.

    Args:
        directory: Where the run directory and the split file are made.
        data_dir: The output of `make_data`.
        options: More options.
    """
    return Config(
        **MIXING,
        data_dir=data_dir,
        split_file=directory / "splits.csv",
        device="cpu",
        tracker=("none",),
        num_workers=0,
        limit_batches=4,  # the smallest test data have no more
        save_n_best=1,
        ema_decay=0.9,
        clip_norm=1.0,
        resume=True,
        logdir=directory / "run",
        **options,
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
        process.join(SECONDS)
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
        data = value.cpu().contiguous().numpy().tobytes()
    elif isinstance(value, dict):
        data = "".join(f"{name}:{hash_of(item)}" for name, item in value.items()).encode()
    elif isinstance(value, list | tuple):
        data = "".join(hash_of(item) for item in value).encode()
    else:
        data = repr(value).encode()
    return hashlib.sha256(data).hexdigest()
