"""Collective operations that also work in a single process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from batteries.core.ranks import is_rank_zero, local_rank, world_size

Result = TypeVar("Result")

# The process group of everything here, so that it is never matched with a bucket of DistributedDataParallel, which uses
# the default group: buckets are reduced in the background, and a rank whose model skips a layer reduces fewer of them.
# `process_group` creates it; None is the default group.
_control_group: Any = None


@contextmanager
def control_group() -> Iterator[None]:
    """Use a separate process group for the collectives of this module. Every rank must call it."""
    global _control_group
    _control_group = dist.new_group()
    try:
        yield
    finally:
        _control_group = None


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` (any shape) over all ranks in place and return it; the result is bit-identical on all ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor, group=_control_group)
    return tensor


def broadcast_from_rank_zero(tensor: torch.Tensor) -> None:
    """Give all ranks the values that `tensor` has on rank 0."""
    dist.broadcast(tensor, src=0, group=_control_group)


class AsyncMaxReduce:
    """The maximum of a number over all ranks, available one call later, so that no step waits for another rank."""

    def __init__(self) -> None:
        self._work: Any = None
        self._maximum = torch.zeros((), dtype=torch.int64)

    def __call__(self, value: int) -> int:
        """Start to reduce `value`, and return the maximum of the call before. Every rank must call it.

        Returns:
            The maximum over all ranks in the call before, 0 in the first call. In a single process `value`.
        """
        if not dist.is_initialized():
            return value
        previous = 0
        if self._work is not None:
            self._work.wait()
            previous = int(self._maximum)
        self._maximum = torch.tensor(value)
        self._work = dist.all_reduce(self._maximum, op=dist.ReduceOp.MAX, group=_control_group, async_op=True)
        return previous


def gather_over_ranks(value: Any) -> list[Any]:
    """Return the `value` of every rank, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, value, group=_control_group)
    return gathered


def interleave_over_ranks(batches: list[Result]) -> list[Result]:
    """Return the batches of all ranks in their original order, in which rank r has batches r, r + world size, …."""
    gathered = gather_over_ranks(batches)
    count = sum(len(of_rank) for of_rank in gathered)
    return [gathered[index % len(gathered)][index // len(gathered)] for index in range(count)]


def local_rank_zero_first(action: Callable[[], Result]) -> Result:
    """Run `action` on every rank, first on local rank 0 of each node, such as to download files for the others.

    Returns:
        The result on this rank.

    Raises:
        Exception: What `action` raises on any local rank 0, on every rank.
    """
    if not dist.is_initialized():
        return action()
    result, error = _attempt(action) if local_rank() == 0 else (None, None)
    for raised in gather_over_ranks(error):
        if raised is not None:
            raise raised
    return result if local_rank() == 0 else action()  # type: ignore[return-value]


def run_on_rank_zero(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 only.

    Returns:
        Its result, on every rank.

    Raises:
        Exception: What `action` raises, on every rank.
    """
    if not dist.is_initialized():
        return action()
    outcome: list = list(_attempt(action)) if is_rank_zero() else [None, None]
    dist.broadcast_object_list(outcome, src=0, group=_control_group, device=torch.device("cpu"))
    result, error = outcome
    if error is not None:
        raise error
    return result


def _attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """Return the result or the error of `action`, so that no other rank waits forever for the collective after it."""
    try:
        return action(), None
    except Exception as error:  # noqa: BLE001 (raised again on all ranks)
        return None, error
