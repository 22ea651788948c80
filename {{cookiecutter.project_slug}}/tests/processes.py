"""Running functions in separate processes: on several ranks, or as a command with its exit code and output.

The processes are forked from this one, which has already imported torch, so that each takes milliseconds to start.
"""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from batteries.core.command_line import run_command
from batteries.distributed.connectivity import find_free_port
from batteries.distributed.process_group import process_group

SECONDS = 500  # time limit of a process or an event: generous, because a machine may be slow or busy


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Wait for an event that another process brings about.

    Args:
        happened: Returns whether it has happened.
        what: The event, for the error after SECONDS.
    """
    end = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < end, f"not within {SECONDS} s: {what}"
        time.sleep(0.01)


def run_ranks(world_size: int, function: Callable[[], Any], join: bool = True) -> list[Any]:
    """Run `function` on `world_size` ranks (gloo, one thread each) and return the results in the order of ranks.

    With `join=False`, `function` joins the process group itself, as train.main does.
    """
    context = multiprocessing.get_context("fork")
    port = find_free_port()
    readers, processes = [], []
    for rank in range(world_size):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_run_rank, args=(function, rank, world_size, port, join, writer))
        process.start()
        writer.close()
        readers.append(reader)
        processes.append(process)
    results = [pickle.loads(reader.recv_bytes()) if reader.poll(SECONDS) else None for reader in readers]
    for process in processes:
        process.join(SECONDS)
        assert process.exitcode == 0
    return results


def _run_rank(function: Callable[[], Any], rank: int, world_size: int, port: int, join: bool, writer: Any) -> None:
    join_ranks(rank, world_size, port)
    with process_group(torch.device("cpu")) if join else nullcontext():
        result = function()
    writer.send_bytes(pickle.dumps(result))


def join_ranks(rank: int, world_size: int, port: int) -> None:
    """Make this process one of several ranks, by the variables that torchrun sets."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


class End(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


def run_train(
    main: Callable[[Any], object], config_class: type, *flags: str, name: str = "train.py", repeats: bool = True
) -> End:
    """Run `python train.py FLAGS` in a forked process, or another command.

    Args:
        main: The function of the command.
        config_class: The dataclass of its options.
        flags: The command line.
        name: The path of the command, for its messages.
        repeats: The command accepts `--config FILE`.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        err = Path(directory) / "err"
        process = multiprocessing.get_context("fork").Process(
            target=_run_command, args=(main, config_class, (name, *flags), repeats, out, err)
        )
        process.start()
        process.join(SECONDS)
        assert process.exitcode is not None, f"the command did not exit within {SECONDS} s"
        return End(process.exitcode, out.read_text(), err.read_text())


def _run_command(main: Any, config_class: type, command: tuple[str, ...], repeats: bool, out: Path, err: Path) -> None:
    sys.argv = list(command)
    sys.stdout = out.open("w")
    sys.stderr = err.open("w")
    try:
        run_command(main, config_class, repeats=repeats)
    finally:
        sys.stdout.close()
        sys.stderr.close()
