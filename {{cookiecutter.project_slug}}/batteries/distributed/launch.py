"""The launcher of scripts/train_ddp.sh: torchrun's agent, a number of processes that fits, and one clear error.

    python -m batteries.distributed.launch train.py [flags]

starts one process per GPU, or NPROC processes (without a GPU, 2 by default). For several nodes, set NNODES, NODE_RANK,
MASTER_ADDR and MASTER_PORT on each node, as for torchrun.

torchrun exits with code 1 and a long traceback of the agent, whatever the processes printed. This launcher exits with
the code of the first process that failed, and the message of that process is the last output.
"""

import logging
import os
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from batteries.core.errors import UserError
from batteries.core.project import ROOT


def main(command: list[str]) -> int:
    """Run `command`, a Python file and its flags, in every process; return the exit code."""
    try:
        check_script(command)
        processes = count_processes()
        # After --, because torchrun would take --run of predict.py for an abbreviation of its option --run-path.
        arguments = [*rendezvous_arguments(), f"--nproc-per-node={processes}", "--", *command]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _set_environment(processes)
    print(f"+ OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} torchrun {shlex.join(arguments)}", flush=True)
    logging.disable(logging.CRITICAL)  # of the agent in this process; the ranks print their own messages
    if hasattr(signal, "SIGUSR1"):  # torchrun forwards the other signals
        signal.signal(signal.SIGUSR1, _forward_signal)
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        return exit_code(error)
    except SignalException as error:
        return 128 + error.sigval
    except KeyboardInterrupt:
        return 130
    return 0


def check_script(command: list[str]) -> None:
    """Raise UserError if the command does not begin with a file."""
    if not command or not Path(command[0]).is_file():
        given = command[0] if command else "no argument"
        raise UserError(f"the launcher needs a Python file, such as train.py, not {given}.")


def count_processes() -> int:
    """Return the number of processes on this node: NPROC, or one per GPU, or 2 without a GPU."""
    count = os.environ.get("NPROC") or str(torch.cuda.device_count() or 2)
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"NPROC={count} must be an integer, 1 or more.")
    return int(count)


def rendezvous_arguments() -> list[str]:
    """Return torchrun's arguments for the rendezvous: a free port of this machine, or the address of the first node.

    Raises:
        UserError: If a variable is missing or is not a number.
    """
    for name in ("NNODES", "NODE_RANK", "MASTER_PORT"):
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"{name}={os.environ[name]} must be an integer.")
    nodes = os.environ.get("NNODES", "1")
    if nodes == "1":
        return ["--standalone"]
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise UserError(f"NNODES={nodes} also needs {' and '.join(missing)} on each node.")
    return [
        f"--nnodes={nodes}",
        f"--node-rank={os.environ['NODE_RANK']}",
        f"--master-addr={os.environ['MASTER_ADDR']}",
        f"--master-port={os.environ.get('MASTER_PORT', '29500')}",
    ]


def exit_code(error: ChildFailedError) -> int:
    """Return the exit code of the first process that failed; 128 + the signal number if a signal ended it."""
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    print(f"error: rank {rank} was ended by {name}{hint}; the other ranks were stopped.", file=sys.stderr)
    return 128 - code


def _set_environment(processes: int) -> None:
    """Set the variables that the processes inherit."""
    threads = max(1, len(_available_cores()) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ["BATTERIES_LAUNCHER"] = str(os.getpid())  # process_group checks that this process is alive
    # A script in tools/ has its own directory in sys.path, and the project may not be installed.
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)


def _forward_signal(number: int, frame: FrameType | None) -> NoReturn:
    """Have the agent send the signal to its processes and wait for them to exit."""
    raise SignalException("forwarded", signal.Signals(number))


def _available_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
