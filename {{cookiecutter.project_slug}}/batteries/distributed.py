"""Many processes, one program: every function here does the obvious thing when there is only one."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from batteries.errors import BadInput, RunFailed, is_bad_input
from batteries.ranks import is_launched, is_main, local_rank, world_size

Result = TypeVar("Result")


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
        raise RunFailed("the launcher has gone, and its processes end with it.")


def refuse_launcher(verb: str) -> None:
    """Raise BadInput where many processes run what is made for one."""
    if world_size() > 1:
        raise BadInput(f"{verb} is for one process: leave the launcher out.")


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` (any shape) over all processes, in place, the same bits on each."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class Agreement:
    """The largest wish of any process, given to all of them one call later, so that no step waits for it."""

    def __init__(self) -> None:
        self._work: Any = None
        self._wish = torch.zeros((), dtype=torch.int64)

    def __call__(self, wish: int) -> int:
        """Ask for `wish`; what was agreed in the call before, 0 in the first. Alone one agrees at once."""
        if not dist.is_initialized():
            return wish
        agreed = 0
        if self._work is not None:
            self._work.wait()
            agreed = int(self._wish)
        self._wish = torch.tensor(wish)
        self._work = dist.all_reduce(self._wish, op=dist.ReduceOp.MAX, async_op=True)
        return agreed


def gather_over_ranks(value: Any) -> list[Any]:
    """What each process has, in the order of ranks, the same list on each."""
    if not dist.is_initialized():
        return [value]
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def interleave_over_ranks(mine: list[Result]) -> list[Result]:
    """The batches of all processes in one order, where batch j was dealt to rank j modulo their number."""
    gathered = gather_over_ranks(mine)
    count = sum(map(len, gathered))
    return [gathered[index % len(gathered)][index // len(gathered)] for index in range(count)]


def union_over_ranks(names: Iterable[str]) -> list[str]:
    """All names that any process has, sorted, the same list on each."""
    return sorted(set().union(*gather_over_ranks(list(names))))


def first_on_each_machine(action: Callable[[], Result]) -> Result:
    """What `action` gives, on every process, but one process of each machine goes first: it downloads for the others.

    Where it fails on one machine, its error is raised everywhere.
    """
    if not dist.is_initialized():
        return action()
    result, error = _attempt(action) if local_rank() == 0 else (None, None)
    for found in gather_over_ranks(error):
        if found is not None:
            raise found
    return result if local_rank() == 0 else action()  # type: ignore[return-value]


def on_main(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 alone and give every process its result; what it raises is raised on all of them."""
    if not dist.is_initialized():
        return action()
    outcome: list = [*_attempt(action)] if is_main() else [None, None]
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """The result or the error of `action`: whatever it is, no other process may wait for it for ever."""
    try:
        return action(), None
    except Exception as error:  # noqa: BLE001 (raised again on all processes)
        return None, BadInput(str(error)) if is_bad_input(error) else error
