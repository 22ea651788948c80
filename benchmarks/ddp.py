"""Samples per second of train_fn on two gloo ranks, compared with torch's minimal DDP loop and with one process.

    make bench-ddp

One thread per rank, the ResNet-18 for the digits with small batches; rounds are interleaved.
"""

import argparse
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).parent.parent
sys.path.insert(0, str(TEMPLATE / "{{cookiecutter.project_slug}}"))

import numpy as np
import torch

import train as rendered
from batteries.core.memory import keep_freed_memory
from batteries.data.loaders import TrainLoader
from batteries.distributed.process_group import process_group
from batteries.run.run import Run
from batteries.training.state import TrainState
from batteries.training.wrap import WITHOUT_BUFFERS, prepare_model, wrap_model
from experiment.augmentations import normalize
from experiment.dataset import load_dataset
from experiment.model import build_model
from experiment.task import build_criterion

CPU = torch.device("cpu")
STEPS, BATCH_SIZE = 20, 32


def template_loop() -> float:
    """Return the seconds of one epoch of train_fn with batches of 32 over all ranks, without SyncBatchNorm."""
    keep_freed_memory()  # as train.py does on a CPU
    dataset = load_dataset(Path("data"))
    with tempfile.TemporaryDirectory() as folder:
        stages = (rendered.Stage("stage0", 2, 1e-3, "constant"),)
        logdir = Path(folder) / "run"
        config = replace(rendered.Config(tracker=("none",)), stages=stages, logdir=logdir)
        batches = TrainLoader(dataset, range(STEPS * BATCH_SIZE), None, CPU, seed=0, batch_size=BATCH_SIZE)
        model = prepare_model(build_model(num_classes=10), CPU, sync_batchnorm=False)
        wrapped = wrap_model(model, CPU)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3, fused=True)
        state = TrainState(wrapped, optimizer, rendered.make_schedule(optimizer, stages[0], STEPS))
        with Run(config, CPU, model, model_args={}, data="", split={}, may_change=()) as run:
            stage = run.begin_stage(0, state, rendered.CheckpointManager(logdir / "stage0", writer=run.writer))
            for epoch in (1, 2):
                begin = time.perf_counter()
                rendered.train_fn(state, batches.epoch(0, epoch), stage, config)
    return time.perf_counter() - begin


def minimal() -> float:
    """Return the seconds of one epoch of the loop in torch's DDP tutorial, with the same batches in memory."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    dataset = load_dataset(Path("data"))
    model = build_model(num_classes=10)
    if world_size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, **WITHOUT_BUFFERS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    criterion = build_criterion()
    begin = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        for step in range(STEPS):
            size = BATCH_SIZE // world_size
            start = step * BATCH_SIZE + int(os.environ.get("RANK", 0)) * size
            images, targets = dataset.get_batch(np.arange(start, start + size))
            criterion(model(normalize(images)), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    return time.perf_counter() - begin


def run_rank(function: Any, rank: int, world_size: int, port: int, pipe: Any) -> None:
    """Run a contender in one process and send its seconds."""
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    sys.stdout = Path(os.devnull).open("w")
    with process_group(CPU):
        pipe.send(function())


def measure(function: Any, world_size: int) -> float:
    """Return the seconds of the slowest rank."""
    context = get_context("spawn")
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=run_rank, args=(function, rank, world_size, port, sender)))
        processes[-1].start()
        pipes.append(receiver)
    seconds = max(pipe.recv() for pipe in pipes)
    for process in processes:
        process.join()
    return seconds


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    contenders = {
        "torch's minimal DDP loop, 2 ranks": (minimal, 2),
        "train_fn, 2 ranks": (template_loop, 2),
        "bare loop, 1 process": (minimal, 1),
        "train_fn, 1 process": (template_loop, 1),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in random.Random(number).sample(list(contenders), len(contenders)):
            rates[name].append(STEPS * BATCH_SIZE / measure(*contenders[name]))
    floor = rates["torch's minimal DDP loop, 2 ranks"]
    print(f"{rounds} rounds, gloo, one thread per rank, torch {torch.__version__}")
    for name, values in rates.items():
        ratio = statistics.median(value / reference for value, reference in zip(values, floor, strict=True))
        print(f"{name:40} {statistics.median(values):8.1f} samples/s {ratio:6.2f} x")


if __name__ == "__main__":
    main()
