"""Joining and leaving the process group."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from batteries.core.errors import RunError, UserError
from batteries.core.ranks import is_launched, world_size
from batteries.distributed.collectives import sum_over_ranks


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started; a process on its own has nothing to join."""
    if not is_launched():
        yield
        return
    _end_with_launcher()
    # gloo carries the objects of `on_main` and runs on a CPU; NCCL carries the gradients between GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    sum_over_ranks(torch.zeros(()))  # wait for all: one that left before another has connected would make that one fail
    if sys.version_info < (3, 11, 8) and hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_wait_for_threads)
    yield
    dist.destroy_process_group()  # not after an error: it would wait for ranks that have gone


def _wait_for_threads() -> None:
    """Wait, before a fork, until no thread of gloo is about to enter Python.

    It has a lock of the interpreter for a moment then, and a loader's worker that is forked in that moment waits for it
    for ever, and the run for the worker. Python 3.11.8 mended that: github.com/python/cpython/issues/112275
    """
    time.sleep(0.01)  # gives those that are there Python's global lock, so that they end what they want
    sys._current_frames()  # takes that lock of the interpreter, and so waits for the thread that has it


def _end_with_launcher() -> None:
    """Have Linux send SIGTERM, which saves the run, where the process that started this one is killed.

    Raises RunFailed where it was killed before, while this one imported torch.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG, see man 2 prctl
    if os.environ.get("BATTERIES_LAUNCHER", str(os.getppid())) != str(os.getppid()):
        raise RunError("the launcher has gone, and its processes end with it.")


def require_single_process(verb: str) -> None:
    """Raise BadInput where many processes run what is made for one."""
    if world_size() > 1:
        raise UserError(f"{verb} is for one process: leave the launcher out.")
