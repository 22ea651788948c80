"""Collective operations that also work in a single process."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from batteries.core.ranks import is_rank_zero, local_rank, world_size

Result = TypeVar("Result")


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` (any shape) over all processes, in place, the same bits on each."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class AsyncMaxReduce:
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


def local_rank_zero_first(action: Callable[[], Result]) -> Result:
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


def run_on_rank_zero(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 alone and give every process its result; what it raises is raised on all of them."""
    if not dist.is_initialized():
        return action()
    outcome: list = [*_attempt(action)] if is_rank_zero() else [None, None]
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """The result or the error of `action`: whatever it is, no other process may wait for it for ever."""
    try:
        return action(), None
    except Exception as error:  # noqa: BLE001 (raised again on all processes)
        return None, error
