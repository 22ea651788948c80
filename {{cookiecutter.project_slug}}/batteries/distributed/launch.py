"""torchrun for scripts/train_ddp.sh: the same agent, as many processes as fit, and the cause of an end said once.

`python -m batteries.distributed.launch train.py [flags]` starts one process per GPU, or NPROC of them (2 without a
GPU).
For several machines set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each, as for torchrun.

torchrun itself ends with a page of its own traceback and exit code 1 whatever the processes said; here the exit code
is that of the first process that failed, and its message is the last line.
"""

import logging
import os
import shlex
import signal
import sys
from types import FrameType
from typing import NoReturn

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from batteries.core.errors import UserError


def main(command: list[str]) -> int:
    """Run `command` (a Python file and its flags) in every process; the exit code."""
    try:
        processes = count_processes()
        # After --, or torchrun would take --run of predict.py for an abbreviation of its own --run-path.
        arguments = [*rendezvous(), f"--nproc-per-node={processes}", "--", *command]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    threads = max(1, len(_cores()) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    print(f"+ OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} torchrun {shlex.join(arguments)}", flush=True)
    os.environ["BATTERIES_LAUNCHER"] = str(os.getpid())  # for batteries.distributed: whose end is theirs
    logging.disable(logging.CRITICAL)  # of the agent in this process; the processes that it starts speak for themselves
    if hasattr(signal, "SIGUSR1"):  # torchrun passes on the others
        signal.signal(signal.SIGUSR1, _pass_on)
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        return exit_code(error)
    except SignalException as error:
        return 128 + error.sigval
    except KeyboardInterrupt:
        return 130
    return 0


def count_processes() -> int:
    """NPROC, or one process per GPU, or two where there is no GPU."""
    wanted = os.environ.get("NPROC") or str(torch.cuda.device_count() or 2)
    if not wanted.isdecimal() or int(wanted) < 1:
        raise UserError(f"NPROC={wanted} must be a whole number of processes, 1 or more.")
    return int(wanted)


def rendezvous() -> list[str]:
    """Where the processes meet: a free port on this machine, or the address of the first of several machines."""
    nodes = os.environ.get("NNODES", "1")
    for name in ("NNODES", "NODE_RANK", "MASTER_PORT"):
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"{name}={os.environ[name]} must be a whole number.")
    if nodes == "1":
        return ["--standalone"]
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise UserError(f"NNODES={nodes} needs {' and '.join(missing)} too, on each machine.")
    return [
        f"--nnodes={nodes}",
        f"--node-rank={os.environ['NODE_RANK']}",
        f"--master-addr={os.environ['MASTER_ADDR']}",
        f"--master-port={os.environ.get('MASTER_PORT', '29500')}",
    ]


def exit_code(error: ChildFailedError) -> int:
    """The first failed process's own exit code; 128 + the signal where one ended it, as a shell says it."""
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (is memory short?)" if name == "SIGKILL" else ""
        print(f"error: rank {rank} was ended by {name}{hint}, and the others with it.", file=sys.stderr)
    return 128 - code if code < 0 else code


def _pass_on(number: int, frame: FrameType | None) -> NoReturn:
    """Have the agent send the signal to its processes, and wait for their end."""
    raise SignalException("passed on", signal.Signals(number))


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
