"""Runs functions in processes of their own: many ranks, or a command line whose end is looked at.

Processes are forked from this one, which has imported torch already, so each costs milliseconds and not seconds.
"""

import multiprocessing
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from batteries.core.command_line import run_command
from batteries.distributed.connectivity import find_free_port
from batteries.distributed.process_group import process_group

SECONDS = 120  # a rank that takes longer hangs


def run_ranks(world_size: int, function: Callable[[], Any], join: bool = True) -> list[Any]:
    """What `function` gives on each of `world_size` ranks (gloo, one thread each), in order.

    `join=False` leaves it to `function`, such as train.main, to join the process group.
    """
    context = multiprocessing.get_context("fork")
    port = find_free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run_rank, args=(function, rank, world_size, port, join, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results = [pickle.loads(pipe.recv_bytes()) if pipe.poll(SECONDS) else None for pipe in pipes]
    for process in processes:
        process.join(SECONDS)
        assert process.exitcode == 0
    return results


def _run_rank(function: Callable[[], Any], rank: int, world_size: int, port: int, join: bool, pipe: Any) -> None:
    join_ranks(rank, world_size, port)
    with process_group(torch.device("cpu")) if join else nullcontext():
        result = function()
    pipe.send_bytes(pickle.dumps(result))


def join_ranks(rank: int, world_size: int, port: int) -> None:
    """Make this process one of many, as torchrun does."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}


class End(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def run_train(main: Callable[[Any], object], config_class: type, *flags: str, name: str = "train.py") -> End:
    """`python train.py FLAGS` in a forked process, or another verb by its `name`."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = multiprocessing.get_context("fork").Process(
            target=_run_command, args=(main, config_class, (name, *flags), out, err)
        )
        process.start()
        process.join(SECONDS)
        assert process.exitcode is not None, "the command hangs"
        return End(process.exitcode, out.read_text(), err.read_text())


def _run_command(main: Any, config_class: type, command: tuple[str, ...], out: Path, err: Path) -> None:
    sys.argv = [*command]
    sys.stdout, sys.stderr = out.open("w"), err.open("w")
    try:
        run_command(main, config_class, repeats=command[0] in ("train.py", "tools/check.py"))
    finally:
        sys.stdout.close()
        sys.stderr.close()
