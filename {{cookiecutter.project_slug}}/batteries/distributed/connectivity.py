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
from typing import IO

import torch

from batteries.core.project import ROOT
from batteries.core.ranks import world_size
from batteries.distributed.collectives import sum_over_ranks
from batteries.distributed.device import find_device
from batteries.distributed.process_group import process_group


def check_process_group(processes: int, device_type: str, seconds: float) -> str | None:
    """Start processes that join one process group and add numbers.

    Args:
        processes: Their number.
        device_type: cpu, cuda or mps.
        seconds: The time limit; no process is left running after it.

    Returns:
        None if they succeeded, else the reason in one line.
    """
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        port = find_free_port()
        ranks = [_start(rank, processes, device_type, port, log) for rank, log in enumerate(logs)]
        try:
            return _wait(ranks, logs, seconds)
        finally:
            for process in ranks:
                process.kill()
                process.wait()


def main(device_type: str) -> None:
    """Run one of the processes."""
    device = find_device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(device):
        assert int(sum_over_ranks(torch.ones((), device=device))) == world_size()


def _start(rank: int, processes: int, device_type: str, port: int, log: IO[bytes]) -> subprocess.Popen:
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
        stdout=subprocess.DEVNULL,
        stderr=log,
    )


def _wait(ranks: Sequence[subprocess.Popen], logs: Sequence[IO[bytes]], seconds: float) -> str | None:
    """Wait until all processes succeeded, one failed, or the time is over; return what went wrong."""
    end = time.monotonic() + seconds
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                return f"process {rank} of {len(ranks)} exited with code {code}: {_last_line(logs[rank])}"
        if all(code == 0 for code in codes):
            return None
        if time.monotonic() > end:
            waiting = ", ".join(str(rank) for rank, code in enumerate(codes) if code is None)
            return f"no answer from process {waiting} of {len(ranks)} in {seconds:g} s"
        time.sleep(0.05)


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
