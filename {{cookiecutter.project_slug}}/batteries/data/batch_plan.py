"""The division of an epoch into steps, micro-batches and ranks."""

from collections.abc import Iterator
from typing import NamedTuple

from batteries.core.errors import UserError
from batteries.core.ranks import world_size
from batteries.core.text import count_of


class MicroBatch(NamedTuple):
    """One micro-batch of one rank, as positions in the order of the epoch.

    Attributes:
        start: The first position.
        stop: The position after the last one.
        loss_weight: The weight of its mean loss. The weighted losses, summed over the micro-batches of a step and
            averaged over the ranks, are the mean loss of the step.
        ends_step: Whether it is the last micro-batch of its optimizer step.
    """

    start: int
    stop: int
    loss_weight: float
    ends_step: bool


def plan_epoch(
    size: int,
    batch_size: int,
    accumulation_steps: int,
    rank: int,
    world_size: int,
    drop_last: bool,
    first_step: int = 0,
) -> Iterator[MicroBatch]:
    """Plan the micro-batches of one rank, in order.

    A step is divided into micro-batches first, and each micro-batch into slices per rank. So micro-batch j has the same
    samples for any `world_size`, and synchronised batch norm has the same statistics. A short last step is divided as
    evenly as possible, into fewer micro-batches if there are not enough samples for each rank.

    Args:
        size: The samples of the epoch.
        batch_size: The samples of an optimizer step, over all ranks and micro-batches.
        accumulation_steps: The micro-batches of an optimizer step.
        rank: The rank.
        world_size: The number of ranks.
        drop_last: Skip a short last step.
        first_step: The step to start from, counted from 0.
    """
    for step in range(first_step, count_steps(size, batch_size, drop_last)):
        begin = step * batch_size
        step_size = min(batch_size, size - begin)
        micro_batches = count_micro_batches(step_size, accumulation_steps, world_size)
        slices = micro_batches * world_size
        for index in range(micro_batches):
            number = index * world_size + rank
            start = begin + step_size * number // slices
            stop = begin + step_size * (number + 1) // slices
            loss_weight = (stop - start) * world_size / step_size
            yield MicroBatch(start, stop, loss_weight, ends_step=index == micro_batches - 1)


def plan_shards(
    size: int, batch_size: int, shards: int, rank: int, world_size: int, drop_last: bool, first_step: int = 0
) -> Iterator[MicroBatch]:
    """Plan the micro-batches of one rank if each of them is a shard: the same ones for any `world_size`.

    A rank has consecutive shards. The weighted losses of all shards add up to the mean loss of the step.

    Args:
        size: The samples of the epoch.
        batch_size: The samples of an optimizer step.
        shards: The shards of an optimizer step.
        rank: The rank.
        world_size: The number of ranks, which divides `shards`.
        drop_last: Skip a short last step.
        first_step: The step to start from, counted from 0.
    """
    own = range(rank * shards // world_size, (rank + 1) * shards // world_size)
    for step in range(first_step, count_steps(size, batch_size, drop_last)):
        begin = step * batch_size
        step_size = min(batch_size, size - begin)
        for number in own:
            start = begin + step_size * number // shards
            stop = begin + step_size * (number + 1) // shards
            yield MicroBatch(start, stop, (stop - start) / step_size, ends_step=number == own[-1])


def count_steps(size: int, batch_size: int, drop_last: bool) -> int:
    """Return the number of optimizer steps in one pass over `size` samples."""
    return size // batch_size if drop_last else -(-size // batch_size)


def count_micro_batches(step_size: int, accumulation_steps: int, world_size: int) -> int:
    """Return the number of micro-batches of a step; each rank has at least one sample in each of them."""
    return min(accumulation_steps, step_size // world_size)


def smallest_micro_batch(
    size: int, batch_size: int, accumulation_steps: int, world_size: int, drop_last: bool, shards: int | None = None
) -> int:
    """Return the number of samples in the smallest micro-batch of an epoch, on any rank."""
    step_sizes = [batch_size]
    if not drop_last and size % batch_size:
        step_sizes.append(size % batch_size)
    if shards is not None:
        return min(step_sizes) // shards
    return min(
        step_size // (count_micro_batches(step_size, accumulation_steps, world_size) * world_size)
        for step_size in step_sizes
    )


def check_batch_size(
    batch_size: int, accumulation_steps: int, size: int, drop_last: bool, shards: int | None = None
) -> None:
    """Raise UserError if `batch_size` is not divisible by ranks and micro-batches, or does not fit `size` samples."""
    ranks = world_size()
    assert accumulation_steps > 0
    divisor = ranks * accumulation_steps if shards is None else shards
    if batch_size < 1 or batch_size % divisor:
        below = batch_size // divisor * divisor
        nearest = f"{below} or {below + divisor}" if below > 0 else f"{divisor}"
        if shards is not None and below == 0:
            nearest += " or more, or fewer --shards"
        reason = f"{count_of(ranks, 'process')} x {count_of(accumulation_steps, 'accumulation step')}"
        raise UserError(
            f"--batch-size {batch_size} must be a multiple of {divisor} "
            f"({reason if shards is None else '--shards'}); use {nearest}."
        )
    if drop_last and size < batch_size:
        raise UserError(
            f"--batch-size {batch_size} is larger than the train split, which has {count_of(size, 'sample')}; "
            f"use --batch-size {max(size // divisor * divisor, divisor)} or less, or --no-drop-last."
        )
    if not drop_last and 0 < size % batch_size < (shards or ranks):
        parts = f"{ranks} processes" if shards is None else f"{shards} shards"
        raise UserError(
            f"--batch-size {batch_size} leaves {count_of(size % batch_size, 'sample')} for the last step of an epoch, "
            f"fewer than the {parts}; use --drop-last or another --batch-size."
        )
