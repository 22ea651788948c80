"""The cost of `--shards 8`: seconds of train_fn compared with plain training at the same micro-batch size.

    make bench-elastic

Two gloo ranks and one process, one thread each, the ResNet-18 for the digits, 8 micro-batches of 16 samples in a step.
Without shards, a rank accumulates its micro-batches, and batch norm statistics are not synchronised, as with shards.
Rounds are interleaved. It also prints the bytes that the partial sums of gradients take.
"""

import argparse
import random
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).parent.parent
sys.path[:0] = [str(TEMPLATE / "{{cookiecutter.project_slug}}"), str(TEMPLATE / "benchmarks")]

import torch
from ddp import measure

import train as rendered
from batteries.core.memory import keep_freed_memory
from batteries.core.ranks import world_size
from batteries.data.loaders import TrainLoader
from batteries.distributed.tree_sum import TreeSum
from batteries.training.state import SilentLogger, TrainState
from batteries.training.wrap import prepare_model, wrap_model
from experiment.dataset import load_dataset
from experiment.model import build_model

CPU = torch.device("cpu")
STEPS, SHARDS, SHARD_SIZE = 4, 8, 16


def loop(shards: int | None) -> float:
    """Return the seconds of the second of two epochs of train_fn."""
    keep_freed_memory()  # as train.py does on a CPU
    torch.manual_seed(0)
    config = rendered.Config(tracker=("none",), shards=shards)
    batch_size = SHARDS * SHARD_SIZE
    batches = TrainLoader(
        load_dataset(Path("data")),
        range(STEPS * batch_size),
        None,
        CPU,
        seed=0,
        batch_size=batch_size,
        accumulation_steps=SHARDS // world_size(),
        shards=shards,
    )
    model = prepare_model(build_model(num_classes=10), CPU, sync_batchnorm=False)
    wrapped = wrap_model(model, CPU, shards=shards)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3, fused=True)
    stage = replace(config.stages[0], schedule="constant")
    state = TrainState(wrapped, optimizer, rendered.make_schedule(optimizer, stage, STEPS))
    begin = 0.0
    for epoch in (1, 2):
        begin = time.perf_counter()
        rendered.train_fn(state, batches.epoch(0, epoch), SilentLogger(CPU), config)
    return time.perf_counter() - begin


def largest_partial_sums(leaves: int) -> int:
    """Return the largest number of partial sums that a rank with `leaves` shards keeps besides the gradient."""
    tree = TreeSum()
    largest = 0
    for _ in range(leaves):
        largest = max(largest, len(tree._partial_sums))
        tree.add([torch.zeros(())])
    return largest


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    contenders: dict[str, tuple[Any, int]] = {
        f"{name}, {ranks} {'ranks' if ranks > 1 else 'process'}": (partial(loop, shards), ranks)
        for ranks in (2, 1)
        for name, shards in (("plain", None), (f"--shards {SHARDS}", SHARDS))
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in random.Random(number).sample(list(contenders), len(contenders)):
            seconds[name].append(measure(*contenders[name]))
    print(f"{rounds} rounds, gloo, one thread per rank, torch {torch.__version__}")
    for name, values in seconds.items():
        plain = seconds[name.replace(f"--shards {SHARDS}", "plain")]
        ratio = statistics.median(value / reference for value, reference in zip(values, plain, strict=True))
        print(f"{name:24} {statistics.median(values) / STEPS:6.3f} s per step {ratio:6.2f} x plain")
    parameters = sum(parameter.nbytes for parameter in build_model(num_classes=10).parameters())
    for ranks in (1, 2, 4, 8):
        partial_sums = largest_partial_sums(SHARDS // ranks)
        print(f"{ranks} processes: {partial_sums} partial sums of {parameters / 2**20:.0f} MiB besides the gradient")


if __name__ == "__main__":
    main()
