"""Joining and leaving the process group."""

import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from batteries.core.errors import RunError, UserError
from batteries.core.ranks import is_launched, world_size
from batteries.core.signals import terminate_with_parent
from batteries.distributed.collectives import control_group, sum_over_ranks


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the process group of the processes that torchrun started; do nothing in a process started without it.

    Args:
        device: The device of this process.

    Raises:
        RunError: If the launcher of this process has died.
    """
    if not is_launched():
        yield
        return
    _exit_with_launcher()
    # gloo is used for objects and tensors on the CPU, NCCL for the gradients on GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    with control_group():
        # Wait for all ranks: a rank that exits before another one has connected would make that one fail.
        sum_over_ranks(torch.zeros(()))
        if sys.version_info < (3, 11, 8) and hasattr(os, "register_at_fork"):
            os.register_at_fork(before=_wait_for_gloo_threads)
        yield
    # A Reducer of DistributedDataParallel that outlives its group can hang (https://github.com/pytorch/pytorch/issues/56297),
    # and a wrapper can be part of a reference cycle.
    gc.collect()
    dist.destroy_process_group()  # not after an error: it would wait for ranks that have exited


def _wait_for_gloo_threads() -> None:
    """Wait, before a fork, until no thread of gloo is entering Python.

    Such a thread holds a lock of the interpreter for a moment. A DataLoader worker that is forked in that moment waits
    for the lock forever, and the run waits for the worker. Fixed in Python 3.11.8:
    https://github.com/python/cpython/issues/112275
    """
    time.sleep(0.01)  # releases the GIL, so that threads that are entering can finish
    sys._current_frames()  # takes the same lock, and so waits for a thread that holds it


def _exit_with_launcher() -> None:
    """On Linux, have this process receive SIGTERM, which saves the run, if the process that started it dies.

    Raises:
        RunError: If it died before, while this process imported torch.
    """
    terminate_with_parent()
    if os.environ.get("BATTERIES_LAUNCHER", str(os.getppid())) != str(os.getppid()):
        raise RunError("the launcher process died, so this rank exits.")


def require_single_process(command: str) -> None:
    """Raise UserError if `command`, which runs in one process only, was started by torchrun with several."""
    if world_size() > 1:
        raise UserError(f"{command} runs in a single process; start it without torchrun.")
