"""Many processes, one program: every function here does the obvious thing when there is only one."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from batteries.errors import BadInput, is_bad_input

Result = TypeVar("Result")


def rank() -> int:
    """This process's number among all; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process's number among those on its machine; 0 when it is alone."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started (it sets RANK and its kin); a process on its own has nothing to join."""
    if "RANK" not in os.environ:
        yield
        return
    # gloo carries the objects of `on_main` and runs on a CPU; NCCL carries the gradients between GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: it would wait for ranks that have gone


def barrier() -> None:
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` (any shape) over all processes, in place, the same bits on each."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_over_ranks(value: Any) -> list[Any]:
    """What each process has, in the order of ranks, the same list on each."""
    if not dist.is_initialized():
        return [value]
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


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
