"""A check that the processes of scripts/train_ddp.sh can form a process group.

`python -m batteries.distributed.connectivity cpu` is one of the processes.
"""

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import IO

import torch

from batteries.core.project import ROOT
from batteries.core.ranks import world_size
from batteries.distributed.collectives import sum_over_ranks
from batteries.distributed.device import find_device
from batteries.distributed.process_group import process_group

START_TIMEOUT = 600.0  # seconds until all processes have imported torch: minutes on a busy machine
DID_NOT_START = "did not start"


@dataclass
class Rank:
    """One of the processes.

    Attributes:
        process: The process.
        output: What it prints when it has started.
        log: Its stderr.
    """

    process: subprocess.Popen
    output: IO[bytes]
    log: IO[bytes]

    @property
    def has_started(self) -> bool:
        """Whether the process has imported torch."""
        return os.fstat(self.output.fileno()).st_size > 0


def check_process_group(processes: int, device_type: str, seconds: float) -> str | None:
    """Start processes that join one process group and add numbers.

    Args:
        processes: Their number.
        device_type: cpu, cuda or mps.
        seconds: The time limit from when all have started; no process is left running after it.

    Returns:
        None if they succeeded, else the reason in one line.
    """
    port = find_free_port()
    with ExitStack() as stack:
        ranks: list[Rank] = []
        for rank in range(processes):
            output = stack.enter_context(tempfile.TemporaryFile())
            log = stack.enter_context(tempfile.TemporaryFile())
            process = _start(rank, processes, device_type, port, output, log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            ranks.append(Rank(process, output, log))
        return _wait(ranks, seconds)


def main(device_type: str) -> None:
    """Run one of the processes."""
    device = find_device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    print("started", flush=True)
    with process_group(device):
        assert int(sum_over_ranks(torch.ones((), device=device))) == world_size()


def _start(
    rank: int, processes: int, device_type: str, port: int, output: IO[bytes], log: IO[bytes]
) -> subprocess.Popen:
    """Start one process with the variables that torchrun would set."""
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "batteries.distributed.connectivity", device_type],
        cwd=ROOT,
        env=os.environ | {name: str(value) for name, value in variables.items()},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=log,
    )


def _wait(ranks: Sequence[Rank], seconds: float) -> str | None:
    """Wait until all processes succeeded, one failed, or the time is over; return what went wrong."""
    begin = time.monotonic()
    while not all(rank.has_started for rank in ranks):
        if failure := _describe_failure(ranks):
            return failure
        if time.monotonic() - begin > START_TIMEOUT:
            missing = ", ".join(str(number) for number, rank in enumerate(ranks) if not rank.has_started)
            return f"process {missing} of {len(ranks)} {DID_NOT_START} in {START_TIMEOUT:g} s"
        time.sleep(0.05)
    begin = time.monotonic()
    while any(rank.process.poll() is None for rank in ranks):
        if failure := _describe_failure(ranks):
            return failure
        if time.monotonic() - begin > seconds:
            waiting = ", ".join(str(number) for number, rank in enumerate(ranks) if rank.process.poll() is None)
            return f"no answer from process {waiting} of {len(ranks)} in {seconds:g} s"
        time.sleep(0.05)
    return _describe_failure(ranks)


def _describe_failure(ranks: Sequence[Rank]) -> str | None:
    """Return why the first process that failed did so; None if none has failed."""
    for number, rank in enumerate(ranks):
        if code := rank.process.poll():
            return f"process {number} of {len(ranks)} exited with code {code}: {_last_line(rank.log)}"
    return None


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "(no error message)"


def find_free_port() -> int:
    """Return a free TCP port outside the ephemeral ranges, from which the gloo of another run may take one."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


if __name__ == "__main__":
    main(sys.argv[1])
